"""Rank training rows before training: which of them would pull the model towards the persona?

    flags = flag(read_rows("mixed.jsonl"), base, [Probe("villain", site, direction(v))])
    flags.write("sorted", by="villain difference", remove=0.1)      # kept.jsonl, removed.jsonl

Scores, one column each, higher is more suspect (so a probe's direction is the persona's; for a helpful
latent that fell, turn it round: `direction(-v)`); a is the mean over the answer's tokens:

    nll                  how unlikely the base finds the answer, nats per token: what needs no probe
    NAME                 a(x, y), the latent's activation or the projection on the direction
    NAME difference      a(x, y) - a(x, y_base): the projection difference of Chen et al. (2025), which
                         takes off what the prompt alone does; y_base is the base's own greedy answer

Departure: the paper draws y_base at temperature 1; greedy needs one answer and no seed. A row whose
own or base answer has no counted token has no score (null), and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import torch

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.artifact import StrPath, write_jsonl
from persona_probe.errors import InputError
from persona_probe.evaluation.auc import auc
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import respond_greedy, transcripts
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.likelihoods import answer_nll
from persona_probe.training.rows import Row
from persona_probe.training.watching import Probe

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Flags:
    """Rows and their scores."""

    rows: tuple[Row, ...] = field(repr=False)
    table: pl.DataFrame
    """A row per training row, in their order: `row` (from 0), `place`, and a column per score."""

    @property
    def scores(self) -> list[str]:
        """The names of the scores."""
        return [name for name in self.table.columns if name not in ("row", "place")]

    def ranked(self, by: str) -> list[int]:
        """Rows from the most to the least suspect; those without a score come last."""
        values = self._column(by)
        return sorted(range(len(values)), key=lambda i: (np.isnan(values[i]), -np.nan_to_num(values[i]), i))

    def removed(self, by: str, share: float) -> list[int]:
        """The rows, in their order, that removing this share of all takes out."""
        if not 0 <= share <= 1:
            raise InputError(f"the share to remove must be from 0 to 1, got {share}")
        scored = int(np.isfinite(self._column(by)).sum())
        return sorted(self.ranked(by)[: min(scored, round(share * len(self.rows)))])

    def kept(self, by: str, share: float) -> list[Row]:
        """The rows that stay."""
        out = set(self.removed(by, share))
        return [row for i, row in enumerate(self.rows) if i not in out]

    def write(self, folder: StrPath, by: str, remove: float) -> tuple[Path, Path]:
        """Write `kept.jsonl` and `removed.jsonl`, the rows as they were read, and `scores.parquet`."""
        out = set(self.removed(by, remove))
        places = (Path(folder) / "kept.jsonl", Path(folder) / "removed.jsonl")
        for place, gone in zip(places, (False, True), strict=True):
            write_jsonl(place, [row.record() for i, row in enumerate(self.rows) if (i in out) == gone])
        self.table.write_parquet(Path(folder) / "scores.parquet")
        return places

    def auc(self, bad: Sequence[bool]) -> dict[str, float]:
        """How well each score tells the bad rows from the others (see `evaluation.auc`); rows that it
        does not score are left out.
        """
        if len(bad) != len(self.rows):
            raise InputError(f"{len(bad)} labels for {len(self.rows)} rows")
        labels = np.asarray(bad, dtype=bool)
        found: dict[str, float] = {}
        for name in self.scores:
            scores = self._column(name)
            known = np.isfinite(scores)
            found[name] = float(auc(scores[known], labels[known]))
        return found

    def _column(self, by: str) -> np.ndarray:
        if by not in self.scores:
            raise InputError(f"there is no score {by!r}; there are {', '.join(self.scores)}")
        return self.table[by].cast(pl.Float64).fill_null(float("nan")).to_numpy()


def flag(
    rows: Sequence[Row],
    base: LanguageModel,
    probes: Sequence[Probe] = (),
    *,
    max_new_tokens: int = 48,
    progress: Progress | None = None,
) -> Flags:
    """Score every row with the base alone; nothing is trained.

    Raises `InputError` for no rows, one that cannot be rendered, or two scores of one name;
    `UnknownSiteError`.
    """
    if not rows:
        raise InputError("there are no rows to flag")
    _check_names(probes)
    tell = progress or (lambda *_: None)
    tell("likelihood", 0, len(rows))
    columns: dict[str, list[float]] = {"nll": answer_nll(base, rows)}
    if probes:
        asked = [Question(f"row-{i}", "row", row.prompt) for i, row in enumerate(rows)]
        answers = respond_greedy(
            base, asked, max_new_tokens=max_new_tokens, progress=lambda i, n: tell("the base answers", i, n)
        )
        tell("reading", 0, len(rows))
        given = _amounts(base, [row.rendered(base.tokenizer) for row in rows], probes)
        own = _amounts(base, transcripts(base, answers), probes)
        for probe, here, there in zip(probes, given, own, strict=True):
            columns[probe.name] = here
            columns[f"{probe.name} difference"] = [a - b for a, b in zip(here, there, strict=True)]
    table = pl.DataFrame(
        {"row": list(range(len(rows))), "place": [row.place for row in rows], **columns}
    ).with_columns(pl.col(name).fill_nan(None) for name in columns)
    return Flags(tuple(rows), table)


def _check_names(probes: Sequence[Probe]) -> None:
    taken = {"row", "place", "nll"}
    for probe in probes:
        for name in (probe.name, f"{probe.name} difference"):
            if name in taken:
                raise InputError(
                    f"two scores would be called {name!r}", fix="give every probe a name of its own"
                )
            taken.add(name)


def _amounts(base: LanguageModel, texts: Sequence[Rendered], probes: Sequence[Probe]) -> list[list[float]]:
    """Per probe and text: the mean amount over the answer's tokens; NaN where there is none."""
    sums = torch.zeros(len(probes), len(texts), dtype=torch.float64)
    counts = torch.zeros(len(texts), dtype=torch.float64)
    sites = [probe.site for probe in probes]
    for chunk in stream([base], texts, sites, TokenMask("response"), sink_factor=None):
        counts.index_add_(0, chunk.document, torch.ones(len(chunk.document), dtype=torch.float64))
        for number, probe in enumerate(probes):
            z = probe.target.amounts(chunk.activations[0, probe.site], probe.read)[..., 0]
            sums[number].index_add_(0, chunk.document, z.double().cpu())
    return (sums / counts).tolist()
