"""Latents as points: what changed (volcano), and what of it causes (Δ against effect)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_probe.figures.cells import Reading, Row, finite, plain, read, rows
from persona_probe.figures.style import BAND, LOOKS, QUIET, figure, marker, whiskers

if TYPE_CHECKING:
    import plotly.graph_objects as go


def volcano(table: object, highlight: Collection[int] | Mapping[int, str] = ()) -> go.Figure:
    """Every latent by Δ (across) and by how sure the change is (up).

    Up is ``-log10 q`` where the table has q-values (benign tunes were given), else ``|z|`` and the
    axis says that this describes and does not test. ``highlight``: indices to name, or index →
    label.
    """
    listed = rows(table)
    tested = any(finite(row.get("q_value")) is not None for row in listed)
    points = [
        (x, y, row)
        for row in listed
        if (x := finite(row.get("delta"))) is not None and (y := _height(row, tested)) is not None
    ]
    named = (
        dict(highlight)
        if isinstance(highlight, Mapping)
        else {index: f"latent {index}" for index in highlight}
    )
    drawn = figure(height=420, legend=False)
    for chosen in (False, True):
        part = [(x, y, row) for x, y, row in points if (row.get("index") in named) is chosen]
        look = LOOKS["steered"] if chosen else LOOKS["null"]
        drawn.add_scatter(
            x=[x for x, _, _ in part],
            y=[y for _, y, _ in part],
            mode="markers+text" if chosen else "markers",
            text=[plain(named.get(row.get("index", -1), "")) if chosen else "" for _, _, row in part],
            textposition="top center",
            textfont={"color": look.colour, "size": 12},
            customdata=[_facts(row) for _, _, row in part],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
            marker={
                "color": look.colour,
                "size": 10 if chosen else 5,
                "opacity": 1 if chosen else 0.55,
                "symbol": look.symbol if chosen else "circle",
            },
        )
    drawn.add_vline(x=0, line={"color": QUIET, "width": 1})
    if tested:
        drawn.add_hline(y=-math.log10(0.05), line={"color": QUIET, "width": 1, "dash": "dot"})
    drawn.update_xaxes(title={"text": "Δ latent: mean activation, tuned − base"})
    drawn.update_yaxes(
        title={"text": "−log₁₀ q against benign tunes" if tested else "|z|, described and not tested"}
    )
    return drawn


def delta_against_effect(
    latents: Sequence[Row] | Any,
    base: object = None,
    tuned: object = None,
    *,
    word: str = "misaligned",
    name_first: int = 3,
) -> go.Figure:
    """Δ (across) against what the latent *causes* (up), in points of the misalignment rate.

    Below zero: taken out of the tuned model (``control`` minus the tuned rate). Above zero: added
    to the base (``induce`` minus the base rate). Only latents that the screen carried to
    generation have an effect.
    """
    start, floor = read(tuned).value, read(base).value
    ordered = sorted(rows(latents), key=_rank)
    drawn = figure(height=430)
    named = [row for row in ordered if finite(row.get("delta")) is not None][:name_first]
    measured = {
        "induce": (floor, LOOKS["induced"], "added to the base"),
        "control": (start, LOOKS["steered"], "taken out of the fine-tuned model"),
    }
    # without the rate that an effect starts from there is no effect to draw
    sides = {
        column: (origin, look, words)
        for column, (origin, look, words) in measured.items()
        if origin is not None
    }
    for row in named:
        ends = [_shifted(read(row.get(column)), origin).value for column, (origin, _, _) in sides.items()]
        drawn.add_scatter(
            x=[row["delta"]] * 2,
            y=[0.0 if end is None else end for end in ends],
            mode="lines",
            showlegend=False,
            line={"color": BAND, "width": 1, "dash": "dot"},
            hoverinfo="skip",
        )
    for column, (origin, look, words) in sides.items():
        part = [
            (
                row,
                Reading(read(row["delta"]).value, finite(row.get("low")), finite(row.get("high"))),
                effect,
            )
            for row in ordered
            if finite(row.get("delta")) is not None
            and (effect := _shifted(read(row.get(column)), origin)).value is not None
        ]
        thin = {"width": 0, "thickness": 1}
        drawn.add_scatter(
            x=[x.value for _, x, _ in part],
            y=[y.value for _, _, y in part],
            name=words,
            mode="markers",
            marker={
                **marker(look),
                "size": [10 if row in named else 7 for row, _, _ in part],
                "opacity": 1,
                "line": {"width": 0},
            },
            error_x=whiskers([x for _, x, _ in part], _faded(look.colour)) | thin,
            error_y=whiskers([y for _, _, y in part], _faded(look.colour)) | thin,
            customdata=[
                f"{plain(latent_name(row))}<br>{words}: {_points(y)}<br>{_facts(row)}" for row, _, y in part
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
        for row, x, y in part if column == "control" else []:
            if row in named:
                drawn.add_annotation(
                    x=x.value,
                    y=y.value,
                    text=plain(latent_name(row)),
                    showarrow=False,
                    yanchor="top",
                    yshift=-9,
                    font={"color": look.colour, "size": 12},
                    bgcolor="rgba(255,255,255,.85)",
                )
    drawn.add_hline(y=0, line={"color": QUIET, "width": 1})
    drawn.add_vline(x=0, line={"color": BAND, "width": 1})
    drawn.update_xaxes(title={"text": "Δ latent: mean activation, tuned − base"})
    drawn.update_yaxes(title={"text": f"change in {plain(word)} answers"}, tickformat="+.0%")
    return drawn


def latent_name(row: Row) -> str:
    """The latent's own label, else its index, with the block it lies in."""
    label = row.get("label")
    if label:
        return str(label)
    site = str(row.get("site") or "")
    block = site.split(".")[1] if site.startswith("blocks.") and site.count(".") >= 2 else ""
    return f"latent {row.get('index', '?')}" + (f", block {block}" if block else "")


def _rank(row: Row) -> float:
    rank = finite(row.get("rank"))
    return math.inf if rank is None else rank


def _height(row: Row, tested: bool) -> float | None:
    if not tested:
        z = finite(row.get("z"))
        return None if z is None else abs(z)
    q = finite(row.get("q_value"))
    # A q-value that underflowed to 0 is drawn at the resolution of a double, not at infinity.
    return None if q is None else -math.log10(max(q, 1e-16))


def _facts(row: Row) -> str:
    parts = [plain(latent_name(row))]
    for column, words in (
        ("delta", "Δ"),
        ("q_value", "q"),
        ("benign_max", "largest benign Δ"),
        ("rank", "rank"),
    ):
        number = finite(row.get(column))
        if number is not None:
            parts.append(f"{words} {number:.3g}")
    return "<br>".join(parts)


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},.4)"


def _shifted(reading: Reading, origin: float) -> Reading:
    moved = [None if part is None else part - origin for part in reading[:3]]
    return Reading(*moved, n=reading.n)


def _points(reading: Reading) -> str:
    return "" if reading.value is None else f"{100 * reading.value:+.0f} points"
