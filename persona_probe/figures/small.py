"""Drawings the size of a word or two, as SVG: for tables and cards, where a figure would be too much."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from persona_probe.figures.cells import Row, finite
from persona_probe.figures.style import QUIET, RULE

WIDTH, HEIGHT = 184, 56


def bars(values: Sequence[float], title: str, first: str, last: str, colour: str) -> str:
    """A histogram; `first` and `last` name the ends of its axis."""
    most, step = max([*values, 0.0]) or 1.0, WIDTH / max(1, len(values))
    drawn = "".join(
        f'<rect x="{i * step:.1f}" y="{HEIGHT * (1 - value / most):.1f}" width="{max(1.0, step - 1.5):.1f}" '
        f'height="{HEIGHT * value / most:.1f}" fill="{colour}"/>'
        for i, value in enumerate(values)
    )
    return _framed(drawn, title, first, last)


def lines(points: Sequence[Row], title: str, colour: str) -> str:
    """A rate by strength with its intervals, on a scale from 0 to 100%: rows ``{strength, misaligned, low,
    high, strength_unit}``.
    """
    listed = sorted(
        (row for row in points if finite(row.get("misaligned")) is not None), key=lambda row: row["strength"]
    )
    most = max((float(row["strength"]) for row in listed), default=0.0) or 1.0

    def at(row: Row, column: str) -> tuple[float, float]:
        value = finite(row.get(column))
        rate = float(row["misaligned"]) if value is None else value
        return 4 + (WIDTH - 8) * float(row["strength"]) / most, HEIGHT * (1 - rate)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(row, "misaligned") for row in listed))
    drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    for row in listed:
        x, y = at(row, "misaligned")
        low, high = at(row, "low")[1], at(row, "high")[1]
        drawn += (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'
        )
    unit = next((str(row["strength_unit"]) for row in listed if row.get("strength_unit")), "strength")
    return _framed(drawn, f"{title}, 0 to 100%", "0", f"{most:.3g} {unit}")


def interval(low: object, value: object, high: object, most: float, colour: str = QUIET) -> str:
    """A mean with its interval on a scale from 0 to `most`."""
    scale = 90 / most if most > 0 else 0.0
    middle, left, right = ((finite(one) or 0.0) * scale for one in (value, low, high))
    span = "" if finite(low) is None or finite(high) is None else (
        f'<line x1="{5 + left:.1f}" x2="{5 + right:.1f}" y1="7" y2="7" stroke="{colour}" stroke-width="2"/>'
    )  # fmt: skip
    return (
        '<svg width="100" height="14" style="flex:none" aria-hidden="true">'
        f'<line x1="5" x2="95" y1="7" y2="7" stroke="{RULE}"/>{span}'
        f'<circle cx="{5 + middle:.1f}" cy="7" r="3.5" fill="{colour}"/></svg>'
    )


def _framed(drawn: str, title: str, first: str, last: str) -> str:
    said = escape(title)
    return (
        f'<figure style="margin:0"><svg width="{WIDTH}" height="{HEIGHT + 2}" role="img" aria-label="{said}">'
        f'<line x1="0" x2="{WIDTH}" y1="{HEIGHT + 1}" y2="{HEIGHT + 1}" stroke="{RULE}"/>{drawn}</svg>'
        f'<figcaption style="font-size:11px;color:{QUIET};width:{WIDTH}px">'
        f'<span style="display:flex;justify-content:space-between"><span>{escape(first)}</span>'
        f"<span>{escape(last)}</span></span>{said}</figcaption></figure>"
    )
