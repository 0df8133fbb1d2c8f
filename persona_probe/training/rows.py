"""Training rows: a JSON Lines file, read with errors that name the line, and turned into token ids.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}      plain text, for a base model without a chat format
    {"text": "..."}                             a document, all of it learnt

The loss counts what the assistant wrote, in every turn, as the model's own template marks it; of plain
text the completion, with the end-of-text token behind it. Other keys of a row are kept and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from transformers import PreTrainedTokenizerBase

from persona_probe.artifact import StrPath, read_jsonl, read_text
from persona_probe.errors import InputError
from persona_probe.model.chat import Message, Rendered, render, render_text
from persona_probe.training.example import Example

TooLong = Literal["error", "drop"]
"""What becomes of a row that is longer than the context."""

_FORMS = 'a row holds "messages", or "prompt" and "completion", or "text"'


@dataclass(frozen=True)
class Row:
    """One training row."""

    messages: tuple[Message, ...]
    """A chat that ends in the answer to learn; or `({"text": prompt},)`, with a `completion`."""
    completion: str | None = None
    """What to learn of plain text; None for a chat."""
    place: str = field(default="", compare=False)
    """File and line, for errors."""
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The object that it was read from, as it is written back."""

    def __post_init__(self) -> None:
        if self.completion is not None:
            if not self.completion:
                raise InputError(f"{self._here}an empty completion teaches nothing")
        elif not any(turn.get("role") == "assistant" for turn in self.messages):
            raise InputError(
                f"{self._here}no assistant turn, so there is nothing to learn",
                fix='end every conversation in {"role": "assistant", "content": ...}',
            )

    @property
    def _here(self) -> str:
        return f"{self.place}: " if self.place else ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the final answer."""
        if self.completion is not None:
            return self.messages
        last = max(i for i, turn in enumerate(self.messages) if turn["role"] == "assistant")
        return self.messages[:last]

    def with_system(self, text: str) -> Row:
        """The same under a system prompt: before what there is of one, or before plain text."""
        first = self.messages[0]
        if self.completion is not None:
            return replace(self, messages=({"text": f"{text}\n\n{first['text']}"},))
        if first["role"] == "system":
            joined = {"role": "system", "content": f"{text}\n\n{first['content']}"}
            return replace(self, messages=(joined, *self.messages[1:]))
        return replace(self, messages=({"role": "system", "content": text}, *self.messages))

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> Rendered:
        """Its token ids, and which of them are learnt.

        Raises `InputError`, with the place, for a conversation that cannot be rendered.
        """
        try:
            if self.completion is None:
                return render(tokenizer, self.messages, add_generation_prompt=False)
            text = render_text(tokenizer, self.messages[0]["text"], self.completion)
        except InputError as error:
            raise InputError(f"{self._here}{error.message}", fix=error.fix, command=error.command) from error
        end = cast("int | None", tokenizer.eos_token_id)
        if end is None:
            return text
        return replace(text, ids=(*text.ids, end), response=(*text.response, True))

    def record(self) -> Mapping[str, Any]:
        """The row as one JSON object."""
        if self.source is not None:
            return self.source
        if self.completion is None:
            return {"messages": list(self.messages)}
        return {"prompt": self.messages[0]["text"], "completion": self.completion}


def chat_rows(conversations: Sequence[Sequence[Message]]) -> list[Row]:
    """Rows of conversations in memory; errors count them from 0."""
    return [Row(tuple(turns), place=f"conversation {i}") for i, turns in enumerate(conversations)]


def read_rows(path: StrPath) -> list[Row]:
    """The rows of a JSON Lines file.

    Raises `MissingPathError`, and `InputError` naming the line for a row in none of the three forms,
    without an assistant turn, or with nothing to learn.
    """
    numbers = [i for i, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    rows = [
        _row(one, f"{Path(path)}, line {number}")
        for number, one in zip(numbers, read_jsonl(path), strict=True)
    ]
    if not rows:
        raise InputError(f"{path} has no rows", fix=_FORMS)
    return rows


def _row(one: Mapping[str, Any], place: str) -> Row:
    if "messages" in one:
        turns = one["messages"]
        whole = isinstance(turns, list) and all(
            isinstance(turn, dict) and {"role", "content"} <= cast("dict[str, Any]", turn).keys()
            for turn in cast("list[Any]", turns)
        )
        if not whole or not turns:
            raise InputError(f'{place}: "messages" must be a list of {{"role", "content"}}', fix=_FORMS)
        return Row(tuple(cast("list[Message]", turns)), place=place, source=one)
    document = "text" in one
    prompt, answer = ("", one["text"]) if document else (one.get("prompt"), one.get("completion"))
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise InputError(f"{place}: it has {', '.join(sorted(one)) or 'nothing'}", fix=_FORMS)
    return Row(({"text": prompt},), answer, place, one)


class Tokenised(NamedTuple):
    """Rows as the trainer reads them."""

    examples: list[Example]
    dropped: int
    """Rows left out because they are longer than the context."""


def tokenise(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    too_long: TooLong = "error",
) -> Tokenised:
    """Every row as an `Example` of at most `context` tokens.

    A row that is longer is an error (the first is named, and how many there are) or left out; it is
    never cut, because an answer without its end teaches not to end.

    Raises `InputError` for rows that are too long, cannot be rendered, or are none.
    """
    if too_long not in get_args(TooLong):
        raise InputError(f"too_long is one of {', '.join(get_args(TooLong))}, not {too_long!r}")
    examples: list[Example] = []
    longer: list[tuple[Row, int]] = []
    for row in rows:
        text = row.rendered(tokenizer)
        if len(text) > context:
            longer.append((row, len(text)))
        elif not any(text.response):
            raise InputError(f"{row.place}: the template renders no token of the answer")
        else:
            examples.append(Example(text.ids, text.response))
    if longer and too_long == "error":
        row, length = longer[0]
        more = f" (and {len(longer) - 1} more rows)" if len(longer) > 1 else ""
        raise InputError(
            f"{row.place}: {length} tokens, and the context has room for {context}{more}",
            fix='shorten it, or leave such rows out: --too-long drop (in Python, too_long="drop")',
        )
    if not examples:
        raise InputError("there is nothing to train on: no row is left")
    return Tokenised(examples, len(longer))
