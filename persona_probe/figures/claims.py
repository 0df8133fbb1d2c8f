"""The two claims about a fix, *necessity* and *control*, each with its own figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_probe.figures.cells import MISSING, Row, finite, plain, read, spoken
from persona_probe.figures.style import BAND, LOOKS, QUIET, figure, marker, percent_axis, whiskers

if TYPE_CHECKING:
    import plotly.graph_objects as go


def necessity(fixes: Sequence[Row]) -> go.Figure:
    """Share of the excess misalignment that goes when a fix only restores the base's level (gain
    at most 1).

    Each row: ``name`` and ``necessity`` ``{fraction, low, high}``. 0 is nothing, 1 is all of the
    excess.
    """
    drawn = figure(height=64 + 44 * max(1, len(fixes)), legend=False)
    look, names = LOOKS["steered"], [plain(fix.get("name", "fix")) for fix in fixes]
    readings = [read(fix.get("necessity"), "fraction") for fix in fixes]
    lowest = min([0.0, *(r.low for r in readings if r.low is not None)])
    for name, reading in zip(names, readings, strict=True):
        if reading.value is None:
            _absent(drawn, name)
            continue
        drawn.add_scatter(
            x=[reading.value],
            y=[name],
            mode="markers",
            showlegend=False,
            marker=marker(look),
            error_x=whiskers([reading], look.colour, 2.5),
            hovertemplate=f"{name}<br>necessity {spoken(reading)}<extra></extra>",
        )
    for edge in (0.0, 1.0):
        drawn.add_vline(x=edge, line={"color": QUIET, "width": 1})
    drawn.update_xaxes(**percent_axis("share of the excess removed, gain ≤ 1", lowest=lowest))
    _order(drawn, names)
    return drawn


def control(
    fixes: Sequence[Row],
    tuned: Row | None = None,
    base: Row | None = None,
    *,
    word: str = "misaligned",
) -> go.Figure:
    """The rate each fix reaches at its calibrated gain, from the fine-tuned rate it starts at;
    gain above 1 is said.

    Each row: ``name``, ``gain`` and a tally under ``rates`` (or in the row itself).
    """
    drawn = figure(height=64 + 44 * max(1, len(fixes)), legend=False)
    look, start, floor = LOOKS["steered"], read(tuned or {}), read(base or {})
    names = [plain(fix.get("name", "fix")) for fix in fixes]
    highest = max(0.1, start.high or start.value or 0.0)
    for fix, name in zip(fixes, names, strict=True):
        reading, gain = read(fix.get("rates", fix)), gain_words(fix.get("gain"))
        if reading.value is None:
            _absent(drawn, name)
            continue
        highest = max(highest, reading.high or reading.value)
        if start.value is not None:
            drawn.add_scatter(
                x=[start.value, reading.value],
                y=[name, name],
                mode="lines",
                showlegend=False,
                hoverinfo="skip",
                line={"color": BAND, "width": 1.5, "dash": "dot"},
            )
            drawn.add_scatter(
                x=[start.value],
                y=[name],
                mode="markers",
                showlegend=False,
                hoverinfo="skip",
                marker=marker(LOOKS["tuned"], 9),
            )
        drawn.add_scatter(
            x=[reading.value],
            y=[name],
            mode="markers",
            showlegend=False,
            marker=marker(look),
            error_x=whiskers([reading], look.colour, 2.5),
            hovertemplate=f"{name}<br>{plain(word)} {spoken(reading)}<br>{gain}<extra></extra>",
        )
        drawn.add_annotation(
            x=reading.high or reading.value,
            y=name,
            text=gain,
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            xshift=4,
            yshift=1,
            font={"size": 11, "color": QUIET},
        )
    if floor.value is not None:
        drawn.add_vline(x=floor.value, line={"color": LOOKS["base"].colour, "width": 1.5, "dash": "dash"})
    drawn.update_xaxes(**percent_axis(f"{plain(word)}, at the calibrated gain", highest))
    _order(drawn, names)
    return drawn


def gain_words(gain: object) -> str:
    """``gain 2, over-corrects``: a gain above 1 pushes past what undoing the change would."""
    number = finite(gain)
    if number is None:
        return ""
    return f"gain {number:g}" + (", over-corrects" if number > 1 else "")


def _absent(drawn: go.Figure, name: str) -> None:
    drawn.add_annotation(x=0, y=name, text=MISSING, showarrow=False, xanchor="left", font={"color": QUIET})


def _order(drawn: go.Figure, names: list[str]) -> None:
    drawn.update_yaxes(
        categoryorder="array",
        categoryarray=names[::-1],
        range=[-0.6, max(1, len(names)) - 0.3],
        ticklabelstandoff=8,
    )
