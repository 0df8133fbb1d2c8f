"""Shift by step: latents and directions over a run (or over tunes), the benign band, and the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persona_probe.figures.cells import Reading, Row, finite, plain, rows
from persona_probe.figures.latents import latent_name
from persona_probe.figures.style import ARMS, LOOKS, QUIET, RULE, figure, marker, whiskers

if TYPE_CHECKING:
    import plotly.graph_objects as go


def trajectories(table: object) -> go.Figure:
    """One line per latent or direction, with intervals; its own benign band behind it, shown with it.

    ``table``: rows ``{point, step, loss, kind, site, index, name, delta, low, high, benign_low,
    benign_high, outside}`` as ``Timeline`` has them. Where steps are there they are the axis, else the
    points' names. A filled marker is outside the band, an open one is not (or there is none). The loss
    is drawn below, where it was logged.
    """
    listed = rows(table)
    by_line: dict[tuple[Any, ...], list[Row]] = {}
    for row in listed:
        by_line.setdefault((row.get("kind"), row.get("site"), row.get("index"), row.get("name")), []).append(
            row
        )
    steps = all(finite(row.get("step")) is not None for row in listed)
    losses = {_place(row, steps): loss for row in listed if (loss := finite(row.get("loss"))) is not None}
    drawn = figure(height=460 if losses else 380)
    looks = [*ARMS.values(), LOOKS["tuned"], LOOKS["induced"]]
    for number, its in enumerate(by_line.values()):
        _line(drawn, its, looks[number % len(looks)], steps)
    drawn.add_hline(y=0, line={"color": QUIET, "width": 1})
    drawn.update_yaxes(title={"text": "Δ from the base"})
    if steps:
        drawn.update_xaxes(title={"text": "step"})
    if losses:
        drawn.add_scatter(
            x=list(losses), y=list(losses.values()), name="loss", yaxis="y2", mode="lines+markers",
            line={"color": QUIET, "width": 1.5}, marker={"size": 4},
            hovertemplate="step %{x}<br>loss %{y:.3g}<extra></extra>",
        )  # fmt: skip
        drawn.update_layout(
            yaxis={"domain": [0.3, 1]},
            xaxis={"anchor": "y2"},
            yaxis2={"domain": [0, 0.22], "title": {"text": "loss"}, "gridcolor": RULE, "anchor": "x"},
        )
    return drawn


def _line(drawn: go.Figure, its: list[Row], look: Any, steps: bool) -> None:
    kept = [row for row in its if finite(row.get("delta")) is not None]
    if not kept:
        return
    first = kept[0]
    name = plain(_name(first))
    x = [_place(row, steps) for row in kept]
    low, high = (finite(first.get(side)) for side in ("benign_low", "benign_high"))
    if low is not None and high is not None and len(x) > 1:
        drawn.add_scatter(
            x=[x[0], x[-1], x[-1], x[0]], y=[low, low, high, high], fill="toself", mode="lines",
            fillcolor=_faint(look.colour), line={"width": 0}, legendgroup=name, showlegend=False,
            hoverinfo="skip",
        )  # fmt: skip
    readings = [Reading(finite(r.get("delta")), finite(r.get("low")), finite(r.get("high"))) for r in kept]
    mark = marker(look, 8)
    drawn.add_scatter(
        x=x,
        y=[reading.value for reading in readings],
        name=name,
        legendgroup=name,
        mode="lines+markers" if steps else "markers",
        line={"color": look.colour, "width": 1.5},
        marker={**mark, "symbol": ["circle" if row.get("outside") else "circle-open" for row in kept]},
        error_y=whiskers(readings, look.colour, 1.2),
        customdata=[_facts(row, name) for row in kept],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _name(row: Row) -> str:
    if row.get("kind") == "direction":
        return str(row["name"])
    return latent_name(row) + (f" ({row['name']})" if row.get("name") else "")


def _place(row: Row, steps: bool) -> Any:
    return row["step"] if steps else plain(row.get("point"))


def _facts(row: Row, name: str) -> str:
    said = [name, f"{'step ' if row.get('step') is not None else ''}{plain(row.get('point'))}"]
    for column, words in (
        ("delta", "Δ"),
        ("q_value", "q"),
        ("benign_low", "benign from"),
        ("benign_high", "to"),
    ):
        number = finite(row.get(column))
        if number is not None:
            said.append(f"{words} {number:.3g}")
    if row.get("outside") is not None:
        said.append("outside the benign band" if row["outside"] else "inside the benign band")
    return "<br>".join(said)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},.10)"
