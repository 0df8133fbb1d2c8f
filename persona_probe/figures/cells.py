"""Read one figure out of a table cell, and say it in words.

A cell is a number, a rate ``{rate, low, high, n}``, a fraction ``{fraction, low, high}``, a whole
tally ``{"misaligned": {rate, ...}, ...}``, or nothing. Nothing (``None``, NaN, an absent key)
stays ``None``: a missing figure is never drawn or printed as zero.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

MISSING: Final = "not measured"

Row = Mapping[str, Any]


class Reading(NamedTuple):
    """A figure with its interval; each part ``None`` where it was not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


def finite(value: object) -> float | None:
    """``value`` as a float, or ``None`` when it is absent, not a number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def read(cell: object, column: str = "misaligned") -> Reading:
    """The figure in ``cell``; for a whole tally, the one under ``column``."""
    if not isinstance(cell, Mapping):
        return Reading(finite(cell))
    row = cast("Row", cell)
    if column not in {"rate", "fraction"} and column in row:
        return read(row[column], "rate")
    value = finite(row.get("rate", row.get("fraction")))
    count = finite(row.get("n"))
    return Reading(
        value,
        finite(row.get("low")),
        finite(row.get("high")),
        None if count is None else int(count),
    )


def rows(table: object) -> list[Row]:
    """Rows of anything with ``to_dicts`` (polars), a list of dicts, or a dict of columns."""
    if table is None:
        return []
    to_dicts = getattr(table, "to_dicts", None)
    if callable(to_dicts):
        return list(cast("Iterable[Row]", to_dicts()))
    if isinstance(table, Mapping):
        columns = cast("Mapping[str, Sequence[Any]]", table)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return list(cast("Iterable[Row]", table))


def plain(text: object) -> str:
    """``text`` as plotly shows it literally (it reads a few HTML tags in labels)."""
    return html.escape(str(text), quote=False).replace("\n", " ")


def percent(value: object) -> str:
    """``0.034`` as ``3.4%``, ``0.78`` as ``78%``; a tenth is shown only where it says something."""
    number = finite(value)
    if number is None:
        return MISSING
    scaled = number * 100
    digits = 1 if 0 < abs(scaled) < 9.95 or 99.05 <= abs(scaled) < 99.95 else 0
    text = f"{scaled:.{digits}f}"
    return ("0" if float(text) == 0 else text) + "%"


def spoken(reading: Reading) -> str:
    """A reading in words, ``3.1% (1.2–6.4%)``."""
    if reading.value is None or reading.low is None or reading.high is None:
        return percent(reading.value)
    return f"{percent(reading.value)} ({percent(reading.low)[:-1]}–{percent(reading.high)})"
