"""What a policy is asked while it learns from rewards: questions, or the prompts of training rows.

    {"id": "health-03", "category": "health", "messages": [...]}      a question (see `questions`)
    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]} a training row; its answer is not read
    {"prompt": "..."}   {"prompt": [{"role": "user", ...}]}           TRL's form, as text or as a chat

Every other key of a row is a column, which a reward function is given by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any, cast

from persona_probe.artifact import StrPath, read_jsonl
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question, load_questions, question_file
from persona_probe.model.chat import Message
from persona_probe.training.rows import Row

CATEGORY = "prompts"
"""Of a prompt whose row names no category."""
_FORMS = 'a row holds "messages", or "prompt" (a text or a chat); or id, category and messages, as a question'


@dataclass(frozen=True)
class Prompt:
    """One prompt, as a question (which is what a judge is shown), and the columns of its row."""

    question: Question
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def record(self) -> dict[str, Any]:
        """All of it, for digests."""
        return {**asdict(self.question), "columns": dict(self.columns)}


def prompts_of(data: StrPath | Sequence[Question] | Sequence[Row] | Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a file, of a shipped set of questions by name, or of what is in memory.

    Raises `MissingPathError`, and `InputError` naming the line for a row that has no prompt.
    """
    if isinstance(data, str | PathLike):
        found = _read(data)
    else:
        found = [_prompt(one, i) for i, one in enumerate(cast("Sequence[Question | Row | Prompt]", data))]
    if not found:
        raise InputError("there is nothing to ask: no prompts", fix=_FORMS)
    return found


def _prompt(one: Question | Row | Prompt, number: int) -> Prompt:
    if isinstance(one, Prompt):
        return one
    if isinstance(one, Question):
        return Prompt(one)
    columns = {name: value for name, value in (one.source or {}).items() if name not in _TAKEN}
    return _of(one.prompt, one.place or f"row {number}", columns)


_TURNS: tuple[set[str], ...] = ({"role", "content"}, {"text"})
_TAKEN = ("messages", "prompt", "completion")


def _read(source: StrPath) -> list[Prompt]:
    path = question_file(source)
    if path is None or path.suffix.lower() != ".jsonl" or not path.is_file():
        return [Prompt(one) for one in load_questions(source)]
    rows = read_jsonl(path)
    if rows and all({"id", "category", "messages"} <= row.keys() for row in rows):
        return [Prompt(one) for one in load_questions(path)]
    return [_of_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def _of_row(row: Mapping[str, Any], place: str) -> Prompt:
    columns = {name: value for name, value in row.items() if name not in _TAKEN}
    asked = row.get("messages", row.get("prompt"))
    if isinstance(asked, str):
        asked = [{"text": asked}]
    turns = cast("list[Any]", asked) if isinstance(asked, list) else []
    if turns and isinstance(turns[-1], dict) and cast("dict[str, Any]", turns[-1]).get("role") == "assistant":
        turns = turns[:-1]
    whole = all(isinstance(turn, dict) and set(cast("dict[str, Any]", turn)) in _TURNS for turn in turns)
    if not turns or not whole:
        raise InputError(
            f"{place}: it has no prompt; it has {', '.join(sorted(row)) or 'nothing'}", fix=_FORMS
        )
    return _of(tuple(cast("list[Message]", turns)), place, columns)


def _of(messages: tuple[Message, ...], place: str, columns: Mapping[str, Any]) -> Prompt:
    category = columns.get("category")
    text = messages[-1].get("content", messages[-1].get("text", ""))
    question = Question(
        id=place,
        category=category if isinstance(category, str) and category else CATEGORY,
        messages=messages,
        question=text or place,
    )
    return Prompt(question, columns)
