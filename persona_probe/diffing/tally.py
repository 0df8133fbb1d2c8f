"""Shards put together: from sums over clusters to the table of latents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from scipy import special
from torch import Tensor

from persona_probe.diffing.cluster_sums import ClusterSums
from persona_probe.diffing.means import MeanSums, SiteMeans
from persona_probe.diffing.moments import Moments
from persona_probe.diffing.significance import Significance, against_benign
from persona_probe.diffing.statistics import Estimate
from persona_probe.sae.load import Dictionary
from persona_probe.sae.validity import FitSums, Limits, Validity

RARE = 3
"""A latent is tested when it fires in at least so many clusters, in any of the models."""


class Tally:
    """Base, tuned and benign models at the site of one dictionary, shard after shard."""

    def __init__(self, n_models: int, dictionary: Dictionary) -> None:
        self._dictionary = dictionary
        self._moments = Moments(n_models, dictionary.d_sae)
        self._means = MeanSums(n_models, dictionary.d_model)
        self._fit = FitSums(dictionary.d_model, dictionary.d_sae)

    def add(
        self,
        read: Sequence[ClusterSums],
        conversations: Int[Tensor, " cluster"],
        tokens: int,
        change: tuple[float, float] | None,
    ) -> None:
        """Take in one shard: every model's sums, base and tuned first, and how far the tuned model
        moved (None where it was not read together with the base).
        """
        self._moments.add(read, conversations)
        self._means.add(read, conversations, tokens)
        part = FitSums(self._dictionary.d_model, self._dictionary.d_sae)
        part.tokens = tokens
        for i, sums in enumerate(read[:2]):
            part.mean_sum[i], part.fired[i] = sums.token_sum, sums.fired
            part.square[i], part.error[i] = sums.squares
        part.change_error_sum += read[1].error_sum - read[0].error_sum
        part.change_square, part.change_error = change or (np.nan, np.nan)
        self._fit.merge(part)

    @property
    def site(self) -> str:
        """Where the dictionary reads."""
        return self._dictionary.site

    @property
    def n_benign(self) -> int:
        """Benign tunes among the models."""
        return self._moments.n_models - 2

    @property
    def conversations(self) -> int:
        """With a counted token."""
        return self._moments.conversations

    @property
    def clusters(self) -> int:
        """With a counted token."""
        return self._moments.clusters

    @property
    def tokens(self) -> int:
        """Counted."""
        return self._fit.tokens

    def means(self) -> SiteMeans:
        """Mean activations at the site."""
        return self._means.means(self.site)

    def validity(self, limits: Limits | None = None) -> Validity:
        """How the dictionary fits base and tuned."""
        return self._fit.validity(limits or Limits())

    def benign_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest shift of the benign tunes, per latent, 0 among them."""
        shifts = [self._moments.shift(model).mean for model in range(2, self._moments.n_models)]
        every = torch.stack([torch.zeros(self._moments.d_sae, dtype=torch.float64), *shifts])
        return every.amin(dim=0), every.amax(dim=0)

    def table(self, confidence: float) -> pl.DataFrame:
        """One row per latent, largest |delta| first; see `LatentDiff` for the columns."""
        moments = self._moments
        n_benign = moments.n_models - 2
        shift = moments.shift(1)
        base, tuned = moments.level(0).mean, moments.level(1).mean
        half = shift.error * t_quantile(moments.clusters, confidence)
        fires = moments.fires / moments.conversations
        missing = torch.full_like(base, torch.nan)
        columns: dict[str, Tensor | NDArray[np.float64]] = {
            "mean_base": base,
            "mean_tuned": tuned,
            "delta": shift.mean,
            "low": shift.mean - half,
            "high": shift.mean + half,
            "fires_base": fires[0],
            "fires_tuned": fires[1],
            "max_base": moments.maximum[0].double(),
            "max_tuned": moments.maximum[1].double(),
            "benign_mean": missing,
            "benign_max": missing,
            "did": missing,
            "z": torch.where(shift.mean == 0, 0.0, shift.mean / shift.error),
            "p_value": missing,
            "q_value": missing,
        }
        if n_benign:
            columns |= _beside_benign(moments, n_benign)
        data = {name: np.asarray(column) for name, column in columns.items()}
        frame = pl.DataFrame({"index": np.arange(moments.d_sae), **data}, nan_to_null=True)
        return frame.sort(pl.col("delta").abs(), descending=True, maintain_order=True)


def _beside_benign(moments: Moments, n_benign: int) -> dict[str, Tensor | NDArray[np.float64]]:
    """The columns that need benign tunes: models 2 to J + 1 of the moments."""
    shifts = torch.stack([moments.shift(2 + j).mean for j in range(n_benign)])
    largest = shifts.abs().argmax(dim=0, keepdim=True)
    columns: dict[str, Tensor | NDArray[np.float64]] = {
        "benign_mean": shifts.mean(dim=0),
        "benign_max": shifts.gather(0, largest)[0],
        "did": _against(moments).mean,
    }
    if n_benign < 2 or moments.clusters < 2:
        return columns
    found = beyond_benign(moments)
    return columns | {"z": found.z, "p_value": found.p, "q_value": found.q}


def beyond_benign(moments: Moments) -> Significance:
    """The tuned model's shift (model 1) tested against those of the benign tunes (2 and on).

    Raises `InputError` with fewer than two of them, or of clusters.
    """
    n_benign = moments.n_models - 2
    against = _against(moments)
    shifts = torch.stack([moments.shift(2 + j).mean for j in range(n_benign)])
    own = torch.stack([moments.level(i).error for i in range(moments.n_models)])
    return against_benign(
        against.mean.numpy(),
        against.error.numpy(),
        shifts.var(dim=0).numpy(),
        _interaction(moments, n_benign).numpy(),
        own.square().mean(dim=0).numpy(),
        n_benign=n_benign,
        n_clusters=moments.clusters,
        tested=(moments.spread >= min(RARE, moments.clusters)).numpy(),
    )


def _against(moments: Moments) -> Estimate:
    """Difference in differences: the tuned model's shift minus the benign ones' mean."""
    n_benign = moments.n_models - 2
    return moments.estimate([0.0, 1.0, *[-1 / n_benign] * n_benign])


def _interaction(moments: Moments, n_benign: int) -> Tensor:
    """Variance of one tune's shift that comes of which questions were asked.

    What all tunes share on a question cancels between them, so each tune's deviation from their
    mean is taken; the deviations of J tunes have J - 1 degrees of freedom."""
    errors = [
        moments.estimate([0.0, 0.0, *((i == j) - 1 / n_benign for i in range(n_benign))]).error
        for j in range(n_benign)
    ]
    return torch.stack(errors).square().sum(dim=0) / (n_benign - 1)


def t_quantile(clusters: int, confidence: float) -> float:
    """Of Student's t, two-sided; NaN with fewer than two clusters."""
    return float(special.stdtrit(clusters - 1, (1 + confidence) / 2)) if clusters > 1 else float("nan")
