"""Moments over clusters, latent by latent: what an estimate and its error are made of.

For each latent and cluster let x be the vector (base, tuned - base, benign 1 - base, ...). Kept are the
sums over clusters of x, of n_c x and of x x', with n_c the cluster's conversations: as much memory as
there are latents, however many tokens are read. Any estimate is a contrast w.x of them, with K
clusters and n conversations

    mean = sum w.x / n        error^2 = K / (K - 1) * sum (w.x - n_c mean)^2 / n^2

which is the cluster-robust standard error. Differences are taken cluster by cluster before they are
squared, so that two models that read the same have differences, and errors of them, of exactly 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from persona_probe.diffing.cluster_sums import ClusterSums
from persona_probe.diffing.statistics import Estimate
from persona_probe.errors import InputError, MismatchError


class Moments:
    """Of a base and the models compared with it, over any number of shards."""

    def __init__(self, n_models: int, d_sae: int) -> None:
        zeros = torch.zeros(n_models, d_sae, dtype=torch.float64)
        self.d_sae = d_sae
        self.n_models = n_models
        self.clusters = 0
        """Clusters with a counted token."""
        self.conversations = 0
        self.fires: Float64[Tensor, "model d_sae"] = zeros.clone()
        """Sum of the shares of tokens at which the latent fires."""
        self.spread: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.long)
        """Clusters in which the latent fires in any of the models."""
        self.maximum: Float[Tensor, "model d_sae"] = torch.zeros(n_models, d_sae)
        self._sum = zeros.clone()
        self._weighted = zeros.clone()
        self._square: Float64[Tensor, "model model d_sae"] = zeros.new_zeros(n_models, n_models, d_sae)
        self._sizes = 0
        """Sum of the squares of n_c."""

    def add(self, read: Sequence[ClusterSums], conversations: Int[Tensor, " cluster"]) -> None:
        """Take in one shard, base first; shards that are added in the same order give the same bits.

        A cluster must lie within one shard. `conversations` counts those of each cluster.
        """
        if len(read) != self.n_models or any(len(sums.maximum) != self.d_sae for sums in read):
            raise MismatchError(
                f"moments of {self.n_models} models and {self.d_sae} latents cannot take in sums of "
                f"{len(read)} models and {[len(sums.maximum) for sums in read]} latents"
            )
        self.clusters += int((conversations > 0).sum())
        self.conversations += int(conversations.sum())
        self._sizes += int(conversations.square().sum())
        keys = [sums.cluster * self.d_sae + sums.latent for sums in read]
        found, place = torch.cat(keys).unique(return_inverse=True)
        latent = found % max(1, self.d_sae)
        weight = conversations[found // max(1, self.d_sae)].double()
        x = torch.zeros(self.n_models, len(found), dtype=torch.float64)
        for i, (sums, own) in enumerate(zip(read, place.split([len(key) for key in keys]), strict=True)):
            x[i][own] = sums.activation
            self.fires[i].index_add_(0, sums.latent, sums.fires)
            self.maximum[i] = torch.maximum(self.maximum[i], sums.maximum)
        x[1:] -= x[0]
        self.spread += latent.bincount(minlength=self.d_sae)
        for i in range(self.n_models):
            self._sum[i].index_add_(0, latent, x[i])
            self._weighted[i].index_add_(0, latent, x[i] * weight)
            for j in range(i + 1):
                self._square[i, j].index_add_(0, latent, x[i] * x[j])
                self._square[j, i] = self._square[i, j]

    def estimate(self, contrast: Sequence[float]) -> Estimate:
        """Mean and error of `contrast . (base, model 1 - base, model 2 - base, ...)`, per latent.

        Raises `InputError` before anything was added.
        """
        if not self.conversations:
            raise InputError(
                "no conversation with a counted token was read", fix="choose another mask, or other data"
            )
        w = torch.tensor(contrast, dtype=torch.float64)
        used = [i for i, share in enumerate(contrast) if share]  # the others' rounding stays out
        n, k = self.conversations, self.clusters
        mean = sum((w[i] * self._sum[i] for i in used), torch.zeros(self.d_sae, dtype=torch.float64)) / n
        square, weighted = torch.zeros_like(mean), torch.zeros_like(mean)
        for i in used:
            weighted += w[i] * self._weighted[i]
            for j in used:
                square += w[i] * w[j] * self._square[i, j]
        left = (square - 2 * mean * weighted + mean.square() * self._sizes).clamp(min=0)
        if k < 2:
            return Estimate(mean, torch.full_like(mean, torch.nan))
        return Estimate(mean, (k / (k - 1) * left).sqrt() / n)

    def shift(self, model: int) -> Estimate:
        """How far `model` (1 is the tuned one) lies from the base."""
        return self.estimate([float(i == model) for i in range(self.n_models)])

    def level(self, model: int) -> Estimate:
        """The mean activation in `model` itself (0 is the base)."""
        return self.estimate([float(i in (0, model)) for i in range(self.n_models)])
