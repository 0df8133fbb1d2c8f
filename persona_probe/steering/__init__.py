"""Steering: interventions as data, one engine that carries them out, and what it did.

`direction()`, the target of a plain vector, is in `steering.target`: here the name is a module's.
"""

from persona_probe.steering.direction import difference_of_means, residual_rms
from persona_probe.steering.intervention import (
    Condition,
    Encoder,
    Intervention,
    Level,
    Target,
    latents,
)
from persona_probe.steering.io import load_fix, save_fix
from persona_probe.steering.matched import RandomMatched, matched_random
from persona_probe.steering.plan import RowMemory, Steering, SteeringPlan, steer
from persona_probe.steering.receipt import Receipt

__all__ = [
    "Condition",
    "Encoder",
    "Intervention",
    "Level",
    "RandomMatched",
    "Receipt",
    "RowMemory",
    "Steering",
    "SteeringPlan",
    "Target",
    "difference_of_means",
    "latents",
    "load_fix",
    "matched_random",
    "residual_rms",
    "save_fix",
    "steer",
]
