"""The result of a diff: a table of latents, and what it was measured on."""

from __future__ import annotations

import html
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
from safetensors.torch import load_file, save_file

from persona_probe.activations.masks import TokenMask
from persona_probe.artifact import (
    atomic_folder,
    read_json,
    versions,
    write_json,
    write_text,
)
from persona_probe.diffing.means import SiteMeans
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.figures import volcano
from persona_probe.sae.load import Dictionary, load_sae
from persona_probe.sae.validity import Validity

if TYPE_CHECKING:
    import plotly.graph_objects as go

By = Literal["delta", "did", "z"]


@dataclass(frozen=True)
class Missing:
    """A shard that could not be read, and why."""

    shard: int
    conversations: int
    why: str

    def __str__(self) -> str:
        return f"shard {self.shard} ({self.conversations} conversations): {self.why}"


_KNOWN_BY = ("diff.json", "latents.parquet")
_MEANS = ("mean", "cluster_sums", "conversations", "residual_rms")
_MAY_LACK = ("change_inside", "mean_change_inside")
"""Figures of `Validity` that None is right for; where another was not a number, it is NaN again."""


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
    special: int | None
    """Tokens in the place that the mask names, left out as special; None for a diff that was saved before
    they were counted, as are the next two.
    """
    bos: int | None
    """Of those, how many are BOS."""
    skipped: int | None
    """Tokens left out by the mask's `first_k` and `skip_first`."""
    sinks: int
    """Tokens left out because of their norm."""
    missing: tuple[Missing, ...] = ()
    """Shards that are not in it."""

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
            "special": self.special,
            "bos": self.bos,
            "skipped": self.skipped,
            "sinks": self.sinks,
            "tested": self.tested,
            "missing": self.missing,
            "validity": self.validity,
        }

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `latents.parquet`, `means.safetensors`, `diff.json` and `volcano.html` to `folder`,
        whole or not at all.
        """
        with atomic_folder(folder, overwrite=overwrite, known_by=_KNOWN_BY) as temporary:
            self.table.write_parquet(temporary / "latents.parquet")
            tensors = {name: getattr(self.means, name).contiguous() for name in _MEANS}
            save_file(tensors, temporary / "means.safetensors")
            write_text(temporary / "volcano.html", self.plot().to_html(include_plotlyjs=True))
            write_json(temporary / "diff.json", {**self.summary(), "versions": versions()})

    @classmethod
    def load(cls, folder: str | os.PathLike[str], dictionary: Dictionary | None = None) -> LatentDiff:
        """What `save` wrote. `dictionary` is for one that does not lie where it did.

        Raises `MissingPathError` for a file that is not there, `MismatchError` for a dictionary that
        has changed.
        """
        path = Path(folder)
        for name in ("diff.json", "latents.parquet", "means.safetensors"):
            if not (path / name).is_file():
                raise MissingPathError(
                    f"{path} is not a saved diff: it has no {name}",
                    fix="give a folder that LatentDiff.save wrote",
                )
        facts = read_json(path / "diff.json")
        named = facts["dictionary"]
        dictionary = dictionary or load_sae(named["path"], site=facts["site"])
        if dictionary.digest != named["digest"]:
            raise MismatchError(
                f"the diff in {path} is of the dictionary {named['digest']}, and {dictionary.path} is "
                f"{dictionary.digest}",
                fix="pass the dictionary that it was made with",
            )
        means = SiteMeans(site=facts["site"], tokens=facts["tokens"], **load_file(path / "means.safetensors"))
        validity: dict[str, Any] = {
            name: math.nan if value is None and name not in _MAY_LACK else value
            for name, value in facts["validity"].items()
        }
        return cls(
            table=pl.read_parquet(path / "latents.parquet"),
            dictionary=dictionary,
            validity=Validity(**validity),
            means=means,
            models=(facts["models"]["base"], facts["models"]["tuned"], *facts["models"]["benign"]),
            answers=facts["answers"],
            mask=TokenMask(**facts["mask"]),
            confidence=facts["confidence"],
            conversations=facts["conversations"],
            clusters=facts["clusters"],
            tokens=facts["tokens"],
            special=facts.get("special"),
            bos=facts.get("bos"),
            skipped=facts.get("skipped"),
            sinks=facts["sinks"],
            missing=tuple(Missing(**one) for one in facts["missing"]),
        )

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
        ) + "".join(f". Missing: {one}" for one in self.missing)
        rows = self.top(10)._repr_html_()  # pyright: ignore[reportPrivateUsage]
        return f"<p><b>{names}</b><br>{html.escape(facts)}</p>{rows}"
