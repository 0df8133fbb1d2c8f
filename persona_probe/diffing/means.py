"""Mean activations of several models on the same conversations: all that the direction path needs,
with no SAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing.cluster_sums import ClusterSums
from persona_probe.diffing.shards import cut, read_shard, shard_tokens
from persona_probe.diffing.statistics import cluster_mean
from persona_probe.errors import InputError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair

GROUPS = 1024
"""Clusters beyond so many share their places, at random as far as their order is: an error from the
sums of groups of clusters is as right as one from clusters (Wolter 2007, random groups), and the
memory stays the same however many there are.
"""


@dataclass(frozen=True, eq=False)
class SiteMeans:
    """Mean activation at one site, per model (in the order in which they were given; the first is
    the base).

    Over counted tokens, then over conversations.
    """

    site: str
    mean: Float64[Tensor, "model d_model"]
    cluster_sums: Float64[Tensor, "model cluster d_model"]
    """Sums of the conversations' means by cluster (or group of clusters): what errors of projections
    are made of.
    """
    conversations: Int[Tensor, " cluster"]
    """Conversations of each cluster."""
    residual_rms: Float64[Tensor, " model"]
    """Root mean square of the entries of an activation: norm / sqrt(d_model), over all counted
    tokens.
    """
    tokens: int

    def shift(self, model: int = 1) -> Float64[Tensor, " d_model"]:
        """Mean activation of `model` minus the base's."""
        return self.mean[model] - self.mean[0]

    def projected_shift(self, unit: Float64[Tensor, " d_model"], model: int = 1) -> tuple[float, float]:
        """The shift of `model` along `unit`, and its cluster-robust standard error (NaN with one
        cluster).
        """
        sums = (self.cluster_sums[model] - self.cluster_sums[0]) @ unit.double()
        found = cluster_mean(sums[:, None], self.conversations)
        return float(found.mean), float(found.error)


class MeanSums:
    """Cluster sums of several models at one site, shard after shard."""

    def __init__(self, n_models: int, d_model: int) -> None:
        self.activation: Float64[Tensor, "model group d_model"] = torch.zeros(
            n_models, GROUPS, d_model, dtype=torch.float64
        )
        self.square: Float64[Tensor, " model"] = torch.zeros(n_models, dtype=torch.float64)
        self.conversations: Int[Tensor, " group"] = torch.zeros(GROUPS, dtype=torch.long)
        self.tokens = 0
        self._clusters = 0

    def add(self, read: Sequence[ClusterSums], conversations: Int[Tensor, " cluster"], tokens: int) -> None:
        """Take in one shard of every model; `conversations` counts those of each of its clusters."""
        group = (self._clusters + torch.arange(len(conversations))) % GROUPS
        self._clusters += len(conversations)
        self.tokens += tokens
        self.conversations.index_add_(0, group, conversations)
        for i, sums in enumerate(read):
            self.activation[i].index_add_(0, group, sums.mean)
            self.square[i] += sums.squares[0]

    def means(self, site: str) -> SiteMeans:
        """The means that they come to."""
        n = min(self._clusters, GROUPS)
        activation = self.activation[:, :n]
        return SiteMeans(
            site=site,
            mean=activation.sum(dim=1) / int(self.conversations.sum()),
            cluster_sums=activation,
            conversations=self.conversations[:n],
            residual_rms=(self.square / (self.tokens * activation.shape[-1])).sqrt(),
            tokens=self.tokens,
        )


def mean_difference(
    models: Sequence[LanguageModel],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    sites: Sequence[str] = (),
    mask: TokenMask | None = None,
    *,
    batch_tokens: int | None = None,
) -> dict[str, SiteMeans]:
    """Mean activations of `models` (base first) at `sites`, in one pass over `rendered`; by site.

    `clusters` names each conversation's question (each its own, by default); `mask` counts the last
    prompt token and the answer by default.

    Raises `MismatchError` (models that do not belong together), `UnknownSiteError`, `InputError`
    (nothing to read), `NonFiniteError`."""
    for model in models[1:]:
        ModelPair(models[0], model)
    if not sites:
        raise InputError("no site to read", fix="name one, such as blocks.3.hook_resid_post")
    sums = {site: MeanSums(len(models), models[0].d_model) for site in sites}  # each site once
    for shard in cut(rendered, clusters, shard_tokens(models[0].device, batch_tokens)):
        read = read_shard(
            models, list(sums), shard.conversations(rendered), shard, mask, batch_tokens=batch_tokens
        )
        for site, its in sums.items():
            its.add(read.of(site), read.conversations, read.tokens)
    return {site: its.means(site) for site, its in sums.items()}
