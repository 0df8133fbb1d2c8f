"""Keep causal latents from moving the way misalignment moves them.

Source: BLOCK-EM (2026):

    loss + λ mean[ Σ_{K+} ReLU(z - z_base)² + Σ_{K-} ReLU(z_base - z)² ]

with K+ the latents that rose in misaligned fine-tunes, K- those that fell, twenty in all. Watch for
rerouting: behaviour that comes back through latents outside K (`diff` the defended tune).

Departure: the z of K- is read before the encoder's gate. A latent that training has silenced has no
gradient through its gate, so it could never be called back (the same trap as a penalty under
`no_grad`). Where it fires the two are equal. The mean is over the last prompt token and the answer,
the tokens that the Δ latent is measured on. λ has no published default and must be given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.hooks.sites import parse_site
from persona_probe.steering.target import Encoder, Target
from persona_probe.training.defences.defence import Defence, Reading
from persona_probe.training.defences.validate import check_weight


@dataclass(frozen=True)
class LatentBlocking(Defence):
    """A penalty on latents that rise (`rising`) or fall (`falling`) beyond the base at one site."""

    weight: float
    """λ, from 0; the penalty is in squared units of the latents' activation."""
    site: str
    """Hook name that the dictionary reads."""
    rising: Target | None = None
    """K+: latents that must not rise."""
    falling: Target | None = None
    """K-: latents that must not fall."""
    name: ClassVar[str] = "latent_blocking"
    penalises: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weight(self.name, self.weight)
        parse_site(self.site)
        given = [target for target in (self.rising, self.falling) if target is not None]
        if not given:
            raise InputError("latent blocking needs latents that must not rise, or must not fall")
        if any(target.encoder is None for target in given):
            raise InputError("latent blocking reads latents by their encoder", fix="latents(dictionary, ids)")

    @property
    def strength(self) -> float:
        return self.weight

    def sites(self, n_layers: int) -> tuple[str, ...]:
        del n_layers
        return (self.site,)

    def penalty(self, now: Reading, base: Reading) -> Float[Tensor, ""]:
        x = now.activations[self.site][now.producing].float()
        before = base.activations[self.site][now.producing].float()
        total = x.new_zeros(len(x))
        if self.rising is not None and self.rising.encoder is not None:
            encoder = self.rising.encoder
            total = total + (encoder.amounts(x) - encoder.amounts(before)).relu().square().sum(dim=-1)
        if self.falling is not None and self.falling.encoder is not None:
            encoder = self.falling.encoder
            held = encoder.amounts(before)
            fallen = torch.where(held > 0, held - ungated(encoder, x), 0.0)
            total = total + fallen.relu().square().sum(dim=-1)
        return self.weight * total.mean()


def ungated(encoder: Encoder, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token latent"]:
    """What the encoder makes of x before its gate; where a latent fires, this is its activation."""
    columns = slice(None) if encoder.columns is None else list(encoder.columns)
    centred = x if encoder.b_dec is None else x - encoder.b_dec.to(x)
    return centred @ encoder.weight[:, columns].to(x) + encoder.bias[columns].to(x)
