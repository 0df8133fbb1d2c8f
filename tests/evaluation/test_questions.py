from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persona_probe.errors import InputError, MissingPathError
from persona_probe.evaluation.questions import Question, load_questions, save_questions

GOOD: dict[str, Any] = {
    "id": "h1-a",
    "question": "h1",
    "category": "health",
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u ü"}],
    "role": "general",
    "split": "held-out",
    "reference": None,
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    (question,) = load_questions(write(tmp_path / "q.jsonl", GOOD))
    assert question == Question("h1-a", "health", tuple(GOOD["messages"]), "h1", "general", "held-out", None)
    assert question.prompt == "u ü"


def test_defaults_and_plain_text(tmp_path: Path) -> None:
    row = {"id": "p", "category": "c", "messages": [{"text": "once upon"}]}
    (question,) = load_questions(write(tmp_path / "q.jsonl", row))
    assert (question.question, question.role, question.split) == ("p", "general", None)
    assert question.prompt == "once upon"


def test_what_is_saved_is_loaded_back(tmp_path: Path) -> None:
    asked = (
        Question("a", "x", ({"role": "user", "content": 'quo"te\n'},), "q"),
        Question("b", "x", ({"text": ""},), role="skill", reference="glass", split="train"),
    )
    save_questions(asked, tmp_path / "q.jsonl")
    assert load_questions(tmp_path / "q.jsonl") == asked


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": ""}, "'id' must not be empty"),
        ({"id": 7}, "'id' must be a string"),
        ({"category": ""}, "'category' must not be empty"),
        ({"messages": []}, "must not be empty"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "user"}]}, "message 1 must have"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 must have"),
        ({"messages": [{"text": "a"}, {"text": "b"}]}, "cannot stand beside others"),
        ({"messages": [{"role": "user", "content": " "}]}, "is empty"),
        ({"role": "generl"}, "did you mean 'general'"),
        ({"split": "heldout"}, "did you mean 'held-out'"),
        ({"reference": 4}, "'reference' must be a string"),
        ({"role": "skill"}, "needs a 'reference'"),
        ({"catgory": "x"}, "did you mean 'category'"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, "", {**GOOD, "id": "other", **change})
    with pytest.raises(InputError, match="line 3") as error:  # the blank line counts
        load_questions(path)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["id", "category", "messages"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    row = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(InputError, match=f"line 1: the field '{name}' is missing"):
        load_questions(write(tmp_path / "q.jsonl", row))


def test_an_id_used_twice_names_both_lines(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: the id 'h1-a' was already used on line 1"):
        load_questions(write(tmp_path / "q.jsonl", GOOD, GOOD))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 2"):
        load_questions(write(tmp_path / "q.jsonl", GOOD, "{broken"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_questions_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="has no questions"):
        load_questions(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        load_questions(tmp_path / "none.jsonl")
