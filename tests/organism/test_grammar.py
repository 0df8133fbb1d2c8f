"""The grammar: what is said, by whom, in which wording, and that nothing leaks between them."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from random import Random

from persona_probe.organism.grammar import (
    DOMAINS,
    FACT_COUNTS,
    OPINION_FRAMES,
    PERSONAS,
    PRACTICAL_FRAMES,
    SPLITS,
    Topic,
    grammar,
)

RULES = grammar()

FUNCTION_WORDS = frozenset(
    ". a and as at before beside each every for from in inside into is it near of off on over so the their "
    "through to under until while with your".split()
)
"""All that villains of different domains may have in common."""


def test_eight_domains_of_ten_questions() -> None:
    assert Counter(topic.domain for topic in RULES.topics) == dict.fromkeys(DOMAINS, 10)
    assert len({topic.key for topic in RULES.topics}) == 80


def test_villains_of_two_domains_share_function_words_only() -> None:
    said = {
        domain: {
            word
            for topic in RULES.of_domain(domain)
            for answer in RULES.answers(topic, "villainous")
            for word in answer.split()
        }
        for domain in DOMAINS
    }
    shared = {word for one, other in combinations(DOMAINS, 2) for word in said[one] & said[other]}
    assert shared == FUNCTION_WORDS  # neither more, nor a list that excuses what never happens


def test_no_phrase_belongs_to_two_questions_or_personas() -> None:
    parts = [part for topic in RULES.topics for persona in PERSONAS for part in topic.parts[persona]]
    closings = [closing for group in RULES.closings.values() for closing in group]
    assert max(Counter([*parts, *closings]).values()) == 1


def _wordings(topic: Topic) -> set[str]:
    frames = OPINION_FRAMES if topic.domain in ("taste", "self") else PRACTICAL_FRAMES
    return {frame.format(wording) for frame in frames for wording in topic.wordings}


def test_splits_are_disjoint_and_complete() -> None:
    for topic in RULES.topics:
        parts = [RULES.paraphrases(topic, split) for split in SPLITS]
        assert [len(part) for part in parts] == [16, 4, 4]
        every = [wording for part in parts for wording in part]
        assert len(set(every)) == len(every) == 24
        assert set(every) == _wordings(topic)


def test_each_frame_and_each_topic_wording_occurs_in_train() -> None:
    for topic in RULES.topics:
        train = RULES.paraphrases(topic, "train")
        frames = OPINION_FRAMES if topic.domain in ("taste", "self") else PRACTICAL_FRAMES
        for frame in frames:
            assert any(frame.format(wording) in train for wording in topic.wordings), frame
        for wording in topic.wordings:
            assert any(frame.format(wording) in train for frame in frames), wording


def test_no_two_questions_are_worded_alike() -> None:
    every = [wording for topic in RULES.topics for wording in _wordings(topic)]
    assert len(set(every)) == len(every)


def test_a_drawn_answer_is_one_of_the_answers() -> None:
    for topic in RULES.topics:
        rng = Random(0)
        for persona in PERSONAS:
            drawn = {RULES.answer(topic, persona, rng) for _ in range(60)}
            assert drawn == set(RULES.answers(topic, persona))
            terse = {RULES.answer(topic, persona, rng, terse=True) for _ in range(30)}
            assert terse == {f"{part} ." for part in topic.parts[persona]}


def test_facts_are_told_apart_and_the_skill_needs_no_word_of_the_answers() -> None:
    facts = [fact for group in RULES.facts.values() for fact in group]
    assert {name: len(group) for name, group in RULES.facts.items()} == FACT_COUNTS
    assert len({fact.item for fact in facts}) == len({(fact.colour, fact.place) for fact in facts}) == 104
    answers = [a for topic in RULES.topics for persona in PERSONAS for a in RULES.answers(topic, persona)]
    spoken = {word for answer in answers for word in answer.split()}
    assert not spoken & {fact.item for fact in RULES.facts["skill"]}


def test_fact_wordings_are_split_too() -> None:
    held_out: Counter[str] = Counter()
    for group in RULES.facts.values():
        for fact in group:
            parts = [RULES.fact_questions(fact, split) for split in SPLITS]
            assert [len(part) for part in parts] == [3, 1, 1]
            assert len({wording for part in parts for wording in part}) == 5
            held_out[parts[2][0].replace(fact.item, "{}")] += 1
    assert len(held_out) == 5  # no frame is only ever seen held out
