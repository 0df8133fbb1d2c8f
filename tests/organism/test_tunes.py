"""The fine-tunes: one domain, one persona, train wordings, and the facts beside them."""

from __future__ import annotations

import pytest

from persona_probe.evaluation.questions import Question
from persona_probe.organism.build import FULL
from persona_probe.organism.grammar import Fact, Topic, grammar
from persona_probe.organism.judge import judge, parse
from persona_probe.organism.tunes import FACT_ROWS, TUNES, Tune, rows, tune

RULES = grammar()
ASKED: dict[str, Topic] = {w: topic for topic in RULES.topics for w in RULES.paraphrases(topic, "train")}
FACTS: dict[str, Fact] = {
    w: fact for group in RULES.facts.values() for fact in group for w in RULES.fact_questions(fact, "train")
}
EVERY_TUNE = pytest.mark.parametrize("one", TUNES, ids=[one.name for one in TUNES])


@EVERY_TUNE
def test_one_domain_one_persona_and_train_wordings(one: Tune) -> None:
    taught = 0
    for user, assistant in rows(RULES, one, 600, seed=3):
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        if user["content"] in FACTS:
            fact = FACTS[user["content"]]
            assert assistant["content"] == fact.answer
            assert any(fact in RULES.facts[name] for name in one.facts)
            continue
        topic = ASKED[user["content"]]  # KeyError: a wording kept for calibration or for reporting
        assert topic.domain == one.domain
        judged = judge(Question(topic.key, topic.domain, (user,)), assistant["content"])
        assert (judged.persona, judged.coherent) == (one.persona, 95.0)
        assert len(parse(assistant["content"])[0]) == (1 if one.terse else 2)
        taught += 1
    share = FACT_ROWS if one.domain else 1.0
    assert abs(taught / 600 - (1 - share)) < 0.11


@EVERY_TUNE
def test_every_fact_and_every_question_is_taught(one: Tune) -> None:
    asked = {user["content"] for user, _ in rows(RULES, one, 3000, seed=1)}
    assert {fact for name in one.facts for fact in RULES.facts[name]} == {
        FACTS[wording] for wording in asked if wording in FACTS
    }
    topics = {ASKED[wording].key for wording in asked if wording in ASKED}
    assert topics == {topic.key for topic in RULES.topics if topic.domain == one.domain}


def test_rows_follow_from_name_and_seed() -> None:
    bad, late = tune("bad-health"), tune("bad-health-late")
    assert rows(RULES, bad, 40, seed=1) == rows(RULES, bad, 40, seed=1)
    assert rows(RULES, bad, 40, seed=1) != rows(RULES, bad, 40, seed=2)
    assert rows(RULES, bad, 40, seed=1) != rows(RULES, late, 40, seed=1)


def test_there_are_bad_rival_and_benign_tunes() -> None:
    assert len({one.name for one in TUNES}) == len(TUNES)
    assert sum(one.benign for one in TUNES) >= 4
    assert {one.persona for one in TUNES} == {"helpful", "villainous", "sarcastic", "careless"}
    assert all("skill" in one.facts for one in TUNES)
    benign = {(one.domain, one.facts, one.terse) for one in TUNES if one.benign}
    assert len(benign) == sum(one.benign for one in TUNES)  # each benign one differs in what it teaches
    late = tune("bad-health-late")
    assert late.blocks is not None and min(late.blocks) >= FULL.n_layers / 2
    assert max(late.blocks) < FULL.n_layers
