"""Prompts to be answered, without anything to judge them by: a string, or a line of a file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, cast

from persona_probe.artifact import read_jsonl
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question

_FIX = 'a line is {"prompt": "..."}, {"messages": [...]} or {"text": "..."}, with an "id" if you like'


def prompt(text: str, *, system: str | None = None, chat: bool = True) -> Question:
    """One prompt. Its id, which decides the random numbers of its answers, is its text.

    `chat=False` is plain text to be continued, for a model without a chat template. Raises
    `InputError` for an empty one.
    """
    if not text.strip():
        raise InputError("a prompt must not be empty")
    if not chat:
        return Question(text, "prompt", ({"text": text if system is None else f"{system}\n\n{text}"},))
    before = () if system is None else ({"role": "system", "content": system},)
    return Question(text, "prompt", (*before, {"role": "user", "content": text}))


def load_prompts(path: str | PathLike[str], *, chat: bool = True) -> tuple[Question, ...]:
    """The prompts in a JSON Lines file; a questions file is one too.

    Raises `MissingPathError`, or `InputError` naming the line that holds no prompt.
    """
    lines = [_prompt(f"{path}, entry {n}", row, chat) for n, row in enumerate(read_jsonl(path), start=1)]
    if not lines:
        raise InputError(f"{path} has no prompts", fix=_FIX)
    return tuple(lines)


def _prompt(where: str, row: Mapping[str, Any], chat: bool) -> Question:
    try:
        match row:
            case {"prompt": str(text)}:
                asked = prompt(text, chat=chat)
            case {"text": str(text)}:
                asked = prompt(text, chat=False)
            case {"messages": [*messages]} if messages:
                asked = _conversation(cast("list[object]", messages))
            case _:
                raise InputError("no prompt in it")
    except InputError as error:
        raise InputError(f"{where}: {error.message}", fix=_FIX) from error
    named = row.get("id")
    return Question(str(named), "prompt", asked.messages) if named not in (None, "") else asked


def _conversation(messages: list[object]) -> Question:
    checked: list[dict[str, str]] = []
    for message in messages:
        match message:
            case {"role": str(role), "content": str(content), **rest} if not rest:
                checked.append({"role": role, "content": content})
            case {"text": str(text), **rest} if not rest and len(messages) == 1:
                return prompt(text, chat=False)
            case _:
                raise InputError(f"a message has 'role' and 'content', got {message!r}")
    return Question(checked[-1]["content"] or "-", "prompt", tuple(checked))
