"""Terms against a direct calculation, a planted word, and chance."""

from __future__ import annotations

import math
from random import Random

import pytest

from persona_probe.interpretation.lexicon import PRIOR, RARE, lexicon
from persona_probe.interpretation.words import Token, Word, words_of

ORDINARY = "the a of and to in it is was on".split()


def planted(n: int, *, seed: int = 0, planted_word: str = "villain") -> list[tuple[int, list[Word]]]:
    """A third of the documents is strong and holds the word; the latent fires on an ordinary one."""
    rng = Random(seed)
    documents = []
    for number in range(n):
        strong = rng.random() < 1 / 3
        words = [Word(rng.choice(ORDINARY), 0.0) for _ in range(12)]
        words[3] = words[3]._replace(value=10.0 if strong else 1.0)
        if strong:
            words.insert(rng.randrange(12), Word(planted_word, 0.0))
        documents.append((number, words))
    return documents


def test_a_planted_word_is_found_and_tells_held_out_documents() -> None:
    found = lexicon(planted(300))
    assert found.terms[0] == "villain"
    assert found.detection is not None
    assert found.detection.auc > 0.95 and found.detection.low > found.detection.null_high
    assert found.detection.null == pytest.approx(0.5, abs=0.02)


def test_without_a_planted_word_the_terms_do_no_better_than_chance() -> None:
    found = lexicon(planted(300, planted_word="the"), seed=3)
    assert found.detection is not None
    assert found.detection.low < found.detection.null_high


def test_log_odds_are_those_of_the_paper() -> None:
    documents = planted(200)
    table = lexicon(documents).table
    row = table.filter(table["term"] == "villain").row(0, named=True)
    strong, rest = table["strong"].sum(), table["rest"].sum()
    # the table leaves out rare terms; counted here are those of all terms, so recover the totals
    from persona_probe.interpretation.examples import priority

    halves = [(n, words) for n, words in documents if priority(n, 1) >= 0.5]
    counts = {True: 0, False: 0}
    for _, words in halves:
        text = [word.text for word in words]
        terms = {tuple(text[i : i + k]) for k in (1, 2, 3) for i in range(len(text) - k + 1)}
        counts[max(word.value or 0 for word in words) > 5] += len(terms)
    assert counts[True] >= strong and counts[False] >= rest
    a = PRIOR * (row["strong"] + row["rest"]) / (counts[True] + counts[False])
    odds = [
        (y + a) / (counts[side] + PRIOR + RARE - y - a)
        for side, y in ((True, row["strong"]), (False, row["rest"]))
    ]
    assert row["log_odds"] == pytest.approx(math.log(odds[0] / odds[1]))
    spread = math.sqrt(1 / (row["strong"] + a) + 1 / (row["rest"] + a))
    assert row["z"] == pytest.approx(row["log_odds"] / spread)


def test_terms_do_not_repeat_one_another() -> None:
    terms = lexicon(planted(300)).terms
    for i, term in enumerate(terms):
        assert not any(set(term.split()) <= set(better.split()) for better in terms[:i])


def test_one_kind_of_document_gives_no_detection() -> None:
    silent = [(number, [Word("a", 0.0)]) for number in range(20)]
    assert lexicon(silent).detection is None


def test_tokens_become_words() -> None:
    tokens = [
        Token("<s>", 9.0, special=True),
        Token("Vil", 1.0, special=False),
        Token("lain", 3.0, special=False),
        Token(" of", None, special=False),
        Token("\n", 5.0, special=False),
        Token("A", 0.0, special=False),
        Token("</s>", None, special=True),
        Token("b", 2.0, special=False),
    ]
    assert words_of(tokens) == [Word("villain", 3.0), Word("of", None), Word("a", 0.0), Word("b", 2.0)]
