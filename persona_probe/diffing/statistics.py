"""Sums that shards can add up: per conversation and latent, in fp64.

A conversation's figure is the mean over its counted tokens; a model's is the mean over
conversations; the sampling unit of every standard error is the *cluster* (the question, in which
paraphrases nest). What is kept per conversation are its own sums, and they are only added together
at the end, in the order of the conversations: however the conversations were split and merged, the
same bits come out. Two models that read the same activations have the same sums, so that every
difference between them is exactly 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from persona_probe.errors import InputError, MismatchError
from persona_probe.sae.encode import SparseCodes

BLOCK = 8192
"""Latents whose cluster sums are dense in memory at once."""


class _Document(NamedTuple):
    """One model on one conversation."""

    latent: Int[Tensor, " fired"]
    """Sorted."""
    total: Float64[Tensor, " fired"]
    fires: Int[Tensor, " fired"]


@dataclass(frozen=True)
class Block:
    """Cluster sums of a run of latents: what all estimates are made of."""

    start: int
    activation: Float64[Tensor, "model cluster latent"]
    """Sum over the cluster's conversations of the mean activation over tokens."""
    fires: Float64[Tensor, "model cluster latent"]
    """The same of the share of tokens at which the latent fires."""


class LatentSums:
    """Per conversation, model and latent: summed activation and firings. Add, merge, then read
    `blocks`.
    """

    def __init__(self, n_models: int, d_sae: int) -> None:
        self.n_models = n_models
        self.d_sae = d_sae
        self.tokens: dict[int, int] = {}
        """Counted tokens of each conversation."""
        self.maximum: Float[Tensor, "model d_sae"] = torch.zeros(n_models, d_sae)
        """Largest activation at any counted token."""
        self._documents: dict[int, tuple[_Document, ...]] = {}

    def add(self, document: Int[Tensor, " token"], codes: Sequence[SparseCodes]) -> None:
        """Count tokens: `document` says whose each is, `codes` has one entry per model, on the same
        tokens.

        A conversation's tokens must come in one call, in order. Raises `MismatchError` when one
        comes twice."""
        if len(codes) != self.n_models:
            raise InputError(f"expected the codes of {self.n_models} models, got {len(codes)}")
        names, row, counts = document.cpu().unique(return_inverse=True, return_counts=True)
        per_model = [self._split(code, row, len(names)) for code in codes]
        for i, name in enumerate(names.tolist()):
            self._claim(name)
            self.tokens[name] = int(counts[i])
            self._documents[name] = tuple(parts[i] for parts in per_model)
        for i, code in enumerate(codes):
            self.maximum[i].scatter_reduce_(
                0, code.latent_index.cpu(), code.value.float().cpu(), reduce="amax"
            )

    def merge(self, other: LatentSums) -> LatentSums:
        """Add the conversations of another shard; returns this one.

        Raises `MismatchError` when the shards share a conversation, or are of other models or
        dictionaries."""
        if (self.n_models, self.d_sae) != (other.n_models, other.d_sae):
            raise MismatchError(
                f"sums over {self.n_models} models and {self.d_sae} latents cannot take in sums "
                f"over {other.n_models} and {other.d_sae}"
            )
        for name, parts in other._documents.items():
            self._claim(name)
            self._documents[name] = parts
            self.tokens[name] = other.tokens[name]
        self.maximum = torch.maximum(self.maximum, other.maximum)
        return self

    def blocks(self, clusters: Int[Tensor, " conversation"], n: int) -> Iterator[Block]:
        """Dense cluster sums, a run of latents after another; `clusters` numbers each
        conversation's, 0 to n - 1.
        """
        documents = sorted(self._documents)
        weight = torch.tensor([1 / self.tokens[name] for name in documents], dtype=torch.float64)
        entries = [self._entries(model, documents) for model in range(self.n_models)]
        for start in range(0, self.d_sae, BLOCK):
            width = min(BLOCK, self.d_sae - start)
            activation = torch.zeros(self.n_models, n * width, dtype=torch.float64)
            fires = torch.zeros_like(activation)
            for model, (part, place) in enumerate(entries):
                here = (part.latent >= start) & (part.latent < start + width)
                cluster = clusters[documents][place[here]]
                key = cluster * width + part.latent[here] - start
                share = weight[place[here]]
                # one entry after another, in the order of the conversations: always the same bits
                activation[model].index_add_(0, key, part.total[here] * share)
                fires[model].index_add_(0, key, part.fires[here].double() * share)
            shape = (self.n_models, n, width)
            yield Block(start, activation.view(shape), fires.view(shape))

    def _entries(self, model: int, documents: Sequence[int]) -> tuple[_Document, Int[Tensor, " fired"]]:
        """All of one model's entries behind one another, and whose each is (by place)."""
        parts = [self._documents[name][model] for name in documents]
        sizes = torch.tensor([len(part.latent) for part in parts], dtype=torch.long)
        joined = _Document(*(torch.cat(column) for column in zip(*parts, strict=True)))
        return joined, torch.arange(len(parts)).repeat_interleave(sizes)

    def _claim(self, name: int) -> None:
        if name in self._documents:
            raise MismatchError(f"conversation {name} was counted twice")

    def _split(self, codes: SparseCodes, row: Tensor, n: int) -> list[_Document]:
        key = row[codes.token_index.cpu()] * self.d_sae + codes.latent_index.cpu()
        found, place = key.unique(return_inverse=True)
        total = torch.zeros(len(found), dtype=torch.float64)
        total.index_add_(0, place, codes.value.double().cpu())
        fires = torch.zeros(len(found), dtype=torch.long).index_add_(0, place, torch.ones_like(place))
        ends = torch.searchsorted(found, torch.arange(n + 1) * self.d_sae).tolist()
        return [
            _Document(found[a:b] - i * self.d_sae, total[a:b].clone(), fires[a:b].clone())
            for i, (a, b) in enumerate(pairwise(ends))
        ]


class MeanSums:
    """Cluster sums of conversations' mean activations at one site, for several models."""

    def __init__(self, n_models: int, n_clusters: int, d_model: int) -> None:
        shape = (n_models, n_clusters, d_model)
        self.activation: Float64[Tensor, "model cluster d_model"] = torch.zeros(shape, dtype=torch.float64)
        self.square: Float64[Tensor, " model"] = torch.zeros(n_models, dtype=torch.float64)
        self.conversations: Int[Tensor, " cluster"] = torch.zeros(n_clusters, dtype=torch.long)
        self.tokens = 0

    def add(
        self,
        document: Int[Tensor, " token"],
        clusters: Int[Tensor, " conversation"],
        activations: Sequence[Float[Tensor, "token d_model"]],
    ) -> None:
        """Count tokens, as `LatentSums.add`; `clusters` numbers every conversation's cluster."""
        names, row, counts = document.cpu().unique(return_inverse=True, return_counts=True)
        cluster = clusters[names]
        self.conversations += cluster.bincount(minlength=len(self.conversations))
        self.tokens += len(row)
        for i, activation in enumerate(activations):
            wide = activation.double().cpu()
            mean = torch.zeros(len(names), wide.shape[1], dtype=torch.float64)
            mean.index_add_(0, row, wide).div_(counts[:, None])
            self.activation[i].index_add_(0, cluster, mean)
            self.square[i] += wide.square().sum()

    def merge(self, other: MeanSums) -> MeanSums:
        """Add the sums of another shard, with other conversations; returns this one."""
        for name in ("activation", "square", "conversations"):
            getattr(self, name).add_(getattr(other, name))
        self.tokens += other.tokens
        return self


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
