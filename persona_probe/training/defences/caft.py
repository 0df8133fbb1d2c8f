"""Train without the unwanted concepts in reach: project their directions out of the residual stream.

Source: concept ablation fine-tuning, Casademunt et al. (2025): at every token and pass of the
fine-tune `h - U Uᵀ h`, with U an orthonormal basis of the unwanted latents' decoder directions (or
principal components); nothing is ablated afterwards.

Departure: none in the operation, which is `Intervention`'s project_out, a plain differentiable
projection: no gradient flows along the directions that are taken out, and all else passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from persona_probe.errors import InputError
from persona_probe.hooks.sites import resid_post
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.target import Target
from persona_probe.training.defences.defence import Defence


@dataclass(frozen=True)
class CAFT(Defence):
    """Directions (a latent's is its decoder row) taken out at each of `sites`, in training only."""

    target: Target
    """Latents or directions; their whole span goes."""
    site_names: tuple[str, ...]
    """Hook names of the residual stream where they are taken out."""
    gain: float = 1.0
    """Share of the component that is removed: 1 is the paper's, 0 is none."""
    name: ClassVar[str] = "caft"

    def __post_init__(self) -> None:
        object.__setattr__(self, "site_names", tuple(self.site_names))
        if not self.site_names:
            raise InputError("CAFT needs a site to take the directions out at")
        if not 0 <= self.gain <= 1:
            raise InputError(f"CAFT removes a share of the component, from 0 to 1; got {self.gain}")
        self.interventions()

    @classmethod
    def everywhere(cls, target: Target, blocks: Sequence[int], gain: float = 1.0) -> CAFT:
        """At the residual stream behind each of `blocks`."""
        return cls(target, tuple(resid_post(block) for block in blocks), gain)

    @property
    def strength(self) -> float:
        return self.gain

    def interventions(self) -> tuple[Intervention, ...]:
        plain = replace(self.target, encoder=None)
        return tuple(Intervention("project_out", plain, site, gain=self.gain) for site in self.site_names)
