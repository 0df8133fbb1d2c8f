"""Runs that were watched: how far the persona latent went, how misaligned the model was, by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, plain
from persona_probe.figures.style import ARMS, LOOKS, QUIET, figure, percent_axis

if TYPE_CHECKING:
    import plotly.graph_objects as go


def alarms(runs: Sequence[Row], threshold: float, level: float) -> go.Figure:
    """The latent's shift below, behaviour above where it was followed; dashed are the two thresholds.

    ``runs``: ``{name, bad, history: [{step, shift}], along: [{step, misaligned}]}``; grey are benign.
    """
    drawn = figure(height=460)
    seen: set[bool] = set()
    for run in runs:
        bad = bool(run["bad"])
        look = LOOKS["tuned"] if bad else LOOKS["null"]
        style = {"color": look.colour, "width": 1.8 if bad else 1.0}
        words = "bad" if bad else "benign, not used for the threshold"
        for axis, column, rows in (
            ("y", "misaligned", run.get("along") or []),
            ("y2", "shift", run["history"]),
        ):
            drawn.add_scatter(
                x=[row["step"] for row in rows], y=[row[column] for row in rows], yaxis=axis,
                mode="lines", line=style, name=words, legendgroup=words,
                showlegend=axis == "y2" and bad not in seen,
                hovertemplate=f"{plain(run['name'])}<br>step %{{x}}: %{{y:.3g}}<extra></extra>",
            )  # fmt: skip
        seen.add(bad)
    for axis, value, colour in (("y", level, QUIET), ("y2", threshold, ARMS["latent"].colour)):
        drawn.add_shape(
            type="line", x0=0, x1=1, xref="x domain", y0=value, y1=value, yref=axis,
            line={"color": colour, "width": 1, "dash": "dash"},
        )  # fmt: skip
    drawn.update_layout(
        xaxis={"title": {"text": "step"}, "anchor": "y2"},
        yaxis={**percent_axis("misaligned elsewhere"), "domain": [0.55, 1]},
        yaxis2={"domain": [0, 0.45], "title": {"text": "Δ persona latent"}},
    )
    return drawn
