"""Prompts as defences dress them, and the good rows that are learnt beside the answers.

Defences choose rows, and reinforcement learning has none: so every answer that is going to be drawn
stands in as one. What comes back without being a stand-in is a good row; a stand-in whose prompt was
changed (inoculation) changes the prompt, for all the answers to that asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, cast

from persona_probe.errors import InputError
from persona_probe.model.chat import Message
from persona_probe.training.defences.defence import Defence
from persona_probe.training.prompts import Prompt
from persona_probe.training.rows import Row

_STAND_IN = "stand-in for answer"


def dressed(
    asked: Sequence[Prompt], samples: int, defences: Sequence[Defence], seed: int
) -> tuple[list[Prompt], list[Row]]:
    """The prompts in the order in which they are asked, and good rows in a random one, where each is going
    to be answered `samples` times.

    Raises `InputError` for a defence that edits activations in training or leaves prompts out, and for a
    pool that is too small.
    """
    active = [one for one in defences if one.strength]
    for one in active:
        if one.interventions():
            raise InputError(
                f"{one.name} edits activations during training, which reinforcement learning cannot do: "
                "the answers would be another policy's than the one that learns",
                fix="defend with kl, ldifs, latent_blocking, interleaving, inoculation or safe_lora",
            )
    rows = [_stand_in(prompt, place) for place, prompt in enumerate(asked) for _ in range(samples)]
    for one in active:
        rows = one.rows(rows, seed)
    good = [row for row in rows if _place(row) is None]
    if len(rows) - len(good) != len(asked) * samples:
        raise InputError("a defence left out prompts; one may only dress them or add rows")
    worn = {place: row.prompt for row in rows if (place := _place(row)) is not None}
    Random(f"good rows {seed}").shuffle(good)
    return [_wearing(prompt, worn[place]) for place, prompt in enumerate(asked)], good


def _wearing(prompt: Prompt, messages: tuple[Message, ...]) -> Prompt:
    if messages == prompt.question.messages:
        return prompt
    return replace(prompt, question=replace(prompt.question, messages=messages))


def _stand_in(prompt: Prompt, place: int) -> Row:
    messages, source = prompt.question.messages, {_STAND_IN: place}
    if "text" in messages[0]:
        return Row(cast("Any", messages), "answer", prompt.question.id, source)
    answered = (*messages, {"role": "assistant", "content": "answer"})
    return Row(cast("Any", answered), place=prompt.question.id, source=source)


def _place(row: Row) -> int | None:
    return None if row.source is None else row.source.get(_STAND_IN)
