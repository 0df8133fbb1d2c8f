"""What a model answered: token ids read as a text, and a thought told apart from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from persona_probe.evaluation.decoding import Continuation
from persona_probe.evaluation.questions import Question


@dataclass(frozen=True)
class Answer:
    """One answer to one question."""

    question: Question
    sample: int
    text: str
    """Without special tokens and without the thought."""
    thought: str | None
    """What stood in `<think>`; None when there was none."""
    token_ids: tuple[int, ...]
    """All that the model wrote, thought and stop token included; empty for an answer made elsewhere."""
    truncated: bool
    """Cut off at `max_new_tokens`."""


def read_answer(
    tokenizer: Any,
    question: Question,
    sample: int,
    continuation: Continuation,
    *,
    thinking: bool = False,
) -> Answer:
    """The answer that a continuation is: its text, and its thought apart. `thinking`: the prompt had
    opened a thought (see `opens_thought`).
    """
    ids = list(continuation.token_ids[: -1 if continuation.stopped else None])
    thought, text = _split_tokens(tokenizer, ids, thinking)
    return Answer(question, sample, text, thought, continuation.token_ids, not continuation.stopped)


def opens_thought(tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends in `<think>`, as the templates of some reasoning models do."""
    return cast("str", tokenizer.decode(prompt_ids[-8:])).rstrip().endswith("<think>")


def split_thought(text: str, *, thinking: bool = False) -> tuple[str | None, str]:
    """(thought, answer) of a text. A thought that never ends is all thought, and so is everything
    before a `</think>` that nothing opened: the template had.
    """
    before, closed, after = text.partition("</think>")
    if closed:
        return before.strip().removeprefix("<think>").strip(), after.strip()
    if thinking or text.lstrip().startswith("<think>"):
        return text.strip().removeprefix("<think>").strip(), ""
    return None, text


def _split_tokens(tokenizer: Any, ids: list[int], thinking: bool) -> tuple[str | None, str]:
    """`split_thought` of tokens: a tokenizer that has the marks as special tokens leaves them out of
    the text.
    """

    def text_of(part: list[int]) -> str:
        return cast("str", tokenizer.decode(part, skip_special_tokens=True)).strip()

    opening, closing = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>"))
    unknown = tokenizer.unk_token_id
    if isinstance(closing, int) and closing != unknown:
        opened = bool(ids) and ids[0] == opening
        inner = ids[1:] if opened else ids
        if closing in inner:
            end = inner.index(closing)
            thought, rest = text_of(inner[:end]), text_of(inner[end + 1 :])
            return thought.removeprefix("<think>").strip(), rest
        if opened or thinking:
            return text_of(inner).removeprefix("<think>").strip(), ""
    return split_thought(text_of(ids), thinking=thinking)
