"""The result of a diff: a table of latents, and what it was measured on."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import polars as pl

from persona_probe.activations.masks import TokenMask
from persona_probe.artifact import atomic_folder, disk_full_named, versions, write_json
from persona_probe.diffing.means import SiteMeans
from persona_probe.errors import InputError
from persona_probe.figures import volcano
from persona_probe.sae.load import Dictionary
from persona_probe.sae.validity import Validity

if TYPE_CHECKING:
    import plotly.graph_objects as go

By = Literal["delta", "did", "z"]


@dataclass(frozen=True, eq=False)
class LatentDiff:
    """How far a fine-tune moved each latent of one dictionary.

    `table` has one row per latent, largest |delta| first; activations are in the dictionary's own
    units:

        index                    the latent
        mean_base, mean_tuned    mean activation over counted tokens, then conversations
        delta, low, high         tuned minus base, with its interval over questions
        fires_base, fires_tuned  share of counted tokens at which it fires, averaged likewise
        max_base, max_tuned      largest activation at any counted token
        benign_mean, benign_max  mean shift of the benign tunes, and the one furthest from 0
        did                      difference in differences: delta - benign_mean
        z                        did over its error (see `significance`); without benign tunes
                                 delta over its error, which describes and does not test
        p_value, q_value         null for latents too rare to test

    Null stands for what cannot be said: the benign columns without benign tunes, p and q with fewer
    than two, intervals with a single question.
    """

    table: pl.DataFrame
    dictionary: Dictionary
    validity: Validity
    """The dictionary on both models, at the same tokens; its gate."""
    means: SiteMeans
    """Mean activations at the site, per model: base, tuned, benign ones."""
    models: tuple[str, ...]
    """Names: base, tuned, benign ones."""
    answers: str
    """Whose answers were read."""
    mask: TokenMask
    confidence: float
    conversations: int
    """Conversations with a counted token."""
    clusters: int
    tokens: int
    sinks: int
    """Tokens left out because of their norm."""

    @property
    def site(self) -> str:
        return self.dictionary.site

    @property
    def benign(self) -> tuple[str, ...]:
        """Names of the benign fine-tunes."""
        return self.models[2:]

    @property
    def tested(self) -> bool:
        """Whether there are q-values; without, the shifts are described and not tested."""
        return self.table["q_value"].null_count() < len(self.table)

    def top(
        self, n: int = 20, *, by: By = "delta", direction: Literal["both", "up", "down"] = "both"
    ) -> pl.DataFrame:
        """The `n` rows that moved furthest, up, down or either way.

        Raises `InputError` when `by` is `did` and there are no benign tunes.
        """
        rows = self.table.filter(pl.col(by).is_not_null())
        if by == "did" and not self.benign:
            raise InputError(
                "there is no difference in differences without benign fine-tunes",
                fix="diff(..., benign=[model, ...]), or rank by delta",
            )
        if direction != "both":
            rows = rows.filter(pl.col(by) > 0 if direction == "up" else pl.col(by) < 0)
        return rows.sort(pl.col(by).abs(), descending=True, maintain_order=True).head(n)

    def row(self, index: int) -> dict[str, int | float | None]:
        """One latent's row."""
        found = self.table.filter(pl.col("index") == index)
        if not len(found):
            raise InputError(f"there is no latent {index} in {self.dictionary.path}")
        return found.row(0, named=True)

    def plot(self, highlight: int = 3) -> go.Figure:
        """A volcano plot that names the `highlight` latents of largest |delta|."""
        return volcano(self.table, self.table["index"].head(highlight).to_list())

    def summary(self) -> dict[str, object]:
        """Everything but the table, as plain values."""
        return {
            "site": self.site,
            "dictionary": {"path": self.dictionary.path, "digest": self.dictionary.digest},
            "models": {"base": self.models[0], "tuned": self.models[1], "benign": self.benign},
            "answers": self.answers,
            "mask": self.mask,
            "confidence": self.confidence,
            "conversations": self.conversations,
            "clusters": self.clusters,
            "tokens": self.tokens,
            "sinks": self.sinks,
            "tested": self.tested,
            "validity": self.validity,
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `latents.parquet` and `diff.json` to `folder`, whole or not at all."""
        with atomic_folder(folder, overwrite=overwrite) as temporary, disk_full_named(folder):
            self.table.write_parquet(temporary / "latents.parquet")
            write_json(temporary / "diff.json", {**self.summary(), "versions": versions()})

    def _repr_html_(self) -> str:
        names = html.escape(f"{self.models[0]} → {self.models[1]}, {self.site}")
        how = (
            f"tested against {len(self.benign)} benign fine-tunes"
            if self.tested
            else "described, not tested (fewer than two benign fine-tunes)"
        )
        facts = (
            f"{self.conversations} conversations, {self.clusters} questions, {self.tokens} tokens; "
            f"answers: {self.answers}; {how}. "
            f"Dictionary: {self.validity.gate} ({self.validity.reason})"
        )
        rows = self.top(10)._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return f"<p><b>{names}</b><br>{html.escape(facts)}</p>{rows}"
