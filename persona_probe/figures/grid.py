"""Which fix cures which fine-tune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, finite, percent, plain, rows
from persona_probe.figures.style import INK, figure

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SCALE = [[0.0, "#f2f6fa"], [0.5, "#e7a97c"], [1.0, "#c8460e"]]


def transfer(cells: Sequence[Row] | object, *, column: str = "misaligned") -> go.Figure:
    """A cell per fix (down) and tune (across), its rate written in it; on the diagonal, in bold, a
    fix on the tune that it was found on.

    Args:
        cells: rows ``{fix, tune, own, misaligned, low, high, incoherent}``.
    """
    listed = rows(cells)
    fixes = list(dict.fromkeys(str(row["fix"]) for row in listed))
    tunes = list(dict.fromkeys(str(row["tune"]) for row in listed))
    at = {(str(row["fix"]), str(row["tune"])): row for row in listed}

    def written(fix: str, tune: str) -> str:
        row = at.get((fix, tune), {})
        text = percent(row.get(column))
        return f"<b>{text}</b>" if row.get("own") else text

    def hovered(fix: str, tune: str) -> str:
        row = at.get((fix, tune), {})
        return f"incoherent {percent(row.get('incoherent'))}"

    drawn = figure(height=110 + 34 * len(fixes), legend=False)
    drawn.add_heatmap(
        x=[plain(tune) for tune in tunes],
        y=[plain(fix) for fix in fixes],
        z=[[finite(at.get((fix, tune), {}).get(column)) for tune in tunes] for fix in fixes],
        text=[[written(fix, tune) for tune in tunes] for fix in fixes],
        customdata=[[hovered(fix, tune) for tune in tunes] for fix in fixes],
        texttemplate="%{text}",
        textfont={"color": INK, "size": 12},
        colorscale=_SCALE,
        zmin=0,
        zmax=1,
        xgap=2,
        ygap=2,
        showscale=False,
        hovertemplate="%{y} on %{x}: %{z:.1%}<br>%{customdata}<extra></extra>",
    )
    drawn.update_layout(
        xaxis={"title": {"text": "on the fine-tune"}, "side": "top", "showgrid": False},
        yaxis={"title": {"text": "fix found on"}, "autorange": "reversed", "showgrid": False},
    )
    return drawn
