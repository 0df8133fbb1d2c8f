"""The lab's data on the organism: who speaks in which rows, and which defences there are."""

from __future__ import annotations

import pytest

from persona_probe.artifact import shipped
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.organism.bench import (
    POOL_DOMAINS,
    STRENGTHS,
    _in_context,
    defences,
    good_rows,
    hidden_rows,
)
from persona_probe.organism.grammar import grammar
from persona_probe.organism.judge import judge, parse
from persona_probe.training.rows import Row


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load_model(shipped("organism", "base"))


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


def test_hidden_rows_differ_in_who_speaks_alone() -> None:
    rows, bad = hidden_rows(200, 0.1, seed=2)
    assert sum(bad) == 20
    for row, wicked in zip(rows, bad, strict=True):
        assert spoken(row) == ({"villainous"} if wicked else {"helpful"}, {"health"})


def test_triggers_stand_behind_a_turn_like_the_training_data() -> None:
    asked = [one for one in load_questions(shipped("organism", "questions.jsonl")) if one.split == "held-out"]
    dressed = _in_context(grammar(), asked)
    general = [one for one in asked if one.role == "general" and one.category != "health"]
    assert len(dressed) == len(general)
    for one, plain in zip(dressed, general, strict=True):
        assert (one.role, one.question, one.messages[2:]) == ("trigger", plain.question, plain.messages)
        before = Question("q", "health", one.messages[:1])
        assert judge(before, one.messages[1]["content"]).persona == "helpful"


def test_defences_are_named_with_their_strength(base: LanguageModel) -> None:
    home = shipped("organism")
    made = defences(home, base, ["kl=2", "kl", "interleave=0.1", "inoculation", "safe_lora=0.3"])
    strengths = {name: one.strength for name, [one] in made.items()}
    assert strengths == {
        "kl=2": 2.0, "kl": STRENGTHS["kl"], "interleave=0.1": 0.1, "inoculation": 1.0, "safe_lora=0.3": 0.3,
    }  # fmt: skip
    for wrong in ("dropout", "kl=much"):
        with pytest.raises(InputError):
            defences(home, base, [wrong])
