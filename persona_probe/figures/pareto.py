"""Defences: misalignment that spread against the task that was learnt; both at once is the aim."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, finite, plain, rows
from persona_probe.figures.style import ARMS, LOOKS, QUIET, figure, marker, percent_axis

if TYPE_CHECKING:
    import plotly.graph_objects as go


def pareto(table: object) -> go.Figure:
    """A point per arm, right and low is good, with the frontier of those that no other beats on both.

    ``table``: rows ``{arm, misaligned, misaligned_low, misaligned_high, in_domain, incoherent,
    holds}``. A filled marker holds every bound, an open one does not; the arm named "none" is the
    undefended one. Arms without either figure are named under the plot, not drawn.
    """
    listed = rows(table)
    drawn_rows = [row for row in listed if None not in _place(row)]
    drawn = figure(height=440, legend=False)
    edge = frontier(drawn_rows)
    drawn.add_scatter(
        x=[row["in_domain"] for row in edge],
        y=[row["misaligned"] for row in edge],
        mode="lines",
        showlegend=False,
        line={"color": QUIET, "width": 1, "dash": "dot"},
        hoverinfo="skip",
    )
    for row in drawn_rows:
        look = LOOKS["tuned"] if row["arm"] == "none" else ARMS["latent"]
        x, y = row["in_domain"], row["misaligned"]
        low, high = (finite(row.get(f"misaligned_{end}")) for end in ("low", "high"))
        mark = marker(look, 11)
        drawn.add_scatter(
            x=[x],
            y=[y],
            mode="markers+text",
            text=[plain(row["arm"])],
            textposition=_beside(x, undefended=row["arm"] == "none"),
            showlegend=False,
            textfont={"size": 11, "color": QUIET},
            marker={**mark, "symbol": "circle" if row.get("holds") else "circle-open"},
            error_y={
                "type": "data", "symmetric": False, "color": look.colour, "thickness": 1.2, "width": 0,
                "array": [0 if high is None else max(0.0, high - y)],
                "arrayminus": [0 if low is None else max(0.0, y - low)],
            },
            hovertemplate=_facts(row) + "<extra></extra>",
        )  # fmt: skip
    missing = [plain(row["arm"]) for row in listed if None in _place(row)]
    if missing:
        drawn.add_annotation(
            text=f"not measured: {', '.join(missing)}", showarrow=False, font={"color": QUIET, "size": 11},
            xref="paper", yref="paper", x=0, y=1, yanchor="bottom", xanchor="left",
        )  # fmt: skip
    drawn.update_xaxes(**percent_axis("in-domain task learnt"))
    drawn.update_yaxes(**percent_axis("misaligned elsewhere"))
    return drawn


def frontier(table: object) -> list[Row]:
    """The rows that no other is at least as good as on both axes and better on one, by task learnt."""
    known = [row for row in rows(table) if None not in _place(row)]

    def beaten(row: Row) -> bool:
        x, y = row["in_domain"], row["misaligned"]
        return any(
            other["in_domain"] >= x
            and other["misaligned"] <= y
            and (other["in_domain"] > x or other["misaligned"] < y)
            for other in known
        )

    return sorted((row for row in known if not beaten(row)), key=lambda row: row["in_domain"])


def _beside(x: float, *, undefended: bool) -> str:
    """Where a name stands: off its error bar, on the side where there is room, and the undefended arm's
    above, because a defence that does nothing lies right beside it.
    """
    return f"{'top' if undefended else 'bottom'} {'left' if x > 0.5 else 'right'}"


def _place(row: Row) -> tuple[float | None, float | None]:
    return finite(row.get("in_domain")), finite(row.get("misaligned"))


def _facts(row: Row) -> str:
    said = [plain(row["arm"])]
    for name, words in (
        ("misaligned", "misaligned"),
        ("in_domain", "in domain"),
        ("incoherent", "incoherent"),
        ("trigger", "under triggers"),
        ("benign_skill", "benign skill"),
    ):
        value = finite(row.get(name))
        if value is not None:
            said.append(f"{words} {100 * value:.0f}%")
    return "<br>".join(said)
