"""Reward by update, from before any warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_probe.figures.cells import Row, finite, plain
from persona_probe.figures.style import ARMS, LOOKS, QUIET, figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def rewards(runs: Sequence[Row], level: float | None = None) -> go.Figure:
    """One line per run, one colour per arm; dashed is the level that was asked for.

    ``runs``: ``{arm, seed, curve: [{updates, reward}]}``; updates below 0 are before the learning from
    rewards. Readings without a reward are left out.
    """
    drawn = figure(height=380)
    looks = [*ARMS.values(), LOOKS["tuned"], LOOKS["induced"]]
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    seen: set[str] = set()
    for run in runs:
        known = [one for one in run["curve"] if finite(one.get("reward")) is not None]
        look, name = looks[arms.index(run["arm"]) % len(looks)], plain(run["arm"])
        drawn.add_scatter(
            x=[one["updates"] for one in known], y=[one["reward"] for one in known], name=name,
            mode="lines", line={"color": look.colour, "width": 1.5}, legendgroup=name,
            showlegend=name not in seen,
            hovertemplate=f"{name}, seed {run['seed']}<br>update %{{x}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
        seen.add(name)
    if level is not None:
        drawn.add_hline(y=level, line={"color": QUIET, "width": 1, "dash": "dash"})
    drawn.update_xaxes(title={"text": "updates"})
    drawn.update_yaxes(title={"text": "mean reward"}, range=[-0.03, 1.03])
    return drawn
