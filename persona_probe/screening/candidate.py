"""What a screen tries: latents, sets of latents and directions, and the edits that test them.

A candidate is one or more *carriers*: unit directions at sites, each with the base model's mean
projection on it and the mean shift that fine-tuning gave it. Two edits follow from that alone:

- the *cure* caps a risen carrier at the base's mean (floors a fallen one) with a gain: 1 brings it back
  to the base's level and no further, above 1 over-corrects;
- *inducing* adds the carriers to the base model, in proportion to their shifts.

Both on every token, or on the last prompt token alone, where it is decided who speaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.steering.intervention import Intervention, Level, Positions
from persona_probe.steering.target import Target, direction

Kind = Literal["latent", "set", "difference of means", "random latent"]


@dataclass(frozen=True, eq=False)
class Carrier:
    """One direction at one site, measured in both models on the same tokens.

    Projections are in units of the activation.
    """

    site: str
    target: Target
    label: str
    index: int | None
    """The latent's number in the site's dictionary; None for a plain direction."""
    unit: Float[Tensor, " d_model"]
    base_mean: float
    """The base model's mean projection on ``unit``."""
    shift: float
    """Tuned minus base mean projection."""
    residual_rms: float
    """Root mean square of an activation's entries at the site, base model."""

    @property
    def rises(self) -> bool:
        return self.shift >= 0

    def cure(self, gain: float, positions: Positions = "all") -> Intervention:
        """Bring the projection back to the base's mean (gain 1) or past it."""
        return Intervention(
            op="cap" if self.rises else "floor",
            target=self.target,
            site=self.site,
            positions=positions,
            level=Level((self.base_mean,), "base_mean"),
            gain=gain,
            read="projection",
        )

    def push(self, strength: float, positions: Positions = "all") -> Intervention:
        """Add ``strength`` x the site's residual rms along the direction it moved in."""
        return Intervention(
            op="add",
            target=self.target,
            site=self.site,
            positions=positions,
            level=Level((strength if self.rises else -strength,), "residual_rms", self.residual_rms),
            gain=1.0,
            read="projection",
        )


@dataclass(frozen=True, eq=False)
class Candidate:
    """Carriers that are edited together."""

    kind: Kind
    carriers: tuple[Carrier, ...]

    @property
    def label(self) -> str:
        return " + ".join(carrier.label for carrier in self.carriers)

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(sorted(carrier.label for carrier in self.carriers))

    def cure(self, gain: float, positions: Positions = "all") -> tuple[Intervention, ...]:
        """The edit of the tuned model."""
        return tuple(carrier.cure(gain, positions) for carrier in self.carriers)

    def induce(self, strength: float, positions: Positions = "all") -> tuple[Intervention, ...]:
        """The edit of the base model: ``strength`` residual rms along the joint shift of each site."""
        sites = dict.fromkeys(carrier.site for carrier in self.carriers)
        edits: list[Intervention] = []
        for site in sites:
            here = [carrier for carrier in self.carriers if carrier.site == site]
            if len(here) == 1:
                edits.append(here[0].push(strength, positions))
                continue
            joint = sum((carrier.shift * carrier.unit for carrier in here), torch.zeros(()))
            rms = here[0].residual_rms
            label = " + ".join(carrier.label for carrier in here)
            edits.append(
                Intervention(
                    op="add",
                    target=direction(joint / joint.norm(), label=label),
                    site=site,
                    positions=positions,
                    level=Level((strength,), "residual_rms", rms),
                    gain=1.0,
                    read="projection",
                )
            )
        return tuple(edits)
