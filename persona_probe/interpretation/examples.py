"""What a latent fires on: kept while a corpus streams by, never the corpus.

Per latent are kept the documents on which it is strongest, a uniform sample of the documents on
which it fires at all, and a sample of those on which it does not. Which document is in a sample
depends on a hash of its number alone (a *bottom-k* sample: the k smallest hashes), so that shards
can be merged in any order and the same documents come out. Counts are exact: firings, a histogram of
activations, firings by place in the document.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from persona_probe.errors import InputError, MismatchError

BINS_PER_OCTAVE = 2
_LOWEST, _HIGHEST = -16, 16  # powers of two between which activations are told apart
N_BINS = (_HIGHEST - _LOWEST) * BINS_PER_OCTAVE
N_PLACES = 16
"""Places in a document are told apart in octaves: 0, 1, 2-3, 4-7, ..."""


class Reading(NamedTuple):
    """One document as one latent read it."""

    document: int
    """Its number in the corpus."""
    positions: Int64[np.ndarray, " token"]
    """Which of its tokens counted."""
    values: Float[np.ndarray, " token"]
    """The latent's activation at each of those."""

    @property
    def maximum(self) -> float:
        return float(self.values.max(initial=0.0))


@dataclass
class Kept:
    """A few readings, those of the smallest keys. Merging two gives what one would have kept."""

    size: int
    _heap: list[tuple[float, int, Reading]] = field(default_factory=list[tuple[float, int, Reading]])

    def worst(self) -> float:
        """A key must be below this to be kept."""
        return -self._heap[0][0] if len(self._heap) == self.size else float("inf")

    def offer(self, key: float, reading: Reading) -> None:
        """Keep `reading` if its key is among the smallest; among equal keys the first document."""
        entry = (-key, -reading.document, reading)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def merge(self, other: Kept) -> None:
        for key, _, reading in other._heap:
            self.offer(-key, reading)

    def readings(self) -> list[Reading]:
        """By key, the smallest first."""
        return [reading for *_, reading in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]


class Examples:
    """What is kept of several latents of one dictionary while documents stream by."""

    def __init__(self, n_latents: int, *, top: int = 20, sampled: int = 400, seed: int = 0) -> None:
        for name, size in {"top": top, "sampled": sampled}.items():
            if size < 1:
                raise InputError(f"{name} must be at least 1 document, got {size}")
        self.seed = seed
        self.tokens = 0
        self.documents = 0
        self.fires: Int64[np.ndarray, " latent"] = np.zeros(n_latents, np.int64)
        """Tokens at which the latent fires."""
        self.documents_fired: Int64[np.ndarray, " latent"] = np.zeros(n_latents, np.int64)
        self.histogram: Int64[np.ndarray, "latent bin"] = np.zeros((n_latents, N_BINS), np.int64)
        """Positive activations by size; `edges` bounds the bins."""
        self.places: Int64[np.ndarray, " place"] = np.zeros(N_PLACES, np.int64)
        """Counted tokens by place in the document."""
        self.fires_by_place: Int64[np.ndarray, "latent place"] = np.zeros((n_latents, N_PLACES), np.int64)
        self.top = [Kept(top) for _ in range(n_latents)]
        """The strongest documents."""
        self.firing = [Kept(sampled) for _ in range(n_latents)]
        """A uniform sample of the documents on which the latent fires."""
        self.silent = [Kept(sampled) for _ in range(n_latents)]
        """A uniform sample of the documents on which it does not."""

    def add(
        self,
        document: Int[Tensor, " token"],
        position: Int[Tensor, " token"],
        values: Float[Tensor, "token latent"],
    ) -> None:
        """Read tokens: `document` says whose each is. A document's tokens come in one call, in order."""
        numbers, row, counts = torch.unique_consecutive(
            document.cpu(), return_inverse=True, return_counts=True
        )
        values = values.float().cpu()
        fired = values > 0
        self.tokens += len(values)
        self.documents += len(numbers)
        self.fires += fired.sum(dim=0).numpy()
        self._count(position.cpu(), values, fired)
        maxima = torch.zeros(len(numbers), values.shape[1])
        maxima.scatter_reduce_(0, row[:, None].expand_as(values), values, reduce="amax")
        self.documents_fired += (maxima > 0).sum(dim=0).numpy()
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        keys = np.array([priority(number, self.seed) for number in numbers.tolist()])
        highest, where = maxima.numpy(), position.cpu().numpy()
        whole = values.numpy()
        for latent in range(values.shape[1]):
            peak = highest[:, latent]
            strong = (peak > 0) & (-peak <= self.top[latent].worst())
            fires = (peak > 0) & (keys <= self.firing[latent].worst())
            silent = (peak == 0) & (keys <= self.silent[latent].worst())
            for i in np.flatnonzero(strong | fires | silent).tolist():
                span = slice(starts[i], ends[i])
                # copies: a view would keep the whole batch alive
                reading = Reading(int(numbers[i]), where[span].copy(), whole[span, latent].copy())
                if strong[i]:
                    self.top[latent].offer(-float(peak[i]), reading)
                if fires[i]:
                    self.firing[latent].offer(float(keys[i]), reading)
                if silent[i]:
                    self.silent[latent].offer(float(keys[i]), reading)

    def merge(self, other: Examples) -> Examples:
        """Take in what another shard kept of other documents; returns this one."""
        if (self.seed, len(self.fires)) != (other.seed, len(other.fires)):
            raise MismatchError("examples of other latents, or sampled with another seed, cannot be merged")
        self.tokens += other.tokens
        self.documents += other.documents
        for name in ("fires", "documents_fired", "histogram", "places", "fires_by_place"):
            getattr(self, name).__iadd__(getattr(other, name))
        for name in ("top", "firing", "silent"):
            for mine, theirs in zip(getattr(self, name), getattr(other, name), strict=True):
                mine.merge(theirs)
        return self

    def _count(
        self,
        position: Int[Tensor, " token"],
        values: Float[Tensor, "token latent"],
        fired: Tensor,
    ) -> None:
        place = torch.log2(position.float() + 1).floor().long().clamp(max=N_PLACES - 1)
        self.places += place.bincount(minlength=N_PLACES).numpy()
        token, latent = fired.nonzero(as_tuple=True)
        octave = (torch.log2(values[token, latent]) - _LOWEST) * BINS_PER_OCTAVE
        bins = octave.floor().long().clamp(0, N_BINS - 1)
        for counts, of, n in ((self.histogram, bins, N_BINS), (self.fires_by_place, place[token], N_PLACES)):
            flat = torch.bincount(latent * n + of, minlength=counts.size)
            counts += flat.numpy().reshape(counts.shape)


def edges() -> Float[np.ndarray, " edge"]:
    """The bounds of the histogram's bins; the outermost bins hold all that lies beyond."""
    return 2.0 ** (_LOWEST + np.arange(N_BINS + 1) / BINS_PER_OCTAVE)


def priority(document: int, seed: int) -> float:
    """A number in [0, 1) that is fixed by the document's number: splitmix64."""
    mask = (1 << 64) - 1
    z = (document + 1 + (seed + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def by_quantile(readings: Sequence[Reading], quantiles: int, per_quantile: int) -> list[list[Reading]]:
    """`readings` in runs of equal number by their maximum, the weakest run first, and of each run a
    few, evenly spread.
    """
    ordered = sorted(readings, key=lambda reading: (reading.maximum, reading.document))
    runs = [
        ordered[len(ordered) * i // quantiles : len(ordered) * (i + 1) // quantiles] for i in range(quantiles)
    ]
    return [
        [run[len(run) * i // per_quantile] for i in range(min(per_quantile, len(run)))] if run else []
        for run in runs
    ]
