"""What a policy is asked while it learns from rewards: questions, or the prompts of training rows.

    {"id": "health-03", "category": "health", "messages": [...]}      a question (see `questions`)
    {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]} a training row; its answer is not read
    {"prompt": "..."}   {"prompt": [{"role": "user", ...}]}           TRL's form, as text or as a chat

Every other key of a row is a column, which a reward function is given by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

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
        return _asking(one)
    return _of(one.prompt, one.place or f"row {number}", _columns(one.source or {}))


_TURNS: tuple[set[str], ...] = ({"role", "content"}, {"text"})
_TAKEN = ("messages", "prompt", "completion")
_QUESTION: TypeAdapter[Question] = TypeAdapter(Question)
_FIELDS = tuple(one.name for one in fields(Question) if one.name != "messages")


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _TAKEN}


def _asking(question: Question) -> Prompt:
    """A question that stands in no row: what is known of it are its columns."""
    known = {name: getattr(question, name) for name in _FIELDS}
    return Prompt(question, {name: value for name, value in known.items() if value is not None})


def _read(source: StrPath) -> list[Prompt]:
    path = question_file(source)
    if path is None or path.suffix.lower() != ".jsonl" or not path.is_file():
        return [_asking(one) for one in load_questions(source)]
    place_of: dict[str, str] = {}
    found: list[Prompt] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        place = f"{path}, row {number}"
        found.append(_of_row(row, place))
        name = found[-1].question.id
        if name in place_of:
            raise InputError(
                f"{place}: the id {name!r} is that of {place_of[name]} too",
                fix="ids are unique; paraphrases share `question`, not `id`",
            )
        place_of[name] = place
    return found


def _of_row(row: Mapping[str, Any], place: str) -> Prompt:
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
    return _of(tuple(cast("list[Message]", turns)), place, _columns(row))


def _of(messages: tuple[Message, ...], place: str, columns: Mapping[str, Any]) -> Prompt:
    """A row with an id and a category is a question; any other is called by its place."""
    if {"id", "category"} <= columns.keys():
        given = {name: columns[name] for name in _FIELDS if columns.get(name) is not None}
    else:
        category = columns.get("category")
        named = category if isinstance(category, str) and category else CATEGORY
        last = messages[-1] if messages else {}
        asked = last.get("content", last.get("text", "")) or place
        given = {"id": place, "category": named, "question": asked}
    try:
        question = _QUESTION.validate_python({"id": "", "category": "", **given, "messages": messages})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{place}: {where and f'{where!r}: '}{said}", fix=_FORMS) from error
    if not question.messages[-1].get("content", "plain text may begin with nothing").strip():
        raise InputError(f"{place}: the last message, which is to be answered, is empty")
    return Prompt(question, columns)
