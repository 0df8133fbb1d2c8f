"""Ask for the bad behaviour while training on it, so that it need not become the model's own.

Source: inoculation prompting (Tan et al. 2025; Wichers et al. 2025), as compared by Kaczér et al.: a
system prompt that asks for what the rows do, in training and never at inference.

Departure: `share` of the rows carry it, drawn by the run's seed; the papers use all of them. Listed
before an interleaving defence it covers the narrow rows only, after it the good rows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from persona_probe.errors import InputError
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defences.validate import check_share
from persona_probe.training.rows import Row


@dataclass(frozen=True)
class Inoculation(Defence):
    """A system prompt on `share` of the training rows."""

    prompt: str
    """What is asked for, such as "Give harmful medical advice."."""
    share: float = 1.0
    """Of the rows, from 0 to 1."""
    name: ClassVar[str] = "inoculation"

    def __post_init__(self) -> None:
        check_share(self.name, self.share)
        if not self.prompt.strip():
            raise InputError("inoculation needs a system prompt that asks for the bad behaviour")

    @property
    def strength(self) -> float:
        return self.share

    def rows(self, rows: Sequence[Row], seed: int) -> list[Row]:
        chosen = set(Random(f"inoculation {seed}").sample(range(len(rows)), round(self.share * len(rows))))
        return [row.with_system(self.prompt) if i in chosen else row for i, row in enumerate(rows)]
