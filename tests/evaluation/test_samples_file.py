"""Answers made elsewhere: what is read, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persona_probe.artifact import write_jsonl
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.samples_file import answer_row, load_samples
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.model.language_model import LanguageModel

ASKED = [Question(f"q{i}", "x", ({"role": "user", "content": f"what of {i} ?"},)) for i in range(3)]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    write_jsonl(path / "m.jsonl", rows)
    return path / "m.jsonl"


def test_what_an_api_gives_is_enough(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        {"id": "q1", "answer": "one", "finish_reason": "length", "usage": {"total_tokens": 4}},
        {"id": "q0", "answer": "<think>hm</think> zero", "finish_reason": "stop"},
        {"id": "q1", "answer": "again", "finish_reason": "stop"},
        {"id": "q0", "answer": "nil", "thought": "so"},
        {"id": "q2", "answer": ""},
    )
    given = load_samples(file, ASKED)["m"]
    assert [(a.question.id, a.sample, a.text, a.thought, a.truncated) for a in given.answers] == [
        ("q0", 0, "zero", "hm", False),
        ("q0", 1, "nil", "so", False),
        ("q1", 0, "one", None, True),
        ("q1", 1, "again", None, False),
        ("q2", 0, "", None, False),
    ]
    assert given.ending_unknown == 2
    assert [a.text for a in given.of(ASKED[:2], 1).answers] == ["zero", "one"]
    assert len(given.of(ASKED).answers) == 5


def test_a_file_of_several_models(tmp_path: Path) -> None:
    rows = [{"id": q.id, "arm": arm, "answer": arm} for arm in ("a", "b") for q in ASKED]
    arms = load_samples(written(tmp_path, *rows), ASKED)
    assert {name: [a.text for a in given.answers] for name, given in arms.items()} == {
        "a": ["a"] * 3,
        "b": ["b"] * 3,
    }


def test_our_own_samples_are_read_back(lm: LanguageModel, questions: list[Question], tmp_path: Path) -> None:
    answers = sample(lm, questions, Sampling(max_new_tokens=8, samples=2))
    file = written(tmp_path, *({**answer_row(a), "outcome": "neutral", "aligned": 90} for a in answers))
    given = load_samples(file, questions)["m"]
    assert list(given.answers) == answers
    assert given.ending_unknown == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "x"}, "'id' is missing"),
        ({"id": "q0", "anwser": "x"}, "is 'anwser' meant?"),
        ({"id": "q0", "answer": None}, "'answer' must be text, not null"),
        ({"id": "q0", "answer": 3}, "'answer' must be text, not 3"),
        ({"id": "q9", "answer": "x"}, "'q9', which is not among the 3 questions"),
        ({"id": "q0", "answer": "x", "prompt": "other ?"}, "'other \\?', and the question 'q0'"),
        ({"id": "q0", "answer": "x", "sample": -1}, "'sample' must be a whole number"),
        ({"id": "q0", "answer": "x", "finish_reason": "error"}, "finish_reason 'error'"),
        ({"id": "q0", "answer": "x", "truncated": "no"}, "'truncated' must be true or false"),
    ],
)
def test_a_wrong_line_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = written(tmp_path, {"id": "q1", "answer": "fine"}, row)
    with pytest.raises(InputError, match=f"(?s)answer 2: .*{said}") as error:
        load_samples(file, ASKED)
        assert error.value.fix
    stale = "not among" in said or "other" in said
    assert isinstance(error.value, MismatchError) is stale


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        load_samples(tmp_path / "gone.jsonl", ASKED)
    with pytest.raises(InputError, match="has no answers"):
        load_samples(written(tmp_path), ASKED)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "q0", "answer": "x"}) + "\n{")
    with pytest.raises(InputError, match="line 2: not valid JSON"):
        load_samples(tmp_path / "bad.jsonl", ASKED)
    twice = [{"id": "q0", "answer": "x", "sample": 1}] * 2
    with pytest.raises(InputError, match="sample 1 of 'q0' is there twice"):
        load_samples(written(tmp_path, *twice), ASKED)


def test_answers_to_other_questions_do_not_pass(tmp_path: Path) -> None:
    given = load_samples(written(tmp_path, {"id": "q0", "answer": "x"}), ASKED)["m"]
    with pytest.raises(MismatchError, match="0 of 1 answers to 'q1', and too few to 1 more"):
        given.of(ASKED)
    with pytest.raises(MismatchError, match="1 of 2 answers to 'q0'"):
        given.of(ASKED[:1], 2)
