"""One intervention as numbers: a clipped affine map of the amount that is read (see `kernel`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.steering.positions import Positions

BIAS, THRESHOLD, SLOPE, SHIFT, LOW, HIGH, ABOVE = range(7)
"""Rows of `AffineEdit.coefficients`."""


@dataclass(frozen=True, eq=False)
class TopK:
    """A whole top-k encoder: whether one latent fires depends on all of them."""

    weight: Float[Tensor, "d_model d_sae"]
    bias: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"] | None
    k: int

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal for encoders that share their tensors, so that those are run once for all rows."""
        shift = 0 if self.b_dec is None else self.b_dec.data_ptr()
        return (self.weight.data_ptr(), self.bias.data_ptr(), shift, self.k)

    def to(self, device: torch.device, dtype: torch.dtype) -> TopK:
        shift = None if self.b_dec is None else self.b_dec.to(device, dtype)
        return TopK(self.weight.to(device, dtype), self.bias.to(device, dtype), shift, self.k)


@dataclass(frozen=True, eq=False)
class AffineEdit:
    """One intervention as numbers."""

    read: Float[Tensor, "d_model latent"]
    coefficients: Float[Tensor, "7 latent"]
    """Rows: bias, threshold, a - 1, b, low, high, and the amount above which the edit is made at
    all.
    """
    write: Float[Tensor, "latent d_model"]
    """What a change of one in z adds; the gain is in it."""
    positions: Positions
    top_k: TopK | None = None
    """Read the amounts from this encoder; `read` is then zero."""
    columns: tuple[int, ...] = ()
    """Which of its latents they are."""
    random: Float[Tensor, " d_model"] | None = None
    """Move by the same distance in this (unit) direction instead."""
    gate: AffineEdit | None = None
    """One latent that is read alone: the condition is about its amount, not about those edited."""
    on_prompt: bool = False
    """The condition is about the highest amount in the prompt, not about each token's."""
