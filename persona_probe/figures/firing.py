"""How strongly a latent fires, and where in a document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_probe.figures.cells import finite, rows
from persona_probe.figures.style import ARMS, QUIET, figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def firing(histogram: object, places: object) -> go.Figure:
    """Two panels: tokens by activation (rows ``{low, high, tokens}``), and firing rate by place in the
    document (``{first, last, tokens, rate}``).
    """
    sizes, where = rows(histogram), rows(places)
    colour = ARMS["latent"].colour
    drawn = figure(height=270, legend=False)
    drawn.add_bar(
        x=[f"{finite(row['low']) or 0:.3g}" for row in sizes],
        y=[row["tokens"] for row in sizes],
        marker_color=colour,
        customdata=[f"{row['low']:.3g} to {row['high']:.3g}: {row['tokens']:,} tokens" for row in sizes],
        hovertemplate="%{customdata}<extra></extra>",
    )
    drawn.add_bar(
        x=[_span(row["first"], row["last"]) for row in where],
        y=[row["rate"] for row in where],
        xaxis="x2",
        yaxis="y2",
        marker_color=colour,
        customdata=[f"{row['rate']:.2%} of {row['tokens']:,} tokens" for row in where],
        hovertemplate="%{customdata}<extra></extra>",
    )
    drawn.update_layout(
        bargap=0.15,
        showlegend=False,
        xaxis={"domain": [0, 0.46], "title": {"text": "activation"}, "type": "category", "showgrid": False},
        xaxis2={
            "domain": [0.56, 1],
            "title": {"text": "place in the document"},
            "type": "category",
            "showgrid": False,
        },
        yaxis2={"tickformat": ".1~%", "anchor": "x2", "rangemode": "tozero"},
        margin_t=30,
    )
    # above the panels, where on a narrow page no bar of the other panel lies under them
    for axis, title in (("x", "tokens"), ("x2", "share of tokens it fires at")):
        drawn.add_annotation(
            text=title, xref=f"{axis} domain", x=0, xanchor="left", yref="paper", y=1, yanchor="bottom",
            showarrow=False, font={"color": QUIET, "size": 12},
        )  # fmt: skip
    return drawn


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"
