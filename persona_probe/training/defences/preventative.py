"""Give the model the persona while it trains, so that its weights need not learn it: `h + α v`.

Source: preventative steering, Chen et al. (2025), "Persona vectors", α 5 at one layer, all tokens;
off at inference.

Departure: it is an `Intervention` (`of` makes the paper's), so other positions, and a level with a unit,
can be named. The paper's α multiplies v at whatever length it has, here a difference of means: say how
long yours is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.steering.intervention import Intervention, Level
from persona_probe.steering.target import direction
from persona_probe.training.defences.defence import Defence


@dataclass(frozen=True)
class PreventativeSteering(Defence):
    """An `add` intervention, made in training only."""

    intervention: Intervention
    """`add` of the persona's direction."""
    name: ClassVar[str] = "preventative_steering"

    def __post_init__(self) -> None:
        if self.intervention.op != "add":
            raise InputError(
                f"preventative steering adds a direction, got {self.intervention.op}",
                fix="PreventativeSteering.of(v, site, alpha=5.0)",
            )

    @classmethod
    def of(cls, v: Float[Tensor, " d_model"], site: str, alpha: float = 5.0) -> PreventativeSteering:
        """`h + α v` at every token of `site`. Raises `InputError` for a zero v."""
        level = Level((alpha * float(v.double().norm()),))
        return cls(Intervention("add", direction(v), site, level=level))

    @property
    def strength(self) -> float:
        level = self.intervention.level
        return self.intervention.gain * max(abs(one) for one in level.absolute()) if level else 0.0

    def interventions(self) -> tuple[Intervention, ...]:
        return (self.intervention,)
