"""The result of a timeline: latents and directions, point by point, beside the benign band."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.artifact import atomic_folder, versions, write_json, write_text
from persona_probe.diffing.latent_diff import Missing
from persona_probe.diffing.means import SiteMeans
from persona_probe.diffing.passes import Source
from persona_probe.diffing.readers import label_of
from persona_probe.diffing.shards import Counted
from persona_probe.diffing.tally import Tally, t_quantile
from persona_probe.errors import InputError
from persona_probe.figures import trajectories

if TYPE_CHECKING:
    import plotly.graph_objects as go

WHAT = ("kind", "site", "index", "name")
"""The columns that say which latent or direction a row is of."""

_KNOWN_BY = ("timeline.json", "timeline.parquet")


@dataclass(frozen=True, eq=False)
class Probe:
    """A direction to follow."""

    site: str
    vector: Float[Tensor, " d_model"]
    """What is followed is the projection on its unit vector: its length does not matter."""


@dataclass(frozen=True, eq=False)
class Point:
    """One checkpoint of a run, or one tune among several."""

    name: str
    step: int | None
    """None for a tune that is no checkpoint of a run."""
    loss: float | None
    """The last that was logged at or before the step."""
    model: Source = field(repr=False)


@dataclass(frozen=True, eq=False)
class Timeline:
    """How far a run (or each of several tunes) moved latents and directions from the base.

    `table` has a row per point and latent or direction:

        point, step, loss          the checkpoint, or the tune's name with step null
        kind, site, index, name    "latent" with its index (and the name of its dictionary, where several
                                   read the site), or "direction" with its name
        mean_base, mean_tuned      mean activation of the latent; null for a direction
        delta, low, high           shift from the base, with its interval over questions
        benign_low, benign_high    the benign band: lowest and highest shift of the benign tunes,
                                   0 among them; null without benign tunes
        outside                    the whole interval lies outside the band; null without one
        q_value                    of the latent at that point, as in `LatentDiff`
    """

    table: pl.DataFrame
    points: tuple[Point, ...]
    base: str
    benign: tuple[str, ...]
    mask: TokenMask
    confidence: float
    counted: Counted
    """What every point was measured on."""
    missing: tuple[Missing, ...] = ()
    """Shards that are not in it."""

    def of(self, index: int, site: str | None = None, name: str | None = None) -> pl.DataFrame:
        """One latent's rows, point by point. Raises `InputError` where there is none, and where there are
        several: at other sites, or of other dictionaries of one (`name`).
        """
        rows = self.table.filter(pl.col("index") == index)
        rows = rows if site is None else rows.filter(pl.col("site") == site)
        rows = rows if name is None else rows.filter(pl.col("name") == name)
        if not len(rows):
            at = (f" at {site}" if site else "") + (f" of {name}" if name else "")
            raise InputError(f"there is no latent {index}{at}")
        found = rows.select("site", "name").unique(maintain_order=True).rows()
        if len(found) > 1:
            listed = ", ".join(" ".join(filter(None, one)) for one in found)
            raise InputError(f"there are several latents {index}: {listed}", fix="say which: site=, name=")
        return rows

    def top(self, n: int = 10) -> pl.DataFrame:
        """The latents and directions that lie furthest from the base at the last point.

        Directions come first; each row is the last point's.
        """
        last = self.table.filter(pl.col("point") == self.points[-1].name)
        size = pl.col("delta").abs()
        directions = last.filter(pl.col("kind") == "direction").sort(size, descending=True)
        latents = last.filter(pl.col("kind") == "latent").sort(size, descending=True, maintain_order=True)
        return pl.concat([directions, latents.head(n)])

    def first(self) -> pl.DataFrame:
        """Per latent and direction the first point at which it is outside the benign band, with its
        shift there and at the last point; those that never are have null. Largest last shift first.

        Raises `InputError` without benign tunes, which are the band.
        """
        self._need_band("there is no first step outside it")
        order = {point.name: i for i, point in enumerate(self.points)}
        place = pl.col("point").replace_strict(order, return_dtype=pl.Int64)
        rows = self.table.with_columns(place.alias("at")).sort("at")
        groups = rows.group_by(*WHAT, maintain_order=True)
        out = pl.col("outside")
        found = groups.agg(
            pl.col("point").filter(out).first().alias("first"),
            pl.col("step").filter(out).first().alias("first_step"),
            pl.col("delta").filter(out).first().alias("delta_then"),
            pl.col("delta").last().alias("delta_last"),
            out.sum().alias("points_outside"),
        )
        return found.sort(pl.col("delta_last").abs(), descending=True, maintain_order=True)

    def shared(self, n: int = 20) -> pl.DataFrame:
        """Which latents the points have in common: a row per latent that is among the `n` of largest
        |delta| in any of them (and outside the benign band, where there is one), a column of shifts
        per point, and in how many it is. Most shared first.
        """
        rows = self.table.filter(pl.col("kind") == "latent")
        size = pl.col("delta").abs()
        rank = size.rank(method="ordinal", descending=True).over("point", "site", "name")
        counts = (rank <= n) & (size > 0)
        if self.benign:
            counts &= pl.col("outside")
        marked = rows.with_columns(counts.alias("counts"))
        tunes = pl.col("point").filter(pl.col("counts"))
        wide = marked.group_by("site", "index", "name", maintain_order=True).agg(
            pl.col("counts").sum().alias("shared_by"),
            tunes.str.join(", ").alias("tunes"),
            *(
                pl.col("delta").filter(pl.col("point") == point.name).first().alias(f"delta {point.name}")
                for point in self.points
            ),
            size.max().alias("largest"),
        )
        wide = wide.filter(pl.col("shared_by") > 0)
        return wide.sort("shared_by", "largest", descending=True, maintain_order=True).drop("largest")

    def plot(self, n: int = 5) -> go.Figure:
        """The `n` latents furthest from the base at the end, every direction, and the loss."""
        chosen = self.top(n).select(WHAT)
        return trajectories(self.table.join(chosen, on=WHAT, nulls_equal=True, maintain_order="left"))

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `timeline.parquet`, `timeline.json` and `timeline.html`, whole or not at all."""
        facts = {
            "base": self.base,
            "points": [{"name": p.name, "step": p.step, "loss": p.loss} for p in self.points],
            "benign": self.benign,
            "mask": self.mask,
            "confidence": self.confidence,
            **asdict(self.counted),
            "missing": self.missing,
            "versions": versions(),
        }
        with atomic_folder(folder, overwrite=overwrite, known_by=_KNOWN_BY) as temporary:
            self.table.write_parquet(temporary / "timeline.parquet")
            write_text(temporary / "timeline.html", self.plot().to_html(include_plotlyjs=True))
            write_json(temporary / "timeline.json", facts)

    def _repr_html_(self) -> str:
        said = (
            f"{self.base} → {len(self.points)} points "
            f"({', '.join(point.name for point in self.points[:12])}); benign band: "
            f"{', '.join(self.benign) or 'none given'}"
        ) + "".join(f". Missing: {one}" for one in self.missing)
        rows = self.top(10)._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return f"<p>{html.escape(said)}</p>{rows}"

    def _need_band(self, why: str) -> None:
        if not self.benign:
            raise InputError(
                f"without benign fine-tunes there is no benign band: {why}",
                fix="timeline(..., benign=[model, ...])",
            )


def latent_rows(name: str, tally: Tally, confidence: float) -> pl.DataFrame:
    """One point's rows of the latents of the dictionary of that name, in the order of their numbers."""
    site = tally.site
    label = label_of(name, site)
    table = tally.table(confidence).sort("index")
    low, high = tally.benign_range() if tally.n_benign else (None, None)
    return _rows(
        table.with_columns(
            pl.lit("latent").alias("kind"),
            pl.lit(site).alias("site"),
            pl.lit(label, dtype=pl.String).alias("name"),
        ),
        None if low is None else low.numpy(),
        None if high is None else high.numpy(),
    )


def direction_rows(
    directions: Mapping[str, Probe], means: Mapping[str, SiteMeans], confidence: float
) -> pl.DataFrame:
    """One point's rows of directions; means are of base, point and benign tunes."""
    rows: list[dict[str, object]] = []
    band: list[tuple[float, float]] = []
    for name, probe in directions.items():
        its = means[probe.site]
        unit = probe.vector.detach().double().cpu()
        unit = unit / unit.norm()
        delta, error = its.projected_shift(unit)
        half = error * t_quantile(int((its.conversations > 0).sum()), confidence)
        shifts = [its.projected_shift(unit, model)[0] for model in range(2, len(its.mean))]
        band.append((min(0.0, *shifts, 0.0), max(0.0, *shifts, 0.0)))
        rows.append(
            {"kind": "direction", "site": probe.site, "index": None, "name": name, "mean_base": None,
             "mean_tuned": None, "delta": delta, "low": delta - half, "high": delta + half, "q_value": None}
        )  # fmt: skip
    table = pl.DataFrame(rows, schema=_SCHEMA, nan_to_null=True)
    has_benign = any(len(its.mean) > 2 for its in means.values())
    low, high = np.asarray(band).T
    return _rows(table, low if has_benign else None, high if has_benign else None)


_NUMBERS = ("mean_base", "mean_tuned", "delta", "low", "high")
_SCHEMA = {
    "kind": pl.String, "site": pl.String, "index": pl.Int64, "name": pl.String,
    **dict.fromkeys(_NUMBERS, pl.Float64), "q_value": pl.Float64,
}  # fmt: skip


def _rows(
    table: pl.DataFrame, low: np.ndarray[tuple[int], np.dtype[np.float64]] | None,
    high: np.ndarray[tuple[int], np.dtype[np.float64]] | None,
) -> pl.DataFrame:  # fmt: skip
    lacking = pl.lit(None, dtype=pl.Float64)
    banded = table.with_columns(
        (lacking if low is None else pl.Series(low)).alias("benign_low"),
        (lacking if high is None else pl.Series(high)).alias("benign_high"),
    )
    outside = (pl.col("low") > pl.col("benign_high")) | (pl.col("high") < pl.col("benign_low"))
    return banded.with_columns(outside.alias("outside")).select(
        *WHAT, *_NUMBERS, "benign_low", "benign_high", "outside", "q_value"
    )
