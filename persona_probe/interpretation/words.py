"""Tokens put together to words, each with the activation of its strongest token."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from persona_probe.figures.highlight import Token
from persona_probe.interpretation.examples import Reading
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel


class Word(NamedTuple):
    """A run of tokens without a space in it."""

    text: str
    """Lower case, without what stands before and after it."""
    value: float | None
    """The latent's activation, the largest over the word's tokens; None where none of them counted."""


def tokens_of(lm: LanguageModel, conversation: Rendered, reading: Reading) -> list[Token]:
    """A document's tokens, all of them, with a latent's activations.

    A character that several tokens share stands where its last token is.
    """
    values: dict[int, float] = dict(
        zip(reading.positions.tolist(), reading.values.astype(np.float64).tolist(), strict=True)
    )
    told: list[Token] = []
    waiting: list[int] = []
    for place, token in enumerate(conversation.ids):
        waiting.append(token)
        text = cast("str", lm.tokenizer.decode(waiting))
        whole = not text.endswith("�")
        told.append(Token(text if whole else "", values.get(place), token in lm.special_ids))
        if whole:
            waiting.clear()
    return told


def words_of(tokens: list[Token]) -> list[Word]:
    """The words of a document, special tokens aside; a special token ends a word."""
    words: list[Word] = []
    text, value = "", None

    def end() -> None:
        nonlocal text, value
        if text.strip():
            words.append(Word(text.strip().lower(), value))
        text, value = "", None

    for token in tokens:
        if token.special or token.text[:1].isspace():
            end()
        if token.special:
            continue
        text += token.text
        if token.value is not None:
            value = token.value if value is None else max(value, token.value)
        if token.text[-1:].isspace():
            end()
    end()
    return words
