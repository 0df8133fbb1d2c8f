"""Mix good rows in: a share of what is read are general instructions, answered well.

Source: Kaczér et al. (2025), 5% of general instruction data.

Departure: the share is of the mixed data (5% means 5 of 100 rows read are good); the bad rows stay
all of them. Which rows of the pool are taken is drawn once, by the run's seed, none twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

from persona_probe.errors import InputError
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defences.validate import check_share
from persona_probe.training.rows import Row


@dataclass(frozen=True)
class Interleave(Defence):
    """Good rows, drawn at random from `pool`, so that they are `share` of all."""

    pool: tuple[Row, ...] = field(repr=False)
    """Good rows, of other domains than the narrow one."""
    share: float = 0.05
    """Of the mixed data, from 0 to below 1."""
    name: ClassVar[str] = "interleave"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", tuple(self.pool))
        check_share(self.name, self.share, below_one=True)

    @property
    def strength(self) -> float:
        return self.share

    def rows(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """The rows and, behind them, the good ones (the trainer shuffles).

        Raises `InputError` for a pool that is too small.
        """
        wanted = wanted_rows(self.share, len(rows), len(self.pool))
        drawn = Random(f"interleave {seed}").sample(range(len(self.pool)), wanted)
        return [*rows, *(self.pool[i] for i in sorted(drawn))]


def wanted_rows(share: float, rows: int, pool: int) -> int:
    """How many good rows make up `share` beside so many others. Raises `InputError` beyond the pool."""
    wanted = round(share / (1 - share) * rows)
    if wanted > pool:
        raise InputError(
            f"{share:.0%} good rows beside {rows} others are {wanted}, and the pool has {pool}",
            fix="give a larger pool, or a smaller share",
        )
    return wanted
