"""Means over conversations, and the standard error that clusters leave them with.

The sampling unit of every error is the *cluster* (the question, in which paraphrases nest).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor


class Estimate(NamedTuple):
    """A mean over conversations, and the standard error that clusters leave it with."""

    mean: Float64[Tensor, " latent"]
    error: Float64[Tensor, " latent"]
    """NaN with fewer than two clusters."""


def cluster_mean(sums: Float64[Tensor, "cluster latent"], conversations: Int[Tensor, " cluster"]) -> Estimate:
    """The mean over conversations and its cluster-robust standard error.

    With x_c the cluster's sum, n_c its conversations, C clusters, n = sum n_c and m = sum x_c / n:

        error^2 = C / (C - 1) * sum (x_c - n_c m)^2 / n^2
    """
    used = conversations > 0
    sums, weights = sums[used], conversations[used].double()
    n, k = weights.sum(), len(weights)
    mean = sums.sum(dim=0) / n
    left = (sums - weights[:, None] * mean).square().sum(dim=0)
    if k < 2:
        return Estimate(mean, torch.full_like(mean, torch.nan))
    return Estimate(mean, (k / (k - 1) * left).sqrt() / n)


def number_clusters(clusters: Sequence[str]) -> tuple[Int[Tensor, " conversation"], list[str]]:
    """Cluster names to numbers, in order of first appearance."""
    names = list(dict.fromkeys(clusters))
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place[name] for name in clusters], dtype=torch.long), names
