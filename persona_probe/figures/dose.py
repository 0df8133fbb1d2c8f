"""Dose and response: behaviour by the strength of an edit, against controls as strong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Reading, Row, finite, plain, rows
from persona_probe.figures.style import (
    QUIET,
    RULE,
    Look,
    figure,
    look_of,
    looks_of,
    marker,
    percent_axis,
    whiskers,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Both bands are grey and lie on one another: one is filled, the other has an edge.
BANDS = {
    "random direction": {"fillcolor": "rgba(139,148,163,.28)", "line": {"width": 0}},
    "random latent": {
        "fillcolor": "rgba(90,98,112,.10)",
        "line": {"width": 1, "dash": "dot", "color": "#5a6270"},
    },
}


def dose_response(
    points: Sequence[Row] | object,
    nulls: Sequence[Row] | object = None,
    *,
    reference: float | None = None,
    word: str = "misaligned",
) -> go.Figure:
    """Misaligned (upper panel, with intervals) and incoherent answers (lower panel) by strength,
    one line per arm.

    Args:
        points: rows ``{arm, strength, strength_unit, misaligned, low, high, incoherent}`` of one
            direction and unit. Arms that begin with "random" are taken as nulls.
        nulls: more null rows; each null arm is drawn as the band between its lowest and highest
            run at each strength.
        reference: the rate without an edit.
    """
    listed = [row for row in rows(points) if finite(row.get("strength")) is not None]
    controls = [row for row in rows(nulls) if finite(row.get("strength")) is not None]
    controls += [row for row in listed if str(row.get("arm")).startswith("random")]
    listed = [row for row in listed if not str(row.get("arm")).startswith("random")]
    drawn = figure(height=460)
    shades = [shade for arm, group in _by_arm(controls) for shade in _band(drawn, arm, group)]
    looks = looks_of(str(row.get("arm")) for row in listed)
    lines = [
        high for arm, group in _by_arm(listed) for high in _line(drawn, arm, looks[arm], group, plain(word))
    ]
    unit = next(
        (str(row["strength_unit"]) for row in [*listed, *controls] if row.get("strength_unit")),
        "strength",
    )
    strengths = [float(row["strength"]) for row in [*listed, *controls]]
    over = unit == "gain" and bool(strengths) and max(strengths) > 1
    if over:
        drawn.add_vrect(
            x0=1,
            x1=max(strengths) * 1.03,
            fillcolor=RULE,
            opacity=0.4,
            layer="below",
            line={"width": 0},
            annotation={"text": "over-corrects", "font": {"size": 11, "color": QUIET}},
            annotation_position="top right",
            exclude_empty_subplots=False,
        )
    if reference is not None:
        drawn.add_shape(
            type="line",
            x0=0,
            x1=1,
            xref="x domain",
            y0=reference,
            y1=reference,
            yref="y",
            line={"color": QUIET, "width": 1, "dash": "dash"},
        )
    # where a word stands in the upper corner, room for it above everything else
    tallest = max([0.1, reference or 0.0, *shades, *lines]) * (1.12 if over else 1.0)
    broken = max([0.1, *(finite(row.get("incoherent")) or 0.0 for row in [*listed, *controls])])
    drawn.update_layout(
        xaxis={"title": {"text": plain(unit)}, "anchor": "y2"},
        yaxis={**percent_axis(plain(word), tallest), "domain": [0.37, 1]},
        yaxis2={**percent_axis("incoherent", broken), "domain": [0, 0.28], "nticks": 4},
    )
    return drawn


def _by_arm(listed: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    ordered = sorted(listed, key=lambda row: (str(row.get("arm")), float(row["strength"])))
    return [(arm, list(group)) for arm, group in groupby(ordered, key=lambda row: str(row.get("arm")))]


def _line(drawn: go.Figure, arm: str, look: Look, group: Sequence[Row], word: str) -> list[float]:
    readings = [
        Reading(finite(r.get("misaligned")), finite(r.get("low")), finite(r.get("high"))) for r in group
    ]
    x = [float(row["strength"]) for row in group]
    style = {
        "mode": "lines+markers",
        "line": {"color": look.colour, "width": 2},
        "marker": marker(look, 7),
        "legendgroup": plain(arm),
    }
    name = plain(look.words)
    drawn.add_scatter(
        x=x,
        y=[r.value for r in readings],
        name=name,
        error_y=whiskers(readings, look.colour, 1.5),
        hovertemplate=f"{name} at %{{x:.3g}}<br>{word} %{{y:.1%}}<extra></extra>",
        **style,
    )
    drawn.add_scatter(
        x=x,
        y=[finite(row.get("incoherent")) for row in group],
        yaxis="y2",
        showlegend=False,
        hovertemplate=f"{name} at %{{x:.3g}}<br>incoherent %{{y:.1%}}<extra></extra>",
        **style,
    )
    return [r.high or r.value or 0.0 for r in readings]


def _band(drawn: go.Figure, arm: str, group: Sequence[Row]) -> list[float]:
    """The range of a null arm's runs at each strength, as one filled band per panel."""
    highest: list[float] = []
    for column, axis in (("misaligned", "y"), ("incoherent", "y2")):
        runs = [
            (strength, values)
            for strength, at in groupby(group, key=lambda row: float(row["strength"]))
            if (values := [v for row in at if (v := finite(row.get(column))) is not None])
        ]
        x = [strength for strength, _ in runs]
        low, high = [min(values) for _, values in runs], [max(values) for _, values in runs]
        drawn.add_scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            yaxis=axis,
            fill="toself",
            mode="lines",
            name=plain(look_of(arm).words),
            legendgroup=plain(arm),
            legendrank=2000,
            showlegend=axis == "y",
            hoverinfo="skip",
            **BANDS.get(arm, BANDS["random direction"]),
        )
        if axis == "y":
            highest = high
    return highest
