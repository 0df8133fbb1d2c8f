"""Doses of bad data: behaviour above, the persona latent below, each with its benign band."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_probe.figures.cells import Reading, Row, finite
from persona_probe.figures.style import ARMS, LOOKS, QUIET, Look, figure, marker, percent_axis, whiskers

if TYPE_CHECKING:
    import plotly.graph_objects as go


def doses(ladder: Row) -> go.Figure:
    """Two panels over the share of bad rows; a filled marker is a mean outside the band.

    ``ladder``: ``{bands: {misaligned, "shift persona"}, steps: [{share, behaviour: {rate, low, high},
    latent: {shift, low, high}}]}``. Shares are evenly spaced: most of what happens, happens below 25%.
    """
    steps = ladder["steps"]
    drawn = figure(height=460, legend=False)
    names = [f"{100 * step['share']:.0f}%" for step in steps]
    behaviour = [
        Reading(one["rate"], finite(one.get("low")), finite(one.get("high")))
        for one in (step["behaviour"] for step in steps)
    ]
    latent = [
        Reading(one["shift"], finite(one.get("low")), finite(one.get("high")))
        for one in (step["latent"] for step in steps)
    ]
    bands = ladder["bands"]
    _panel(drawn, names, behaviour, bands["misaligned"], LOOKS["tuned"], "y", "misaligned %{y:.1%}")
    _panel(drawn, names, latent, bands["shift persona"], ARMS["latent"], "y2", "latent %{y:+.2f}")
    drawn.update_layout(
        xaxis={"title": {"text": "bad rows among helpful ones of the same domain"}, "anchor": "y2",
               "type": "category"},
        yaxis={**percent_axis("misaligned elsewhere"), "domain": [0.55, 1]},
        yaxis2={"domain": [0, 0.45], "title": {"text": "Δ persona latent"}},
    )  # fmt: skip
    return drawn


def _panel(
    drawn: go.Figure, x: list[str], readings: list[Reading], band: float, look: Look, axis: str, words: str
) -> None:
    drawn.add_scatter(
        x=[x[0], x[-1]], y=[band, band], yaxis=axis, mode="lines", hoverinfo="skip",
        line={"color": QUIET, "width": 1, "dash": "dash"},
    )  # fmt: skip
    outside = [reading.value is not None and reading.value > band for reading in readings]
    drawn.add_scatter(
        x=x, y=[reading.value for reading in readings], yaxis=axis, mode="lines+markers",
        line={"color": look.colour, "width": 2},
        marker={**marker(look, 8), "symbol": ["circle" if one else "circle-open" for one in outside]},
        error_y=whiskers(readings, look.colour, 1.5),
        hovertemplate=f"%{{x}} bad rows<br>{words}<extra></extra>",
    )  # fmt: skip
    drawn.add_annotation(
        x=x[0], y=band, yref=axis, text="benign band reaches here", showarrow=False, xanchor="left",
        yanchor="bottom", font={"size": 11, "color": QUIET},
    )  # fmt: skip
