"""A direction at every layer, and which layer to take: where the two sides lie furthest apart on
questions that the direction was not built on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks.sites import parse_site, resid_post
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.probe import Build, Separation, logistic_direction, mean_shift, separation
from persona_probe.steering.target import Target, direction

if TYPE_CHECKING:
    import plotly.graph_objects as go

Method = Literal["means", "probe"]
METHODS: dict[Method, Build] = {"means": mean_shift, "probe": logistic_direction}


@dataclass(frozen=True, eq=False)
class LayerDirection:
    """One direction at one site."""

    site: str
    method: Method
    vector: Float[Tensor, " d_model"]
    """Not of length 1: a difference of means is as long as the difference, a probe's is in log-odds."""
    separation: Separation
    residual_rms: float
    """The scale of the site: root mean square of an activation's entries."""

    @property
    def target(self) -> Target:
        """To steer by."""
        return direction(self.vector, label=f"{self.method} at {self.site}")


@dataclass(frozen=True, eq=False)
class LayerDirections:
    """A direction at each of several sites. Shown in a notebook as its table."""

    directions: tuple[LayerDirection, ...]

    @property
    def best(self) -> LayerDirection:
        """The one whose sides lie furthest apart on questions held out: by AUC, then by the gap."""
        return max(self.directions, key=lambda one: (one.separation.auc, one.separation.gap))

    def at(self, site: str, method: Method | None = None) -> LayerDirection:
        """That of a site. Raises `InputError` for a site that was not read."""
        for one in self.directions:
            if one.site == site and method in (None, one.method):
                return one
        raise InputError(
            f"there is no direction at {site}", fix=f"one of {', '.join(self.table['site'].unique())}"
        )

    @property
    def table(self) -> pl.DataFrame:
        """One row per direction: site, block, method, auc, gap, norm, best."""
        best = self.best
        return pl.DataFrame(
            [
                {
                    "site": one.site,
                    "block": parse_site(one.site).block,
                    "method": one.method,
                    "auc": one.separation.auc,
                    "gap": one.separation.gap,
                    "norm": float(one.vector.norm()),
                    "residual_rms": one.residual_rms,
                    "best": one is best,
                }
                for one in self.directions
            ]
        )

    def plot(self) -> go.Figure:
        """Separation by layer, the chosen one marked."""
        from persona_probe.figures.layers import separability

        return separability(self.table.to_dicts())

    def _repr_html_(self) -> str:
        return self.table._repr_html_()  # pyright: ignore[reportPrivateUsage]


def directions_by_layer(
    lm: LanguageModel,
    having: Sequence[Rendered],
    lacking: Sequence[Rendered],
    groups: tuple[Sequence[str], Sequence[str]],
    *,
    sites: Sequence[str] | None = None,
    methods: Sequence[Method] = ("means",),
    mask: TokenMask | None = None,
) -> LayerDirections:
    """Directions from what lacks a trait to what has it, at `sites` (default: behind every block).

    Each conversation counts once, by its mean over the counted tokens (default: the response, as
    persona vectors do; Chen et al. 2025). `groups` name the question that each was an answer to:
    whole questions are held out. Raises `MismatchError` for other numbers of groups, and what
    `separation` and `stream` raise.
    """
    if (len(having), len(lacking)) != (len(groups[0]), len(groups[1])):
        raise MismatchError(
            f"{len(having)} + {len(lacking)} conversations need as many groups, got "
            f"{len(groups[0])} + {len(groups[1])}"
        )
    names = list(sites or (resid_post(block) for block in range(lm.n_layers)))
    means, rms, read = document_means(lm, [*having, *lacking], names, mask or TokenMask("response"))
    has = torch.tensor([True] * len(having) + [False] * len(lacking))[read]
    group = [*groups[0], *groups[1]]
    kept = [group[i] for i in read.tolist()]
    return LayerDirections(
        tuple(
            LayerDirection(
                name,
                method,
                METHODS[method](means[name], has).float(),
                separation(means[name], has, kept, METHODS[method]),
                rms[name],
            )
            for name in names
            for method in methods
        )
    )


def document_means(
    lm: LanguageModel, conversations: Sequence[Rendered], sites: Sequence[str], mask: TokenMask
) -> tuple[dict[str, Float[Tensor, "document d_model"]], dict[str, float], Tensor]:
    """Mean activation of each conversation that has counted tokens, in fp64; the scale of each site;
    and which conversations these are.
    """
    sums = {site: torch.zeros(len(conversations), lm.d_model, dtype=torch.float64) for site in sites}
    squares = dict.fromkeys(sites, 0.0)
    count = torch.zeros(len(conversations), dtype=torch.float64)
    for chunk in stream([lm], conversations, sites, mask):
        count += torch.bincount(chunk.document, minlength=len(conversations))
        for site in sites:
            x = chunk.activations[0, site].detach().cpu().double()
            sums[site].index_add_(0, chunk.document, x)
            squares[site] += float(x.square().sum())
    read = count.nonzero().flatten()
    means = {site: total[read] / count[read, None] for site, total in sums.items()}
    entries = float(count.sum()) * lm.d_model
    rms = {site: (total / entries) ** 0.5 for site, total in squares.items()}
    return means, rms, read
