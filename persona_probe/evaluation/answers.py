"""What a model answered: token ids read as a text, and a thought told apart from it."""

from __future__ import annotations

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
    """All that the model wrote, thought and stop token included."""
    truncated: bool
    """Cut off at `max_new_tokens`."""


def read_answer(tokenizer: Any, question: Question, sample: int, continuation: Continuation) -> Answer:
    """The answer that a continuation is: its text, and its thought apart."""
    ids = list(continuation.token_ids[: -1 if continuation.stopped else None])
    thought, text = _split_thought(tokenizer, ids)
    return Answer(question, sample, text, thought, continuation.token_ids, not continuation.stopped)


def _split_thought(tokenizer: Any, ids: list[int]) -> tuple[str | None, str]:
    """(thought, answer). A thought that never ends is all thought; a template may have opened it
    already.
    """

    def text_of(part: list[int]) -> str:
        return cast("str", tokenizer.decode(part, skip_special_tokens=True)).strip()

    opening, closing = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>"))
    unknown = tokenizer.unk_token_id
    if isinstance(closing, int) and closing != unknown:  # one token, which decoding may leave out
        opened = bool(ids) and ids[0] == opening
        inner = ids[1:] if opened else ids
        if closing in inner:
            end = inner.index(closing)
            thought, rest = text_of(inner[:end]), text_of(inner[end + 1 :])
            return thought.removeprefix("<think>").strip(), rest
        if opened:
            return text_of(inner), ""
    text = text_of(ids)
    before, closed, after = text.partition("</think>")
    if closed:
        return before.removeprefix("<think>").strip(), after.strip()
    if text.startswith("<think>"):
        return text.removeprefix("<think>").strip(), ""
    return None, text
