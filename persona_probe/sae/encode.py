"""Activations to latents and back: `f = act(x @ W_enc + b_enc)`, `x_hat = f @ W_dec + b_dec`.

The same numbers as sae-lens's own `encode` and `decode`, plus two ways to do less: `encode` keeps
only what fires, and `encode_latents` computes only the latents asked for.

All of it is differentiable except `encode`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from persona_probe.errors import InputError, MismatchError
from persona_probe.sae.load import Dictionary

CHUNK_VALUES = {"cpu": 1 << 22, "cuda": 1 << 28}
"""How many dense token x latent values are held at once, where a token's latents must be seen together."""
BLOCK_LATENTS, BLOCK_TOKENS = 512, 512
"""Of one matrix product on a CPU: its part of the encoder, and what comes out, stay in the cache while they
are used.
"""


class SparseCodes(NamedTuple):
    """The latents that fired, ordered by token, then by latent."""

    token_index: Int[Tensor, " entry"]
    latent_index: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    """Strictly positive."""
    shape: tuple[int, int]
    """Tokens and latents of the dense matrix that these are the non-zeros of."""

    def dense(self) -> Float[Tensor, "token d_sae"]:
        out = self.value.new_zeros(self.shape)
        out[self.token_index, self.latent_index] = self.value
        return out


def encode(
    dictionary: Dictionary,
    x: Float[Tensor, "token d_model"],
    *,
    chunk_tokens: int | None = None,
) -> SparseCodes:
    """The latents that fire on each token, without ever holding the dense matrix for all tokens.

    Raises `MismatchError` when x is of another width.
    """
    with torch.no_grad():
        x = _input(dictionary, x)
        fires = _largest if dictionary.activation == "topk" else _above
        token, latent, value = map(torch.cat, zip(*fires(dictionary, x, chunk_tokens), strict=True))
        if not bool((token[1:] >= token[:-1]).all()):  # found block by block of the encoder
            token, order = token.sort(stable=True)
            latent, value = latent[order], value[order]
    return SparseCodes(token, latent, value, (x.shape[0], dictionary.d_sae))


def encode_dense(dictionary: Dictionary, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
    """Every latent's activation, zeros included. Raises `MismatchError` for x of another width."""
    pre = _input(dictionary, x) @ dictionary.W_enc + dictionary.b_enc
    if dictionary.activation == "topk":
        assert dictionary.k is not None
        top = pre.topk(dictionary.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    return _gate(pre, dictionary.threshold)


def encode_latents(
    dictionary: Dictionary, x: Float[Tensor, "*batch d_model"], ids: Sequence[int]
) -> Float[Tensor, "*batch latent"]:
    """The activations of the latents `ids` only, in that order.

    Costs `len(ids)` columns of the encoder, not the dictionary: except for top-k, where whether a
    latent fires depends on all the others, so that everything is encoded first. Raises `InputError`
    for an index that does not exist, `MismatchError` when x is of another width."""
    index = _indices(dictionary, ids)
    if dictionary.activation == "topk":
        return encode_dense(dictionary, x)[..., index]
    pre = _input(dictionary, x) @ dictionary.W_enc[:, index] + dictionary.b_enc[index]
    return _gate(pre, None if dictionary.threshold is None else dictionary.threshold[index])


def decode(
    dictionary: Dictionary, codes: SparseCodes | Float[Tensor, "*batch d_sae"]
) -> Float[Tensor, "*batch d_model"]:
    """The reconstruction `f @ W_dec + b_dec`, of dense or of sparse codes."""
    if isinstance(codes, Tensor):
        return codes @ dictionary.W_dec + dictionary.b_dec
    rows = torch.arange(codes.shape[0], device=codes.token_index.device)
    # a weighted sum of the decoder's rows, token by token: what an embedding bag is
    return (
        nn.functional.embedding_bag(
            codes.latent_index,
            dictionary.W_dec,
            torch.searchsorted(codes.token_index, rows),
            mode="sum",
            per_sample_weights=codes.value,
        )
        + dictionary.b_dec
    )


Fired = tuple[Int[Tensor, " entry"], Int[Tensor, " entry"], Float[Tensor, " entry"]]
"""Tokens, latents and their values."""


def _above(dictionary: Dictionary, x: Float[Tensor, "token d_model"], chunk: int | None) -> Iterator[Fired]:
    """What lies above its threshold, block by block of the encoder."""
    step = chunk or (BLOCK_TOKENS if x.device.type == "cpu" else _rows(dictionary))
    threshold = dictionary.b_enc.new_zeros(dictionary.d_sae)
    if dictionary.threshold is not None:
        threshold = dictionary.threshold.clamp(min=0)
    for some in _blocks(dictionary):
        encoder = dictionary.W_enc[:, some]
        if len(x) >= BLOCK_TOKENS:
            # the rows of a slice lie as far apart as those of the whole: in a cache they evict one another
            encoder = encoder.contiguous()
        width = encoder.shape[1]
        pre = x.new_empty(min(step, len(x)), width)
        fired = torch.empty_like(pre, dtype=torch.bool)
        for start in range(0, max(1, len(x)), step):
            part = x[start : start + step]
            its = torch.addmm(dictionary.b_enc[some], part, encoder, out=pre[: len(part)])
            place = _places(torch.gt(its, threshold[some], out=fired[: len(part)]))
            token = place.div(width, rounding_mode="floor")
            yield token + start, place - token * width + some.start, its.view(-1)[place]


def _largest(dictionary: Dictionary, x: Float[Tensor, "token d_model"], chunk: int | None) -> Iterator[Fired]:
    """The k largest of each token, as far as they are positive."""
    assert dictionary.k is not None
    step = chunk or _rows(dictionary)
    pre = x.new_empty(min(step, len(x)), dictionary.d_sae)
    for start in range(0, max(1, len(x)), step):
        part = x[start : start + step]
        its = pre[: len(part)]
        for some in _blocks(dictionary):
            torch.addmm(dictionary.b_enc[some], part, dictionary.W_enc[:, some], out=its[:, some])
        latent = its.topk(dictionary.k, dim=-1, sorted=False).indices.sort(dim=-1).values
        value = its.gather(1, latent)
        token, place = (value > 0).nonzero(as_tuple=True)
        yield token + start, latent[token, place], value[token, place]


def _blocks(dictionary: Dictionary) -> list[slice]:
    """The latents of one matrix product after the other."""
    width = BLOCK_LATENTS if dictionary.W_enc.device.type == "cpu" else dictionary.d_sae
    ends = range(width, dictionary.d_sae + width, width)
    return [slice(end - width, min(end, dictionary.d_sae)) for end in ends]


def _rows(dictionary: Dictionary) -> int:
    """Tokens whose latents are all held at once."""
    return max(1, CHUNK_VALUES.get(dictionary.W_enc.device.type, 1 << 24) // dictionary.d_sae)


def _places(fired: Bool[Tensor, "token d_sae"]) -> Int[Tensor, " entry"]:
    """Where a mask holds, counted through it row by row."""
    if fired.device.type == "cpu":  # numpy is four times as fast at it
        return torch.from_numpy(np.flatnonzero(fired.numpy()))
    return fired.view(-1).nonzero()[:, 0]


def _input(dictionary: Dictionary, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    if x.shape[-1] != dictionary.d_model:
        raise MismatchError(
            f"{dictionary.path} reads activations of width {dictionary.d_model}, got {tuple(x.shape)}"
        )
    x = x.to(dictionary.W_enc.dtype)
    return x - dictionary.b_dec if dictionary.apply_b_dec_to_input else x


def _gate(
    pre: Float[Tensor, "*batch latent"], threshold: Float[Tensor, " latent"] | None
) -> Float[Tensor, "*batch latent"]:
    fired = pre.relu()
    return fired if threshold is None else fired * (pre > threshold)


def _indices(dictionary: Dictionary, ids: Sequence[int]) -> Int[Tensor, " latent"]:
    for index in ids:
        if not 0 <= index < dictionary.d_sae:
            raise InputError(
                f"there is no latent {index}: {dictionary.path} has latents 0 to {dictionary.d_sae - 1}"
            )
    return torch.as_tensor(list(ids), dtype=torch.long, device=dictionary.W_enc.device)
