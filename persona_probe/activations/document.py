"""What a row of a data file must hold to be a document: a text, or a chat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from persona_probe.activations.rows import Unreadable
from persona_probe.errors import InputError
from persona_probe.model.chat_template import Message


@dataclass(frozen=True)
class Document:
    """One chat or text, and where it stands."""

    row: int
    messages: tuple[Message, ...]
    """A chat, or one `{"text": ...}`."""


@dataclass(frozen=True)
class Problem:
    """A row that was left out, and why."""

    row: int
    place: str
    why: str

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"


def messages_of(value: Any, field: str | None = None) -> tuple[Message, ...]:
    """The chat in a row, or one `{"text": ...}`; from the column `field`, else `messages` or `text`.

    Raises `InputError` saying what is wrong with the row.
    """
    if isinstance(value, Unreadable):
        raise InputError(value.why)
    if isinstance(value, Mapping):
        record = cast("Mapping[str, Any]", value)
        names = (field,) if field is not None else ("messages", "text")
        name = next((name for name in names if record.get(name) is not None), None)
        if name is None:
            wanted = " or ".join(repr(name) for name in names)
            raise InputError(f"no field {wanted}; there is {', '.join(map(repr, record)) or 'nothing'}")
        value = record[name]
    if isinstance(value, str):
        if not value:
            raise InputError("the text is empty")
        return ({"text": value},)
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"expected a text or a list of messages, got {type(value).__name__}")
    return tuple(_message(message) for message in cast("list[Any]", value))


def _message(message: Any) -> Message:
    if isinstance(message, Mapping):
        fields = cast("Mapping[str, Any]", message)
        # a Parquet column gives every message the fields that any of them has
        given = {name: fields[name] for name in ("role", "content", "text") if fields.get(name) is not None}
        if set(given) in ({"role", "content"}, {"text"}) and all(isinstance(v, str) for v in given.values()):
            return given
    raise InputError(f"a message must have 'role' and 'content', both strings: {str(message)[:80]}")
