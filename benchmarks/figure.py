"""One measured figure, and the interleaved timing that makes ratios of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A row of `results.json`."""

    name: str
    value: float
    unit: str
    against: str
    """What it is compared with, measured in the same run; empty when with nothing."""
    ratio: float | None = None
    """How `value` compares with `against`, as the bar puts it."""
    bar: str | None = None
    """What the ratio (or the value) must be, in words: ">= 3x faster"."""
    holds: bool | None = None
    """Whether it is; None where there is no bar."""


def medians(contenders: Mapping[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each contender. They take turns, so that a slow spell of the machine slows
    all of them; one turn before the first is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contend in contenders.items():
            start = time.perf_counter()
            contend()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
