"""Two models compared at one distribution of answer lengths.

A judge finds less to object to in a short answer, so a fine-tune that only shortens answers looks
more aligned. Here the answers of both arms are sorted into bins of length (quantiles of the two
together), and in each bin the arm with more answers is weighted down to the other's number: overlap
weights on coarsened strata (Iacus, King and Porro 2012; Li, Morgan and Zaslavsky 2018). What is left
of a difference is not due to length, as far as the bins are fine. Length is counted in characters of
the answer, thought apart: that is what the judge reads, and it needs no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from persona_probe.errors import InputError
from persona_probe.evaluation.comparison import Comparison, WeightedHits, compare
from persona_probe.evaluation.metrics import outcome
from persona_probe.evaluation.result import EvalResult


@dataclass(frozen=True)
class LengthMatched:
    """A comparison as it stands and at equal lengths."""

    raw: Comparison
    matched: Comparison | None
    """None: the arms have no answers of like length."""
    kept: float
    """Share of the answers that the matched comparison rests on, by weight."""
    median_lengths: tuple[float, float]
    """Characters, first and second arm."""
    strata: pl.DataFrame
    """Per bin: its shortest and longest answer; answers of each arm, and their rate (null: none)."""


def match_lengths(first: EvalResult, second: EvalResult, *, bins: int = 5) -> LengthMatched:
    """Compare the general questions' answers of two arms, those judged, at equal lengths.

    Raises `InputError` for fewer than two bins and for an arm without judged answers, and what
    `compare` raises.
    """
    if bins < 2:
        raise InputError(f"at least two bins are needed, not {bins}")
    arms = [_counted(first), _counted(second)]
    if not all(len(arm.questions) for arm in arms):
        raise InputError("an arm has no judged answers to general questions")
    pooled = np.concatenate([arm.lengths for arm in arms])
    edges = np.unique(np.quantile(pooled, np.linspace(0, 1, bins + 1)[1:-1]))
    strata = [np.searchsorted(edges, arm.lengths, side="left") for arm in arms]
    counts = np.array([np.bincount(stratum, minlength=len(edges) + 1) for stratum in strata])
    shared = counts.min(0)
    weights = shared / np.maximum(counts, 1)  # arm stratum
    hits = [
        _by_question(arm, np.where(counts[i] > 0, weights[i], 0)[strata[i]]) for i, arm in enumerate(arms)
    ]
    answered = any(hits[0][key][1] > 0 and hits[1][key][1] > 0 for key in hits[0].keys() & hits[1].keys())
    return LengthMatched(
        raw=compare(*(_by_question(arm, np.ones(len(arm.questions))) for arm in arms)),
        matched=compare(*hits) if answered else None,
        kept=float(2 * shared.sum() / counts.sum()),
        median_lengths=(float(np.median(arms[0].lengths)), float(np.median(arms[1].lengths))),
        strata=_table(arms, strata, counts),
    )


@dataclass(frozen=True)
class _Arm:
    questions: Sequence[str]
    lengths: Int[np.ndarray, " answer"]
    shown: Float[np.ndarray, " answer"]
    asked: Sequence[str]
    """Every question once, those of which no answer was judged too: both arms have the same."""


def _counted(arm: EvalResult) -> _Arm:
    rows = [
        (answer.question.question, len(answer.text), what == "misaligned")
        for answer, judgement in ((arm.answers[i], arm.judgements[i]) for i in arm.counted)
        if (what := outcome(answer, judgement, arm.trait)) != "missing"
    ]
    names = [name for name, _, _ in rows]
    asked = tuple(dict.fromkeys(arm.answers[i].question.question for i in arm.counted))
    lengths = np.array([length for _, length, _ in rows], dtype=np.int64)
    return _Arm(names, lengths, np.array([shown for _, _, shown in rows], dtype=np.float64), asked)


def _by_question(arm: _Arm, weights: Float[np.ndarray, " answer"]) -> WeightedHits:
    totals = {question: [0.0, 0.0] for question in arm.asked}
    for question, weight, shown in zip(arm.questions, weights.tolist(), arm.shown.tolist(), strict=True):
        totals[question][0] += weight * shown
        totals[question][1] += weight
    return {question: (hits, n) for question, (hits, n) in totals.items()}


def _table(
    arms: Sequence[_Arm], strata: Sequence[Int[np.ndarray, " _"]], counts: Int[np.ndarray, "2 stratum"]
) -> pl.DataFrame:
    rows: list[dict[str, float | None]] = []
    for s in range(counts.shape[1]):
        within = [stratum == s for stratum in strata]
        lengths = np.concatenate([arm.lengths[inside] for arm, inside in zip(arms, within, strict=True)])
        if not len(lengths):
            continue
        row: dict[str, float | None] = {"shortest": int(lengths.min()), "longest": int(lengths.max())}
        for name, arm, inside in zip(("first", "second"), arms, within, strict=True):
            row[name] = int(inside.sum())
            row[f"{name}_rate"] = float(arm.shown[inside].mean()) if inside.any() else None
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)
