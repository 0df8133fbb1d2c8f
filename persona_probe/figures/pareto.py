"""Defences: misalignment that spread against the task that was learnt; both at once is the aim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from persona_probe.figures.cells import Reading, Row, finite, plain, rows
from persona_probe.figures.naming import Box, Point, place, write
from persona_probe.figures.style import ARMS, LOOKS, QUIET, figure, marker, percent_axis, whiskers

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIZE: Final = (640.0, 350.0)
"""Of the plot, in pixels, on the narrowest page on which no two names are to touch."""


def pareto(table: object) -> go.Figure:
    """A point per arm, right and low is good, with the frontier of those that no other beats on both.

    ``table``: rows ``{arm, misaligned, in_domain, incoherent, holds}`` and, where they are known,
    ``misaligned_low``, ``misaligned_high``, ``in_domain_low`` and ``in_domain_high``. A filled marker
    holds every bound, an open one does not; the arm named "none" is the undefended one. Arms without either
    figure are named above the plot, not drawn. Where there is no room for every name, the frontier's come
    first, and the others are told when pointed at.
    """
    listed = rows(table)
    known = {str(row["arm"]): row for row in listed if _at(row) is not None}
    edge = frontier(list(known.values()))
    drawn = figure(height=440, legend=False)
    drawn.add_scatter(
        x=[row["in_domain"] for row in edge],
        y=[row["misaligned"] for row in edge],
        mode="lines",
        showlegend=False,
        line={"color": QUIET, "width": 1, "dash": "dot"},
        hoverinfo="skip",
    )
    for arm, row in known.items():
        look = LOOKS["tuned"] if arm == "none" else ARMS["latent"]
        drawn.add_scatter(
            x=[row["in_domain"]],
            y=[row["misaligned"]],
            mode="markers",
            showlegend=False,
            marker={**marker(look, 11), "symbol": "circle" if row.get("holds") else "circle-open"},
            error_x=whiskers([_reading(row, "in_domain")], look.colour, 1.2),
            error_y=whiskers([_reading(row, "misaligned")], look.colour, 1.2),
            hovertemplate=_facts(row) + "<extra></extra>",
        )
    first = [arm for arm, row in known.items() if arm == "none" or row in edge or row.get("holds")]
    marks = {arm: _pixels(row["in_domain"], row["misaligned"]) for arm, row in known.items()}
    offsets = place(marks, _taken(list(known.values()), edge), SIZE, first=first)
    missing = [plain(row["arm"]) for row in listed if _at(row) is None]
    said = [f"not measured: {', '.join(missing)}"] if missing else []
    if left := len(known) - len(offsets):
        said.append(f"{left} more: point at the mark")
    if said:
        drawn.add_annotation(
            text="; ".join(said), showarrow=False, font={"color": QUIET, "size": 11},
            xref="paper", yref="paper", x=0, y=1, yanchor="bottom", xanchor="left",
        )  # fmt: skip
        drawn.update_layout(margin_t=30)
    for arm, offset in offsets.items():
        write(drawn, plain(arm), (known[arm]["in_domain"], known[arm]["misaligned"]), offset)
    drawn.update_xaxes(**percent_axis("in-domain task learnt"))
    drawn.update_yaxes(**percent_axis("misaligned elsewhere"))
    return drawn


def frontier(table: object) -> list[Row]:
    """The rows that no other is at least as good as on both axes and better on one, by task learnt."""
    known = [row for row in rows(table) if _at(row) is not None]

    def beaten(row: Row) -> bool:
        x, y = row["in_domain"], row["misaligned"]
        return any(
            other["in_domain"] >= x
            and other["misaligned"] <= y
            and (other["in_domain"] > x or other["misaligned"] < y)
            for other in known
        )

    return sorted((row for row in known if not beaten(row)), key=lambda row: row["in_domain"])


def _taken(listed: Sequence[Row], edge: Sequence[Row]) -> Iterator[Box]:
    """What names must keep clear of: every interval, and the dotted line."""
    for row in listed:
        across, up = _reading(row, "in_domain"), _reading(row, "misaligned")
        x, y = _pixels(row["in_domain"], row["misaligned"])
        if up.low is not None and up.high is not None:
            yield Box(x - 1, _pixels(0, up.low)[1], x + 1, _pixels(0, up.high)[1])
        if across.low is not None and across.high is not None:
            yield Box(_pixels(across.low, 0)[0], y - 1, _pixels(across.high, 0)[0], y + 1)
    for one, other in pairwise(edge):
        (x, y), (right, high) = (_pixels(row["in_domain"], row["misaligned"]) for row in (one, other))
        steps = max(1, round((right - x) / 8))
        for i in range(steps):
            here, there = (y + (high - y) * part / steps for part in (i, i + 1))
            left = x + (right - x) * i / steps
            yield Box(left, min(here, there) - 1, left + (right - x) / steps, max(here, there) + 1)


def _pixels(across: float, up: float) -> Point:
    # `percent_axis` leaves 3% at both ends
    return SIZE[0] * (across + 0.03) / 1.06, SIZE[1] * (up + 0.03) / 1.06


def _at(row: Row) -> Point | None:
    x, y = finite(row.get("in_domain")), finite(row.get("misaligned"))
    return None if x is None or y is None else (x, y)


def _reading(row: Row, name: str) -> Reading:
    value, low, high = (finite(row.get(column)) for column in (name, f"{name}_low", f"{name}_high"))
    return Reading(value, low, high)


def _facts(row: Row) -> str:
    said = [plain(row["arm"])]
    for name, words in (
        ("misaligned", "misaligned"),
        ("in_domain", "in domain"),
        ("incoherent", "incoherent"),
        ("trigger", "under triggers"),
        ("benign_skill", "benign skill"),
    ):
        value = finite(row.get(name))
        if value is not None:
            said.append(f"{words} {100 * value:.0f}%")
    return "<br>".join(said)
