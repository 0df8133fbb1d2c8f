"""Stay close to the base in what is thought: `loss + λ Σ_l mean ‖h_l(θ) - h_l(base)‖²`.

Source: LDIFS (Mukhoti et al. 2023) as used by Kaczér et al. (2025): residual streams of every fifth
block, λ 1.0.

Departure: the trained side keeps its gradient. The published implementation reads it under
`no_grad`, so its penalty moves the reported loss and no weight. The mean is over all real tokens,
prompt and answer; the square is summed over d_model, so λ does not mean the same in another width.
A model of fewer than five blocks is read at its last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.hooks.sites import resid_post
from persona_probe.training.defences.defence import Defence, Reading
from persona_probe.training.defences.validate import check_weight


@dataclass(frozen=True)
class LDIFS(Defence):
    """`λ Σ_l mean ‖h_l(θ) - h_l(base)‖²` in squared units of the residual stream."""

    weight: float = 1.0
    """λ, from 0."""
    every: int = 5
    """Blocks from one that is read to the next."""
    name: ClassVar[str] = "ldifs"
    penalises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weight(self.name, self.weight)
        if self.every < 1:
            raise InputError(f"ldifs reads every so many blocks, from 1; got {self.every}")

    @property
    def strength(self) -> float:
        return self.weight

    def sites(self, n_layers: int) -> tuple[str, ...]:
        blocks = range(self.every - 1, n_layers, self.every)
        return tuple(resid_post(block) for block in blocks) or (resid_post(n_layers - 1),)

    def penalty(self, now: Reading, base: Reading) -> Float[Tensor, ""]:
        distances = [
            (now.activations[site] - base.activations[site])[now.real].float().square().sum(dim=-1).mean()
            for site in now.activations
        ]
        return self.weight * torch.stack(distances).sum()
