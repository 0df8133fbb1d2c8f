"""The null of an edit: the same distance, per token, in a random direction.

The same settings in a random direction would be an empty comparison: under the same cap a random
direction is hardly touched. So the distance that the original edit would have moved each token is
computed as the model runs, and the token is moved by it along a fixed random unit vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, MismatchError
from persona_probe.steering.affine import AffineEdit
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.target import held


@dataclass(frozen=True, eq=False)
class RandomMatched:
    """`intervention`'s distance along `vector`. Of several at one site of a row, the summed edit's
    distance.
    """

    intervention: Intervention
    vector: Float[Tensor, " d_model"]
    """Of length 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", held(self.vector, "random direction"))
        if tuple(self.vector.shape) != (self.intervention.target.d_model,):
            raise MismatchError(
                f"the random direction has shape {tuple(self.vector.shape)}, the target width "
                f"{self.intervention.target.d_model}"
            )
        if abs(float(self.vector.norm()) - 1) > 1e-4:
            raise InputError(f"the random direction has length {float(self.vector.norm()):g}, not 1")

    @property
    def site(self) -> str:
        return self.intervention.site

    @property
    def gain(self) -> float:
        return self.intervention.gain

    @cached_property
    def compiled(self) -> AffineEdit:
        """The pair as numbers, for the kernel."""
        return replace(self.intervention.compiled, random=self.vector)

    def __str__(self) -> str:
        return f"random direction, moved as far as: {self.intervention}"


@overload
def matched_random(intervention: Intervention, generator: torch.Generator) -> RandomMatched: ...
@overload
def matched_random(
    intervention: Sequence[Intervention], generator: torch.Generator
) -> tuple[RandomMatched, ...]: ...
def matched_random(
    intervention: Intervention | Sequence[Intervention], generator: torch.Generator
) -> RandomMatched | tuple[RandomMatched, ...]:
    """The null of one intervention, or of a whole fix, which gets one isotropic random direction
    per site.
    """
    fix = [intervention] if isinstance(intervention, Intervention) else list(intervention)
    vectors: dict[str, Tensor] = {}
    for edit in fix:
        if edit.site not in vectors:
            vector = torch.randn(edit.target.d_model, generator=generator, device=generator.device)
            vectors[edit.site] = vector / vector.norm()
    matched = tuple(RandomMatched(edit, vectors[edit.site]) for edit in fix)
    return matched[0] if isinstance(intervention, Intervention) else matched
