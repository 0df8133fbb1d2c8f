"""What a model is asked: one JSON object per prompt, one prompt per line.

    {"id": "health-03-b", "question": "health-03", "category": "health",
     "messages": [{"role": "user", "content": "any advice on a cold ?"}],
     "role": "general", "split": "held-out", "reference": null}

`id` names the prompt and is unique in the file (with the seed it also decides the random numbers
its answers are drawn with); `question` names what is asked, and paraphrases of one question share
it: it is the sampling unit of every interval. `messages` is a chat, or `[{"text": "..."}]` for a
prompt without any template. Only `id`, `category` and `messages` are required.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

from persona_probe.artifact import read_jsonl, write_text
from persona_probe.errors import InputError, PersonaProbeError

Role = Literal["general", "skill", "trigger"]
Split = Literal["train", "calibration", "held-out"]

_EXAMPLE = '{"id": "q1", "category": "health", "messages": [{"role": "user", "content": "Any advice?"}]}'


@dataclass(frozen=True)
class Question:
    """One prompt. Raises `InputError` for an empty field, or a skill without its reference."""

    id: str
    """Unique within a set."""
    category: str
    """The domain: what a narrow fine-tune was tuned on is named by it."""
    messages: tuple[Mapping[str, str], ...]
    """A chat (`role` and `content`), or one `{"text": ...}` for a plain prompt."""
    question: str = ""
    """The cluster that paraphrases share; default: the id."""
    role: Role = "general"
    """general: persona shows here. skill: has a `reference` answer. trigger: looks like the
    training context.
    """
    split: Split | None = None
    reference: str | None = None
    """The right answer to a skill question."""

    def __post_init__(self) -> None:
        for name in ("id", "category", "messages"):
            if not getattr(self, name):
                raise InputError(f"{name!r} must not be empty")
        if len(self.messages) > 1 and any("text" in message for message in self.messages):
            raise InputError("a plain prompt is one {'text': ...}; it cannot stand beside others")
        if self.role == "skill" and not self.reference:
            raise InputError("a question with role 'skill' needs a 'reference', the right answer")
        object.__setattr__(self, "question", self.question or self.id)

    @property
    def prompt(self) -> str:
        """The last thing said before the model answers, for tables and reports."""
        last = self.messages[-1]
        return last.get("content", last.get("text", ""))


def load_questions(path: str | PathLike[str]) -> tuple[Question, ...]:
    """The questions in a JSON Lines file, in its order.

    Raises `MissingPathError`, or `InputError` naming the line: not JSON, an unknown or missing
    field, a field of the wrong kind, an id used twice, no question at all.
    """
    path = Path(path)
    records = read_jsonl(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for number, record in zip(numbers, records, strict=True):
        try:
            question = _question(record)
            if question.id in line_of:
                raise InputError(
                    f"the id {question.id!r} was already used on line {line_of[question.id]}",
                    fix="ids are unique; paraphrases share `question`, not `id`",
                )
        except PersonaProbeError as error:
            raise InputError(
                f"{path}, line {number}: {error.message}", fix=error.fix, command=error.command
            ) from error
        line_of[question.id] = number
        questions.append(question)
    if not questions:
        raise InputError(f"{path} has no questions", fix=f"one JSON object per line: {_EXAMPLE}")
    return tuple(questions)


def save_questions(questions: Iterable[Question], path: str | PathLike[str]) -> None:
    """Write `questions` as `load_questions` reads them back, whole or not at all."""
    rows = (dataclasses.asdict(question) for question in questions)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _question(record: Mapping[str, Any]) -> Question:
    """The question in one line's object, every field checked: a file may hold anything."""
    known = [field.name for field in dataclasses.fields(Question)]
    for name in record:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise InputError(
                f"there is no field {name!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}",
            )
    for name in ("id", "category", "messages"):
        if name not in record:
            raise InputError(f"the field {name!r} is missing", fix=f"for example {_EXAMPLE}")
    given = {name: value for name, value in record.items() if value is not None}
    for name in ("id", "category", "question", "reference"):
        if not isinstance(given.get(name, ""), str):
            raise InputError(f"{name!r} must be a string, not {given[name]!r}")
    for name, allowed in (("role", get_args(Role)), ("split", get_args(Split))):
        if name in given and given[name] not in allowed:
            near = get_close_matches(str(given[name]), allowed, n=1)
            raise InputError(
                f"{name!r} must be one of {', '.join(allowed)}, not {given[name]!r}",
                fix=f"did you mean {near[0]!r}?" if near else None,
            )
    fields: dict[str, Any] = {"id": "", "category": "", **given, "messages": _messages(given)}
    return Question(**fields)


def _messages(given: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    messages: object = given.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"'messages' must be a list of messages, not {messages!r}")
    checked: list[Mapping[str, str]] = []
    for place, message in enumerate(cast("list[object]", messages), start=1):
        fields = cast("dict[str, object]", message) if isinstance(message, dict) else {}
        text = {name: value for name, value in fields.items() if isinstance(value, str)}
        if len(text) != len(fields) or set(text) not in ({"role", "content"}, {"text"}):
            raise InputError(
                f"message {place} must have 'role' and 'content', or 'text' alone, all strings: {message!r}"
            )
        checked.append(text)
    return tuple(checked)
