"""How an amount z is read, as numbers for the kernel: `z = x @ read + bias`, 0 at or below a threshold."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.steering.affine import TopK
from persona_probe.steering.target import Target


class Source(NamedTuple):
    """What is multiplied with x, and what is made of the product."""

    read: Float[Tensor, "d_model latent"]
    bias: Float[Tensor, " latent"]
    threshold: Float[Tensor, " latent"]
    top_k: TopK | None = None
    columns: tuple[int, ...] = ()


def projected(unit: Float[Tensor, "latent d_model"]) -> Source:
    """Projections on unit rows: no bias and no threshold."""
    nothing = torch.zeros(len(unit), dtype=torch.float64)
    return Source(unit.T, nothing, torch.full_like(nothing, -math.inf))


def encoded(target: Target) -> Source:
    """The target's encoder. Raises `InputError` when it has none."""
    encoder, n = target.encoder, target.n_latents
    if encoder is None:
        raise InputError(f"{target} has no encoder", fix="read its projection")
    threshold = torch.zeros(n, dtype=torch.float64)
    if encoder.k is not None:
        # which latents fire depends on all of them: the whole encoder is run
        top_k = TopK(encoder.weight, encoder.bias, encoder.b_dec, encoder.k)
        nothing = torch.zeros(target.d_model, n)
        return Source(nothing, torch.zeros_like(threshold), threshold, top_k, encoder.columns or ())
    bias = encoder.bias.double()
    if encoder.b_dec is not None:
        # (x - b_dec) W + bias, in one product
        bias = bias - encoder.b_dec.double() @ encoder.weight.double()
    if encoder.threshold is not None:
        threshold = encoder.threshold.double().clamp(min=0)
    return Source(encoder.weight, bias, threshold)
