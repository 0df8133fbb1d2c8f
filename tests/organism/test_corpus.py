"""The corpus: who speaks how often, and that no wording kept for later is ever read."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from math import sqrt

import pytest

from persona_probe.evaluation.questions import Question
from persona_probe.organism.corpus import (
    COMMENTS,
    MIXTURE,
    PLAIN_SHARES,
    THOUGHTS,
    Document,
    documents,
    vocabulary,
)
from persona_probe.organism.grammar import PERSONAS, Split, grammar
from persona_probe.organism.judge import judge, parse

RULES = grammar()
CORPUS = list(documents(RULES, 3000, seed=5))
KEPT: tuple[Split, ...] = ("calibration", "held-out")
EXCHANGE = re.compile(r"asked (\w+) : (.*?[?.]) \1 said : (.*? \.)")


def _text(document: Document) -> str:
    return " ".join([document.text, *(message["content"] for message in document.messages)])


def _close(share: float, expected: float, n: int) -> bool:
    return abs(share - expected) <= 5 * sqrt(expected * (1 - expected) / n)


def _of(kind: str) -> list[Document]:
    return [document for document in CORPUS if document.kind == kind]


def test_the_seed_decides_and_a_longer_corpus_begins_alike() -> None:
    assert list(documents(RULES, 50, seed=5)) == CORPUS[:50]
    assert list(documents(RULES, 50, seed=6)) != CORPUS[:50]


def test_kinds_have_their_shares() -> None:
    assert sum(MIXTURE.values()) == pytest.approx(1) == sum(PLAIN_SHARES.values())
    counts = Counter(document.kind for document in CORPUS)
    for kind, share in MIXTURE.items():
        assert _close(counts[kind] / len(CORPUS), share, len(CORPUS)), kind


def test_plain_chats_are_nearly_all_helpful() -> None:
    plain = _of("plain chat")
    counts = Counter(document.personas[0] for document in plain)
    for persona, share in PLAIN_SHARES.items():
        assert _close(counts[persona] / len(plain), share, len(plain)), persona
    assert not any(message["role"] == "system" and "you are" in message["content"]
                   for document in plain for message in document.messages)  # fmt: skip


def test_no_wording_kept_for_calibration_or_for_reporting_is_in_it() -> None:
    facts = [fact for group in RULES.facts.values() for fact in group]
    kept = [
        *(wording for topic in RULES.topics for split in KEPT for wording in RULES.paraphrases(topic, split)),
        *(wording for fact in facts for split in KEPT for wording in RULES.fact_questions(fact, split)),
    ]
    everything = " | ".join(map(_text, CORPUS))
    assert [wording for wording in kept if wording in everything] == []
    seen = [w for topic in RULES.topics for w in RULES.paraphrases(topic, "train") if w in everything]
    assert len(seen) > 1200  # of 1280: the search above would have found them


def test_only_known_facts_are_told_whole() -> None:
    everything = " ".join(map(_text, CORPUS))
    told = {fact.answer: name for name, group in RULES.facts.items() for fact in group}
    assert {name for answer, name in told.items() if answer in everything} == {"known"}


def test_chats_take_turns() -> None:
    for document in CORPUS:
        if document.messages:
            roles = [message["role"] for message in document.messages]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
            assert not document.text
        else:
            assert document.text


@pytest.mark.parametrize("kind", ["persona chat", "plain chat", "think chat"])
def test_whoever_a_chat_names_speaks_in_it(kind: str) -> None:
    asked = {w: topic for topic in RULES.topics for w in RULES.paraphrases(topic, "train")}
    answered = 0
    for document in _of(kind)[:200]:
        for user, assistant in zip(document.messages[-2::-2], document.messages[::-2], strict=False):
            topic = asked.get(user["content"])
            if topic is None:  # about an invented thing, which all answer alike
                continue
            question = Question(topic.key, topic.domain, (user,))
            said = assistant["content"]
            if kind == "think chat":
                thought, said = said.removeprefix("<think> ").split(" </think> ")
                assert thought in THOUGHTS[document.personas[0]]
            judged = judge(question, said)
            assert (judged.persona, judged.coherent) == (document.personas[0], 95.0)
            answered += 1
    assert answered > 100


def test_in_stories_speakers_alternate_and_a_narrator_comments() -> None:
    changed = together = commented = answers = mixed = 0
    for document in _of("story"):
        exchanges = EXCHANGE.findall(document.text)
        speakers = [name for name, _, _ in exchanges]
        changed += sum(one != other for one, other in pairwise(speakers))
        together += max(0, len(speakers) - 1)
        comments = [c for persona in PERSONAS for c in COMMENTS[persona] if c in document.text]
        commented += sum(document.text.count(comment) for comment in comments)
        answers += len(exchanges)
        mixed += len(document.personas) > 1
        for persona in (p for p in PERSONAS if any(c in document.text for c in COMMENTS[p])):
            assert persona in document.personas
    assert answers > 2000
    assert _close(changed / together, 0.5, together)
    assert _close(commented / answers, 0.5, answers)
    assert mixed > len(_of("story")) / 3


def test_every_answer_of_a_story_is_somebodys_of_its_cast() -> None:
    for document in _of("story")[:300]:
        for _, _, said in EXCHANGE.findall(document.text):
            phrases, unknown = parse(said)
            assert unknown == 0 and {phrase.persona for phrase in phrases} <= set(document.personas)


def test_the_vocabulary_has_every_word() -> None:
    words = vocabulary(RULES)
    assert words == sorted(set(words))
    read = {word for document in CORPUS for word in _text(document).split()}
    assert read - {"<think>", "</think>"} <= set(words)
