"""The one visual language of every figure: palette, shapes, template, intervals.

Colours are told apart under protanopia, deuteranopia and tritanopia (tested), and each also has
its own shape, so that nothing rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from persona_probe.figures.cells import Reading

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK: Final = "#14171c"
QUIET: Final = "#5a6270"
RULE: Final = "#e3e6ea"
BAND: Final = "#b9c0ca"
FONT: Final = '-apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


class Look(NamedTuple):
    """Colour, marker and words of one kind of arm."""

    colour: str
    symbol: str
    words: str


LOOKS: Final[dict[str, Look]] = {
    "base": Look("#7b8494", "circle-open", "base"),
    "tuned": Look("#c8460e", "diamond", "fine-tuned"),
    "steered": Look("#0a5fa5", "circle", "fine-tuned, fix on"),
    "induced": Look("#dc9a00", "triangle-up", "base, persona added"),
    "baseline": Look("#2e3440", "square-open", "baseline"),
    "null": Look("#7b8494", "line-ns-open", "null"),
}

ARMS: Final[dict[str, Look]] = {
    "latent": Look("#0a5fa5", "circle", "one latent"),
    "set": Look("#101a3c", "square", "set of latents"),
    "difference of means": Look("#0a9068", "diamond-open", "difference of means"),
    "random direction": Look("#8b94a3", "line-ew-open", "random directions"),
    "random latent": Look("#5a6270", "line-ns-open", "random latents"),
    "control": Look("#8b94a3", "square-open", "control"),
}

OTHERS: Final = (
    ("#0a5fa5", "circle"),
    ("#dc9a00", "triangle-up"),
    ("#0a9068", "diamond-open"),
    ("#101a3c", "square"),
)
"""Colour and marker of arms that are known by their own names alone."""


def look_of(arm: str) -> Look:
    """The look of a named arm; an arm that is not known is a baseline under its own name."""
    known = LOOKS.get(arm) or ARMS.get(arm)
    return known or LOOKS["baseline"]._replace(words=arm.replace("_", " "))


def looks_of(arms: Iterable[str]) -> dict[str, Look]:
    """The looks of arms drawn together: those that are not known are told apart, in their order."""
    names = list(dict.fromkeys(arms))
    unknown = [name for name in names if name not in LOOKS and name not in ARMS]
    if len(unknown) < 2:
        return {name: look_of(name) for name in names}
    told = {name: Look(*OTHERS[i % len(OTHERS)], name.replace("_", " ")) for i, name in enumerate(unknown)}
    return {name: told.get(name) or look_of(name) for name in names}


def figure(height: int, *, legend: bool = True, **layout: Any) -> go.Figure:
    """An empty figure in the house style, ``height`` pixels high and as wide as its place."""
    import plotly.graph_objects as go

    drawn = go.Figure()
    drawn.update_layout(template=template(), height=height, margin_t=36 if legend else 8, **layout)
    return drawn


def template() -> go.layout.Template:
    """The plotly template: no frames, hairline grid, one font, labels in full."""
    import plotly.graph_objects as go

    axis = {
        "showgrid": True,
        "gridcolor": RULE,
        "gridwidth": 1,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "tickfont": {"color": QUIET, "size": 12},
        "automargin": True,
        "title": {"font": {"color": QUIET, "size": 12}, "standoff": 10},
    }
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 14, "t": 36, "b": 8},
            "colorway": [look.colour for look in ARMS.values()],
            "xaxis": axis,
            "yaxis": axis,
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1,
                "yanchor": "bottom",
                "font": {"size": 12, "color": QUIET},
                "itemwidth": 30,
                "tracegroupgap": 0,
            },
            "hoverlabel": {
                "bgcolor": "#ffffff",
                "bordercolor": BAND,
                "align": "left",
                "font": {"family": FONT, "size": 12, "color": INK},
            },
            "hovermode": "closest",
            "dragmode": False,
        }
    )


def marker(look: Look, size: float = 11) -> dict[str, Any]:
    """The mark of one kind of arm, its outline in its own colour."""
    return {
        "color": look.colour,
        "symbol": look.symbol,
        "size": size,
        "line": {"width": 2, "color": look.colour},
    }


def whiskers(readings: Sequence[Reading], colour: str, thickness: float = 2) -> dict[str, Any]:
    """Plotly's asymmetric error bars; none where an interval was not measured."""
    above = [0.0 if r.value is None or r.high is None else max(0.0, r.high - r.value) for r in readings]
    below = [0.0 if r.value is None or r.low is None else max(0.0, r.value - r.low) for r in readings]
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "color": colour,
        "thickness": thickness,
        "width": 0,
    }


def percent_axis(title: str, highest: float = 1.0, lowest: float = 0.0) -> dict[str, Any]:
    """An axis in percent with room at both ends for a whole marker."""
    pad = 0.03 * (highest - lowest)
    return {"title": {"text": title}, "tickformat": ".0%", "range": [lowest - pad, highest + pad]}
