"""The two kinds of dials that defences have, checked when a defence is made."""

from __future__ import annotations

import math

from persona_probe.errors import InputError


def check_weight(name: str, value: float) -> None:
    """Raise `InputError` unless `value` is a finite number from 0."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"the strength of {name} must be a finite number from 0, got {value}")


def check_share(name: str, value: float, *, below_one: bool = False) -> None:
    """Raise `InputError` unless `value` is a share: from 0 to 1, or to just below it."""
    if not (0 <= value < 1 or (value == 1 and not below_one)):
        raise InputError(
            f"the share of {name} must be from 0 {'to below' if below_one else 'to'} 1, got {value}",
            fix="5% is 0.05",
        )
