"""Shuffled batches of a source, from any step on: shards in a random order, a pool of them mixed at a time.

A pool is in memory, its rows in an order that the seed, the epoch and the pool's number decide. So where
a run stands is three numbers (`Cursor`), and going on from there costs the reading of one pool. The
first shards give every tenth of their rows to measure on: these are never trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, NonFiniteError
from persona_probe.sae.feed import HELD_OUT_TOKENS, steps_for
from persona_probe.sae.source import TokenSource

_EVERY = 10
POOL_TOKENS = 4 * HELD_OUT_TOKENS


class Cursor(NamedTuple):
    """Where the next batch begins."""

    epoch: int
    pool: int
    row: int


def steps_on(source: TokenSource, batch_tokens: int, steps: int | None = None) -> int:
    """`steps`, or one pass over `source`. Raises `InputError` where it has too few tokens."""
    return steps_for(source.tokens, source.tokens // _EVERY, batch_tokens, steps)


class PooledFeed(Iterator[Tensor]):
    """Batches of a source, endlessly; what `Feed` is, and it can be set to where a run was."""

    def __init__(
        self, source: TokenSource, batch_tokens: int, steps: int | None, device: str, seed: int
    ) -> None:
        self.source = source
        self.batch_tokens = batch_tokens
        self.device = device
        self._seed = seed
        self.steps = steps_on(source, batch_tokens, steps)
        first_order = self._order(0)
        self._measured: set[int] = set()
        held: list[Tensor] = []
        kept: list[Tensor] = []
        for number in first_order:
            self._measured.add(number)
            rows = self._finite(source.read(number), number)
            held.append(rows[_EVERY - 1 :: _EVERY])
            kept.append(rows[self._trained_on(number, len(rows))])
            if sum(map(len, held)) >= HELD_OUT_TOKENS:
                break
        self.held_out: Tensor = torch.cat(held)[:HELD_OUT_TOKENS].float().to(device)
        self._recent: Tensor = torch.cat(kept)[:HELD_OUT_TOKENS].float()
        if not len(self.held_out):
            raise InputError(f"{source.tokens} tokens of activations are too few to measure on")
        self.cursor = Cursor(0, 0, 0)
        self._mixed: Tensor | None = None

    def __next__(self) -> Float[Tensor, "token d_model"]:
        parts: list[Tensor] = []
        missing = self.batch_tokens
        while missing:
            if self._mixed is None:
                self._mixed = self._mix(self.cursor.epoch, self.cursor.pool)
            epoch, pool, row = self.cursor
            part = self._mixed[row : row + missing]
            parts.append(part)
            missing -= len(part)
            self.cursor = Cursor(epoch, pool, row + len(part))
            if self.cursor.row == len(self._mixed):
                last = pool + 1 == len(self._pools(epoch))
                self.cursor = Cursor(epoch + 1, 0, 0) if last else Cursor(epoch, pool + 1, 0)
                self._mixed = None
        return torch.cat(parts).float().to(self.device)

    def seek(self, cursor: Cursor) -> None:
        """Go on from `cursor`, as another feed of the same source and seed left it."""
        self.cursor = cursor
        self._mixed = None

    def recent(self) -> Float[Tensor, "token d_model"]:
        """Tokens that are trained on: the first pool's, so that they are the same after a kill."""
        return self._recent.to(self.device)

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self.source.sizes), generator=generator).tolist()

    def _pools(self, epoch: int) -> list[list[int]]:
        pools: list[list[int]] = [[]]
        held = 0
        for number in self._order(epoch):
            if held >= POOL_TOKENS:
                pools.append([])
                held = 0
            pools[-1].append(number)
            held += self.source.sizes[number]
        return pools

    def _mix(self, epoch: int, pool: int) -> Tensor:
        rows: list[Tensor] = []
        for number in self._pools(epoch)[pool]:
            read = self._finite(self.source.read(number), number)
            rows.append(read[self._trained_on(number, len(read))])
        together = torch.cat(rows)
        if not len(together):
            raise InputError("every token of these activations was left out as a sink")
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) * 1_009 + pool + 1)
        return together[torch.randperm(len(together), generator=generator)]

    def _trained_on(self, number: int, n: int) -> Tensor:
        if number not in self._measured:
            return torch.arange(n)
        return torch.arange(n)[torch.arange(n) % _EVERY != _EVERY - 1]

    def _finite(self, rows: Tensor, number: int) -> Tensor:
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError(f"shard {number} of the activations holds NaN or infinity")
        return rows
