"""Rates by arm, with their intervals; and every arm on the plane of harm and damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_probe.figures.cells import MISSING, Reading, Row, plain, read, spoken
from persona_probe.figures.style import (
    BAND,
    LOOKS,
    QUIET,
    figure,
    look_of,
    marker,
    percent_axis,
    whiskers,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go


def rates(
    arms: Mapping[str, Row | None],
    spreads: Mapping[str, Sequence[Row]] | None = None,
    *,
    column: str = "misaligned",
    word: str | None = None,
    beside: str | None = "incoherent",
) -> go.Figure:
    """Dot plot: one line per arm with ``column`` (filled) and ``beside`` (small cross), each with
    its interval.

    Args:
        arms: name → tally ``{column: {rate, low, high, n}}``; ``None`` is shown as not measured.
        spreads: name → many tallies (the nulls), drawn as one tick each.
        word: what ``column`` is called, where the trait looked for is not misalignment.
    """
    spreads, word = spreads or {}, plain(word or column.replace("_", " "))
    names = [*arms, *spreads]
    words = [plain(look_of(name).words) for name in names]
    drawn = figure(height=70 + 34 * max(1, len(names)))
    if beside:
        _beside(drawn, arms, spreads, beside)
    for name, tally in arms.items():
        look, reading = look_of(name), read(tally or {}, column)
        place = plain(look.words)
        if reading.value is None:
            drawn.add_annotation(
                x=0, y=place, text=MISSING, showarrow=False, xanchor="left", font={"color": QUIET}
            )
            continue
        drawn.add_scatter(
            x=[reading.value],
            y=[place],
            mode="markers",
            showlegend=False,
            marker=marker(look),
            error_x=whiskers([reading], look.colour, 2.5),
            hovertemplate=f"{place}<br>{word} {spoken(reading)}{_count(reading)}<extra></extra>",
        )
    for name, tallies in spreads.items():
        readings = [reading for row in tallies if (reading := read(row, column)).value is not None]
        place, look = plain(look_of(name).words), LOOKS["null"]
        drawn.add_scatter(
            x=[r.value for r in readings],
            y=[place] * len(readings),
            mode="markers",
            showlegend=False,
            marker=marker(look, 13),
            text=[spoken(r) for r in readings],
            hovertemplate=f"{place}<br>%{{text}}<extra></extra>",
        )
    drawn.add_scatter(
        x=[None],
        y=[words[0] if words else None],
        mode="markers",
        name=word,
        legendrank=1,
        marker={"color": QUIET, "symbol": "circle", "size": 9},
    )
    drawn.update_yaxes(
        categoryorder="array",
        categoryarray=words[::-1],
        range=[-0.6, len(words) - 0.4],
        ticklabelstandoff=10,
    )
    drawn.update_xaxes(**percent_axis("share of answers", _highest(arms, spreads, (column, beside))))
    return drawn


def _beside(
    drawn: go.Figure,
    arms: Mapping[str, Row | None],
    spreads: Mapping[str, Sequence[Row]],
    column: str,
) -> None:
    """The second column, light and under the first, so that the eye reads the first."""
    places: list[str] = []
    readings: list[Reading] = []
    for name, tally in arms.items():
        reading = read(tally or {}, column)
        if reading.value is not None:
            places.append(plain(look_of(name).words))
            readings.append(reading)
    for name, tallies in spreads.items():
        found = [r for row in tallies if (r := read(row, column)).value is not None]
        if found:
            middle = sorted(found, key=lambda r: r.value or 0.0)[len(found) // 2]
            places.append(plain(look_of(name).words))
            readings.append(Reading(middle.value, n=middle.n))
    drawn.add_scatter(
        x=[r.value for r in readings],
        y=places,
        mode="markers",
        name=plain(column.replace("_", " ")),
        marker={
            "color": QUIET,
            "symbol": "x-thin-open",
            "size": 7,
            "line": {"width": 1.5, "color": QUIET},
        },
        error_x=whiskers(readings, BAND, 1),
        text=[spoken(r) for r in readings],
        hovertemplate=f"%{{y}}<br>{plain(column)} %{{text}}<extra></extra>",
    )


def nulls(
    winner: Row | None,
    random_direction: Sequence[Row] = (),
    random_latent: Sequence[Row] = (),
    *,
    anchors: Mapping[str, Row | None] | None = None,
    word: str = "misaligned",
) -> go.Figure:
    """The edit and its controls on the plane of misaligned (across) and incoherent (up): a cure
    lies at the lower left.

    A control that only *damages* the model lies at the upper left, where a rate of misalignment
    alone would call it a cure. ``anchors``: name → tally of the models without an edit.
    """
    drawn, word = figure(height=400), plain(word)
    furthest = [0.1, 0.1]
    for name, tallies, symbol in (
        ("random directions, same realised norm", random_direction, "triangle-up-open"),
        ("random live latents, same search budget", random_latent, "circle-open"),
    ):
        points = [(read(row), read(row, "incoherent")) for row in tallies]
        points = [pair for pair in points if pair[0].value is not None and pair[1].value is not None]
        _reach(furthest, points)
        drawn.add_scatter(
            x=[x.value for x, _ in points],
            y=[y.value for _, y in points],
            mode="markers",
            name=name,
            marker={
                "color": "#8b94a3",
                "symbol": symbol,
                "size": 8,
                "line": {"width": 1.5, "color": "#8b94a3"},
            },
            text=[f"{word} {spoken(x)}<br>incoherent {spoken(y)}" for x, y in points],
            hovertemplate=f"{name}<br>%{{text}}<extra></extra>",
        )
    for name, tally in {**(anchors or {}), "steered": winner}.items():
        look = look_of(name)
        x, y = read(tally or {}), read(tally or {}, "incoherent")
        if x.value is None or y.value is None:
            continue
        _reach(furthest, [(x, y)])
        drawn.add_scatter(
            x=[x.value],
            y=[y.value],
            mode="markers",
            showlegend=False,
            marker=marker(look, 12),
            error_x=whiskers([x], look.colour, 1.5),
            error_y=whiskers([y], look.colour, 1.5),
            text=[f"{word} {spoken(x)}<br>incoherent {spoken(y)}"],
            hovertemplate=f"{plain(look.words)}<br>%{{text}}<extra></extra>",
        )
        beside = x.value < 0.6 * furthest[0]
        drawn.add_annotation(
            x=x.value,
            y=y.value,
            text=plain(look.words),
            showarrow=False,
            font={"color": look.colour, "size": 12},
            xanchor="left" if beside else "center",
            xshift=10 if beside else 0,
            yanchor="bottom" if name == "steered" else "top",
            yshift=4 if name == "steered" else -3 if beside else -10,
        )
    drawn.update_xaxes(**percent_axis(word, furthest[0]))
    drawn.update_yaxes(**percent_axis("incoherent", furthest[1]))
    return drawn


def _reach(furthest: list[float], points: Sequence[tuple[Reading, Reading]]) -> None:
    for pair in points:
        for axis, reading in enumerate(pair):
            furthest[axis] = max(furthest[axis], reading.high or 0.0, reading.value or 0.0)


def _highest(
    arms: Mapping[str, Row | None],
    spreads: Mapping[str, Sequence[Row]],
    columns: Sequence[str | None],
) -> float:
    tallies: list[Any] = [*arms.values(), *(row for many in spreads.values() for row in many)]
    found = [read(tally or {}, column) for tally in tallies for column in columns if column]
    return max([0.1, *(r.high or r.value or 0.0 for r in found)])


def _count(reading: Reading) -> str:
    return "" if reading.n is None else f", n = {reading.n:,}"
