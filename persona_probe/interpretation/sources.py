"""Where a latent comes from: which groups of documents drive it.

Documents carry labels (their source, the character who speaks, their kind). Per label and value: the
mean over documents of the latent's mean activation, with a t interval. Sums are kept in fp64 and can
be merged, so that the corpus need not be held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy import special


class SourceSums:
    """Per label and value: documents, and sums of their mean activations and squares."""

    def __init__(self, n_latents: int) -> None:
        self.n_latents = n_latents
        self._sums: dict[tuple[str, str], np.ndarray] = {}

    def add(self, labels: Mapping[str, str], means: Float[np.ndarray, " latent"]) -> None:
        """Count one document with its labels and each latent's mean activation over its tokens."""
        wide = np.stack((np.ones(self.n_latents), means, np.square(means, dtype=np.float64)))
        for label, value in labels.items():
            self._sums[label, value] = self._sums.get((label, value), 0.0) + wide

    def merge(self, other: SourceSums) -> SourceSums:
        """Take in another shard's documents; returns this one."""
        for key, sums in other._sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + sums
        return self

    def table(self, latent: int, confidence: float = 0.95) -> pl.DataFrame:
        """Columns `label`, `value`, `documents`, `mean`, `low`, `high` (null for one document), and
        `ratio` (to the mean over all documents of that label).

        Ordered by `low`: a group of few documents must earn its place.
        """
        whole: dict[str, np.ndarray] = {}
        for (label, _), sums in self._sums.items():
            whole[label] = whole.get(label, 0.0) + sums[:, latent]
        rows: list[dict[str, object]] = []
        for (label, value), sums in self._sums.items():
            n, total, squares = (float(part) for part in sums[:, latent])
            mean = total / n
            half: float | None = None
            if n > 1:
                spread = math.sqrt(max(0.0, squares - n * mean**2) / (n - 1) / n)
                half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * spread
            overall = float(whole[label][1] / whole[label][0])
            rows.append(
                {
                    "label": label,
                    "value": value,
                    "documents": int(n),
                    "mean": mean,
                    "low": None if half is None else mean - half,
                    "high": None if half is None else mean + half,
                    "ratio": mean / overall if overall else None,
                }
            )
        schema = {
            "label": pl.String,
            "value": pl.String,
            "documents": pl.Int64,
            "mean": pl.Float64,
            "low": pl.Float64,
            "high": pl.Float64,
            "ratio": pl.Float64,
        }
        return pl.DataFrame(rows, schema=schema).sort(
            pl.col("low").fill_null(-math.inf),
            "mean",
            "label",
            "value",
            descending=[True, True, False, False],
        )


def labels_of(record: object, fields: Sequence[str]) -> dict[str, str]:
    """The labels in a row of data: its fields of those names that hold a text or a number."""
    if not isinstance(record, Mapping):
        return {}
    found = {name: record.get(name) for name in fields}
    return {name: str(value) for name, value in found.items() if isinstance(value, str | int | float)}
