"""Several models on the same questions: their paired differences, and where their scores lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, finite, plain
from persona_probe.figures.style import ARMS, INK, LOOKS, QUIET, RULE, figure, percent_axis

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLOURS = [look.colour for look in ARMS.values()]


def differences(rows: Sequence[Row], *, word: str = "misaligned") -> go.Figure:
    """Forest plot of paired differences ``{arm, against, difference, low, high}``, a line at 0.

    An interval that keeps clear of 0 is drawn dark, one that does not in grey.
    """
    drawn = figure(height=70 + 34 * max(1, len(rows)), legend=False)
    names = [f"{plain(row['arm'])} − {plain(row['against'])}" for row in rows]
    ends = [0.02]
    for name, row in zip(names, rows, strict=True):
        value, low, high = (finite(row.get(key)) for key in ("difference", "low", "high"))
        if value is None:
            drawn.add_annotation(
                x=0, y=name, text="not measured", showarrow=False, xanchor="left", font={"color": QUIET}
            )
            continue
        least, most = (value if end is None else end for end in (low, high))
        colour = INK if least > 0 or most < 0 else QUIET
        ends += [abs(least), abs(most)]
        drawn.add_scatter(
            x=[value],
            y=[name],
            mode="markers",
            showlegend=False,
            marker={"color": colour, "size": 10, "symbol": "diamond"},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [most - value],
                "arrayminus": [value - least],
                "color": colour,
                "thickness": 2.5,
                "width": 0,
            },
            hovertemplate=f"{name}<br>{100 * value:+.1f} points "
            f"({100 * least:+.1f} to {100 * most:+.1f})<extra></extra>",
        )
    drawn.add_vline(x=0, line={"color": QUIET, "width": 1})
    drawn.update_yaxes(
        categoryorder="array", categoryarray=names[::-1], range=[-0.6, len(names) - 0.4], ticklabelstandoff=10
    )
    reach = max(ends)
    drawn.update_xaxes(
        **percent_axis(f"difference in {plain(word)} answers, paired by question", reach, -reach)
    )
    return drawn


def score_spread(arms: Mapping[str, Sequence[int]], *, cut: float, word: str) -> go.Figure:
    """How one score (0 to 100) is spread over the answers of each arm, as steps of ten.

    Args:
        arms: name → answers in each tenth of the scale.
        cut: the threshold on this score, drawn as a line.
    """
    drawn = figure(height=260)
    edges = list(range(0, 101, 10))
    others = cycle(_COLOURS)
    for name, counts in arms.items():
        colour = LOOKS[name].colour if name in LOOKS else next(others)
        total = sum(counts)
        if not total:
            continue
        shares = [count / total for count in counts]
        drawn.add_scatter(
            x=edges,
            y=[*shares, shares[-1]],
            mode="lines",
            name=plain(name),
            line={"color": colour, "width": 2, "shape": "hv"},
            hovertemplate=f"{plain(name)}<br>%{{y:.1%}} of {total:,} answers<extra></extra>",
        )
    drawn.add_vline(x=cut, line={"color": QUIET, "width": 1, "dash": "dash"})
    drawn.update_xaxes(title={"text": plain(word)}, range=[-1, 101], gridcolor=RULE)
    drawn.update_yaxes(**percent_axis("share of scored answers"))
    return drawn
