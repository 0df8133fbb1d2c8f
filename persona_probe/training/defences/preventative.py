"""Give the model the persona while it trains, so that its weights need not learn it: `h + α v`.

Source: preventative steering, Chen et al. (2025), "Persona vectors", α 5 at one layer, all tokens;
off at inference.

Departure: v and α are an `Intervention`'s, so the level carries its unit (the paper's α multiplies a
vector of whatever length the difference of means had), and any other positions can be named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from persona_probe.errors import InputError
from persona_probe.steering.intervention import Intervention
from persona_probe.training.defences.defence import Defence


@dataclass(frozen=True)
class PreventativeSteering(Defence):
    """An `add` intervention, made in training only; its gain is the strength."""

    intervention: Intervention
    """`add` of the persona's direction; the level is α (in units of the direction's own length)."""
    name: ClassVar[str] = "preventative_steering"

    def __post_init__(self) -> None:
        if self.intervention.op != "add":
            raise InputError(
                f"preventative steering adds a direction, got {self.intervention.op}",
                fix='Intervention("add", direction(v), site, level=Level((5.0,)))',
            )

    @property
    def strength(self) -> float:
        return self.intervention.gain

    def interventions(self) -> tuple[Intervention, ...]:
        return (self.intervention,)
