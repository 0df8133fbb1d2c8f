"""What each layer shows: how well a direction separates, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, finite, plain, rows
from persona_probe.figures.style import ARMS, LOOKS, figure, marker

if TYPE_CHECKING:
    import plotly.graph_objects as go

_METHODS = {"means": ARMS["difference of means"], "probe": LOOKS["induced"]._replace(words="logistic probe")}


def separability(points: Sequence[Row] | object) -> go.Figure:
    """Held-out AUC (upper panel) and gap between the sides (lower panel) by block, a line per method.

    Args:
        points: rows ``{block, method, auc, gap, best}``; the chosen one is ringed.
    """
    listed = [row for row in rows(points) if finite(row.get("auc")) is not None]
    drawn = figure(height=420)
    for method in dict.fromkeys(str(row.get("method")) for row in listed):
        look = _METHODS.get(method, LOOKS["baseline"]._replace(words=method))
        own = sorted(
            (row for row in listed if str(row.get("method")) == method), key=lambda row: row["block"]
        )
        for column, axis in (("auc", "y"), ("gap", "y2")):
            drawn.add_scatter(
                x=[row["block"] for row in own],
                y=[finite(row.get(column)) for row in own],
                yaxis=axis,
                mode="lines+markers",
                line={"color": look.colour, "width": 2},
                marker=marker(look, 7),
                name=plain(look.words),
                legendgroup=method,
                showlegend=axis == "y",
                hovertemplate=f"{plain(look.words)}, block %{{x}}<br>{column} %{{y:.3f}}<extra></extra>",
            )
    chosen = [row for row in listed if row.get("best")]
    if chosen:
        drawn.add_scatter(
            x=[row["block"] for row in chosen],
            y=[row["auc"] for row in chosen],
            mode="markers",
            marker=marker(LOOKS["tuned"]._replace(symbol="circle-open"), 18),
            name="chosen",
            hoverinfo="skip",
        )
    lowest = min([0.5, *(float(row["auc"]) for row in listed)])
    drawn.update_layout(
        xaxis={"title": {"text": "block"}, "anchor": "y2", "dtick": 1 if len(listed) < 40 else None},
        yaxis={"title": {"text": "AUC, held out"}, "domain": [0.42, 1], "range": [lowest - 0.02, 1.02]},
        yaxis2={"title": {"text": "gap (sd)"}, "domain": [0, 0.32], "nticks": 4},
    )
    return drawn
