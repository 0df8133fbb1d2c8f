"""How long the activations of a capture are: by site and model, over documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, finite, rows
from persona_probe.figures.style import ARMS, figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def norms(table: Sequence[Row] | object) -> go.Figure:
    """Boxes over documents of the mean norm of their counted tokens: quarters, with whiskers at 5 and 95%.

    Args:
        table: rows ``{model, site, norm}``, one per document; a missing norm is left out.
    """
    import plotly.graph_objects as go

    found: dict[str, dict[str, list[float]]] = {}
    for row in rows(table):
        norm = finite(row.get("norm"))
        if norm is not None:
            found.setdefault(str(row["model"]), {}).setdefault(str(row["site"]), []).append(norm)
    drawn = figure(height=320, boxmode="group")
    for (model, sites), look in zip(found.items(), _looks(len(found)), strict=True):
        cuts = [quantiles(values) for values in sites.values()]
        names = ("lowerfence", "q1", "median", "q3", "upperfence")
        boxes = {name: [cut[place] for cut in cuts] for place, name in enumerate(names)}
        drawn.add_trace(go.Box(x=list(sites), name=model, line={"color": look, "width": 1.5}, **boxes))
    drawn.update_yaxes(title_text="mean norm of a document's activations", rangemode="tozero")
    return drawn


def quantiles(values: Sequence[float]) -> list[float]:
    """The values at `SHARES`, between two neighbours on the line that joins them."""
    ordered = sorted(values)
    found: list[float] = []
    for share in SHARES:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (place - below) * (ordered[above] - ordered[below]))
    return found


def _looks(count: int) -> list[str]:
    colours = [look.colour for look in ARMS.values()]
    return [colours[i % len(colours)] for i in range(count)]
