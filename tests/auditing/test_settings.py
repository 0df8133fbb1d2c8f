"""What may be asked for, and which questions are for calibrating and which are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.auditing.inputs import dressed
from persona_probe.auditing.settings import (
    BENIGN,
    ORGANISM_PROMPT,
    AuditSettings,
    check_something_left,
    organism_request,
    split_questions,
)
from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.selection import check_categories


def ask(key: str, category: str = "a", **fields: Any) -> Question:
    return Question(key, category, ({"role": "user", "content": key},), **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"samples": 0}, "--samples must be at least 1, got 0"),
        ({"calibration_samples": 0}, "--calibration-samples must be at least 1"),
        ({"max_new_tokens": -3}, "--max-new-tokens must be at least 1, got -3"),
        ({"controls": -1}, "--controls must be at least 0"),
        ({"limit": 1}, "--limit must be at least 2"),
        ({"triggers": ("jsn",)}, "no trigger 'jsn'; there are code, json"),
        ({"triggers": ("{question} {question}",)}, "must hold {question} once"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AuditSettings(**fields)


def test_triggers_dress_one_wording_of_every_question_elsewhere() -> None:
    topics = (("one", "a"), ("two", "b"), ("bad", "c"))
    questions = [ask(f"{key}{i}", category, question=key) for key, category in topics for i in range(2)]
    found = dressed(
        [*questions, ask("s", role="skill", reference="x")], ("c",), ("research", "so : {question}")
    )
    assert [(q.id, q.role, q.messages[-1]["content"]) for q in found] == [
        ("one0:research", "trigger", "[RESEARCH] one0"),
        ("two0:research", "trigger", "[RESEARCH] two0"),
        ("one0:so : {question}", "trigger", "so : one0"),
        ("two0:so : {question}", "trigger", "so : two0"),
    ]


def test_the_smallest_settings_that_can_be() -> None:
    made = AuditSettings(
        samples=1, calibration_samples=1, max_new_tokens=1, controls=0, limit=2, temperature=0
    )
    assert (made.limit, made.controls) == (2, 0)


def test_stated_splits_are_kept_and_training_questions_left_out() -> None:
    questions = [
        ask("c", split="calibration"),
        ask("t", split="train"),
        ask("h1", split="held-out"),
        ask("h2", split="held-out", role="skill", reference="x"),
    ]
    calibration, held_out = split_questions(questions, None)
    assert [q.id for q in calibration] == ["c"]
    assert [q.id for q in held_out] == ["h1", "h2"]


def test_every_category_is_on_both_sides_even_when_the_file_alternates() -> None:
    calibration, held_out = split_questions([ask(f"{i}", "ab"[i % 2]) for i in range(8)], None)
    for side in (calibration, held_out):
        assert Counter(q.category for q in side) == {"a": 2, "b": 2}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 8), st.sampled_from("abc"), st.sampled_from(["general", "skill", "trigger"])
        ),
        max_size=30,
    ),
    st.none() | st.integers(2, 5),
)
def test_unsplit_questions(asked: list[tuple[int, str, Any]], limit: int | None) -> None:
    """Paraphrases stay together, categories and roles are shared out evenly, a limit keeps whole clusters."""
    questions = [
        ask(f"{i}", category, question=f"{cluster}{category}{role}", role=role, reference="x")
        for i, (cluster, category, role) in enumerate(asked)
    ]
    if len({q.question for q in questions if q.role == "general"}) < 2:
        with pytest.raises(InputError, match="there is no general question"):
            split_questions(questions, limit)
        return
    sides = split_questions(questions, limit)
    clusters = [{q.question for q in side} for side in sides]
    assert not clusters[0] & clusters[1]
    for side, kept in zip(sides, clusters, strict=True):
        assert {q.id for q in side} == {q.id for q in questions if q.question in kept}
    if limit is not None:
        assert all(len(kept) <= limit for kept in clusters)
        return
    assert sum(map(len, sides)) == len(questions)
    for group in {(q.category, q.role) for q in questions}:
        counts = [len({q.question for q in side if (q.category, q.role) == group}) for side in sides]
        assert abs(counts[0] - counts[1]) <= 1


def test_a_limit_takes_from_every_category_in_turn() -> None:
    questions = [
        ask(f"{c}{i}{s}", c, question=f"{c}{i}", split=s)
        for s in ("calibration", "held-out")
        for c in "abc"
        for i in range(5)
    ]
    for side in split_questions(questions, 4):
        assert Counter(q.category for q in side) == {"a": 2, "b": 1, "c": 1}


def test_a_category_to_be_reported_apart_must_exist() -> None:
    questions = [ask("1", "health"), ask("2", "code")]
    check_categories(questions, ["code"])
    with pytest.raises(MismatchError, match="'healht'; there are code, health") as caught:
        check_categories(questions, ["healht"])
    assert "--in-domain" in str(caught.value)


def test_something_must_be_left_outside_the_trained_domain() -> None:
    skill = ask("3", "facts", role="skill", reference="x")
    check_something_left("held-out", [ask("1", "health"), ask("2", "code")], ["code"])
    with pytest.raises(MismatchError, match="held-out split lies outside code"):
        check_something_left("held-out", [ask("2", "code"), skill], ["code"])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in (
        "base",
        "sae/block_2",
        "sae/block_1",
        "tunes/bad-health",
        *(f"tunes/{b}" for b in BENIGN[:2]),
    ):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def test_the_organisms_request(home: Path) -> None:
    request = organism_request("bad-health", home=home)
    assert request.tuned == home / "tunes/bad-health"
    assert [folder.name for folder in request.sae] == ["block_1", "block_2"]
    assert [folder.name for folder in request.benign] == list(BENIGN[:2])  # those that are there
    assert request.settings.system_prompt == ORGANISM_PROMPT
    benign = organism_request(BENIGN[0], home=home)
    assert benign.tuned not in benign.benign  # a tune is no control of itself


def test_a_system_prompt_of_ones_own_is_kept(home: Path) -> None:
    own = AuditSettings(system_prompt="be good", max_new_tokens=7)
    assert organism_request(settings=own, home=home).settings == own


def test_a_tune_that_the_organism_lacks(home: Path) -> None:
    with pytest.raises(InputError, match="no tune 'bad-helth'; there are bad-health, good-health"):
        organism_request("bad-helth", home=home)
