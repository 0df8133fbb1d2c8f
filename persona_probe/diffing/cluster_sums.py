"""What one model leaves of one shard: fp64 sums over each cluster's conversations.

A conversation's figure is the mean over its counted tokens, and a cluster (a question, in which
paraphrases nest) has the sum of its conversations' figures: everything a diff estimates is made of
these, so that models may be read together, one after the other, or on different machines. Entries are
added up in the order of conversations and tokens, whatever batches they were read in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from persona_probe.sae.encode import decode, encode
from persona_probe.sae.load import Dictionary


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """One model at one site; latents are those of its dictionary (none without one)."""

    cluster: Int[Tensor, " entry"]
    """Number within the shard. Entries are what fired, ordered by cluster, then by latent."""
    latent: Int[Tensor, " entry"]
    activation: Float64[Tensor, " entry"]
    """Sum of the conversations' mean activations."""
    fires: Float64[Tensor, " entry"]
    """Sum of the shares of their tokens at which the latent fires."""
    maximum: Float[Tensor, " d_sae"]
    """Largest activation at any counted token."""
    fired: Int[Tensor, " d_sae"]
    """Tokens at which the latent fires."""
    mean: Float64[Tensor, "cluster d_model"]
    """Sum of the conversations' mean activations at the site."""
    token_sum: Float64[Tensor, " d_model"]
    """Sum of the activations at the site over all tokens."""
    error_sum: Float64[Tensor, " d_model"]
    """The same of what the dictionary leaves unexplained."""
    squares: Float64[Tensor, " 2"]
    """Sums over tokens of the squared length of the activation, and of what is left unexplained."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every field by name, to be written to a file."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))


class Counting:
    """Takes a model's activations batch by batch; `sums` is what they come to."""

    def __init__(
        self, dictionary: Dictionary | None, d_model: int, clusters: Int[Tensor, " conversation"]
    ) -> None:
        self._dictionary = dictionary
        self._clusters = clusters
        self._n = int(clusters.max()) + 1
        self._d_sae = dictionary.d_sae if dictionary is not None else 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._maximum = torch.zeros(self._d_sae)
        self._fired = torch.zeros(self._d_sae, dtype=torch.long)
        self._mean = torch.zeros(len(clusters), d_model, dtype=torch.float64)
        self._token_sum = torch.zeros(d_model, dtype=torch.float64)
        self._error_sum = torch.zeros(d_model, dtype=torch.float64)
        self._squares = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def add(
        self, document: Int[Tensor, " token"], activation: Float[Tensor, "token d_model"]
    ) -> Float64[Tensor, "token d_model"] | None:
        """Count tokens; a conversation's come in one call and in order. Returns what the dictionary
        leaves unexplained of each, None without a dictionary.
        """
        tokens = document.bincount(minlength=len(self._clusters))
        wide = activation.double().cpu()
        self._mean.index_add_(0, document, wide)
        self._mean[tokens > 0] /= tokens[tokens > 0, None]
        self._token_sum += wide.sum(dim=0)
        self._squares[0] += wide.square().sum()
        if self._dictionary is None:
            return None
        codes = encode(self._dictionary, activation)
        error = wide - decode(self._dictionary, codes).double().cpu()
        self._error_sum += error.sum(dim=0)
        self._squares[1] += error.square().sum()
        latent, value = codes.latent_index.cpu(), codes.value.float().cpu()
        self._maximum.scatter_reduce_(0, latent, value, reduce="amax")
        self._fired += latent.bincount(minlength=self._d_sae)
        key = document[codes.token_index.cpu()] * self._d_sae + latent
        found, (total, fires) = _added(key, [value.double(), torch.ones_like(value, dtype=torch.float64)])
        count = tokens[found // self._d_sae]
        self._parts.append((found, total / count, fires / count))
        return error

    def sums(self) -> ClusterSums:
        """The sums over everything that was added."""
        empty = torch.zeros(0, dtype=torch.float64)
        key, total, fires = (
            (torch.cat(column) for column in zip(*self._parts, strict=True))
            if self._parts
            else (empty.long(), empty, empty)
        )
        order = key.argsort()  # by conversation, then by latent: each key is there once
        conversation = (key // max(1, self._d_sae))[order]
        key = self._clusters[conversation] * self._d_sae + key[order] - conversation * self._d_sae
        key, (total, fires) = _added(key, [total[order], fires[order]])
        mean = torch.zeros(self._n, self._mean.shape[1], dtype=torch.float64)
        return ClusterSums(
            cluster=key // max(1, self._d_sae),
            latent=key % max(1, self._d_sae),
            activation=total,
            fires=fires,
            maximum=self._maximum,
            fired=self._fired,
            mean=mean.index_add_(0, self._clusters, self._mean),
            token_sum=self._token_sum,
            error_sum=self._error_sum,
            squares=self._squares,
        )


def _added(
    key: Int[Tensor, " entry"], columns: Sequence[Float64[Tensor, " entry"]]
) -> tuple[Int[Tensor, " sum"], list[Float64[Tensor, " sum"]]]:
    """Entries of the same key added up, one after another; keys in order."""
    found, place = key.unique(return_inverse=True)
    return found, [
        torch.zeros(len(found), dtype=torch.float64).index_add_(0, place, column) for column in columns
    ]
