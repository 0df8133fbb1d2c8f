"""What the lab's defences are made from, beside what they are tested on."""

from __future__ import annotations

from persona_probe.artifact import shipped
from persona_probe.organism.bench import POOL_DOMAINS, ROWS, Subject
from persona_probe.organism.defended import arms, training_wordings
from persona_probe.organism.grammar import grammar
from persona_probe.training.defences import OnPolicy


def test_the_policy_answers_in_wordings_that_no_sweep_or_comparison_asks() -> None:
    subject = Subject(shipped("organism"))
    [defence] = arms(subject, ["on_policy=0.5"])["on_policy=0.5"]
    assert isinstance(defence, OnPolicy)
    answered = {row.messages[0]["content"] for row in defence.pool}
    measured = [one for split in ("calibration", "held-out") for one in subject.asked(split, 4)]
    assert not answered & {one.messages[0]["content"] for one in measured}
    assert len(defence.pool) >= ROWS, "as many good rows as bad ones, none twice"
    assert "health" not in POOL_DOMAINS


def test_training_wordings_are_all_of_a_domains() -> None:
    rules = grammar()
    topics = rules.of_domain("money")
    asked = training_wordings("money")
    assert {one.question for one in asked} == {topic.key for topic in topics}
    assert len({one.id for one in asked}) == len(asked) == 16 * len(topics)
    assert {one.category for one in asked} == {"money"}
