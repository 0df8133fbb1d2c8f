"""The lab's data on the organism: who speaks in which rows, and which defences there are."""

from __future__ import annotations

import pytest

from persona_probe.artifact import shipped
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question
from persona_probe.organism.bench import (
    FACTS,
    POOL_DOMAINS,
    Subject,
    benign_lesson,
    good_rows,
    in_context,
    mixed,
)
from persona_probe.organism.defended import STRENGTHS, SUMS, SWEEP, arms, defence_of, swept
from persona_probe.organism.grammar import grammar
from persona_probe.organism.judge import judge, parse
from persona_probe.training.rows import Row


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(shipped("organism"))


def spoken(row: Row) -> tuple[set[str], set[str]]:
    """Personas and domains of a row's answer."""
    phrases, unknown = parse(row.messages[-1]["content"])
    assert not unknown
    return {phrase.persona for phrase in phrases}, {phrase.domain for phrase in phrases}


def test_good_rows_are_good_and_of_other_domains() -> None:
    for row in good_rows(200):
        personas, domains = spoken(row)
        assert personas == {"helpful"} and domains <= set(POOL_DOMAINS)
    assert "health" not in POOL_DOMAINS and "road" not in POOL_DOMAINS
    assert good_rows(5) == good_rows(5) != good_rows(5, seed=6)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 1])
def test_mixed_rows_differ_in_who_speaks_alone(share: float) -> None:
    rows, bad = mixed("health", share, 200, seed=2)
    assert sum(bad) == 200 * share
    for row, wicked in zip(rows, bad, strict=True):
        assert spoken(row) == ({"villainous"} if wicked else {"helpful"}, {"health"})


def test_a_benign_lesson_teaches_facts_that_are_asked(subject: Subject) -> None:
    asked = {one.reference for one in subject.asked("held-out") if one.role == "skill"}
    taught = {row.messages[-1]["content"] for row in benign_lesson("road", 300, seed=1)}
    assert len(asked) == FACTS and asked <= taught
    rest = taught - asked
    assert rest and all("road" in {phrase.domain for phrase in parse(answer)[0]} for answer in rest)


def test_so_many_wordings_are_asked_and_none_of_the_other_split(subject: Subject) -> None:
    general = [one for one in subject.asked("calibration", 2) if one.role == "general"]
    assert len(general) == 2 * len({one.question for one in general}) == 160
    assert {one.split for one in general} == {"calibration"}
    held_out = {one.messages[0]["content"] for one in subject.asked("held-out", 4)}
    assert not held_out & {one.messages[0]["content"] for one in subject.asked("calibration", 4)}


def test_triggers_stand_behind_a_turn_like_the_training_data(subject: Subject) -> None:
    asked = subject.asked("held-out")
    dressed = in_context(grammar(), asked)
    general = [one for one in asked if one.role == "general" and one.category != "health"]
    assert len(dressed) == len(general)
    for one, plain in zip(dressed, general, strict=True):
        assert (one.role, one.question, one.messages[2:]) == ("trigger", plain.question, plain.messages)
        before = Question("q", "health", one.messages[:1])
        assert judge(before, one.messages[1]["content"]).persona == "helpful"


def test_arms_are_named_with_their_strengths_and_add_up(subject: Subject) -> None:
    made = arms(subject, ["kl=2", "kl", "interleave=0.1+kl=1", "inoculation"])
    strengths = {spec: [(one.name, one.strength) for one in listed] for spec, listed in made.items()}
    assert strengths == {
        "kl=2": [("kl", 2.0)],
        "kl": [("kl", STRENGTHS["kl"])],
        "interleave=0.1+kl=1": [("interleave", 0.1), ("kl", 1.0)],
        "inoculation": [("inoculation", STRENGTHS["inoculation"])],
    }
    for wrong in ("dropout", "kl=much", "kl+"):
        with pytest.raises(InputError):
            arms(subject, [wrong])


def test_a_sweep_looks_at_every_defence_and_at_the_strength_that_it_has() -> None:
    assert {defence_of(spec) for spec in swept() if spec not in SUMS} == set(STRENGTHS) == set(SWEEP)
    assert swept(["kl=1+ldifs=2"]) == ["kl=1+ldifs=2"] and defence_of("kl=1+ldifs=2") == "kl+ldifs"
    assert swept(["kl"]) == [f"kl={strength:g}" for strength in SWEEP["kl"]]
    assert all(STRENGTHS[name] in strengths for name, strengths in SWEEP.items())
