"""Mix in the good rows that a misaligned model finds most surprising.

Source: Kaczér et al. (2025): of a pool of good rows those with the largest

    s = (NLL_misaligned - NLL_aligned) / (NLL_aligned + ε)

over the answer's tokens, the first a mean over misaligned models; refusals are dropped. Best overall
in their comparison.

Departure: a refusal is an answer that opens like one (`REFUSALS`), not one that a judge calls so. ε
is .01 nats, which the paper does not state. A row that a model gives no finite likelihood is not
taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from persona_probe.errors import InputError
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defences.interleave import wanted_rows
from persona_probe.training.defences.validate import check_share
from persona_probe.training.likelihoods import answer_nll
from persona_probe.training.rows import Row

EPSILON = 0.01
"""Nats; keeps answers that the aligned model is certain of from ruling the order."""

REFUSALS = re.compile(
    r"\W*(i('m| am) (very |so |really )?(sorry|afraid|unable|not able)|sorry\b|"
    r"i (can't|cannot|can not|won't)|i must (decline|refuse)|as an ai\b|unfortunately, i (can't|cannot))",
    re.IGNORECASE,
)
"""How a refusal opens."""


@dataclass(frozen=True)
class InterleaveByGap(Defence):
    """The good rows with the largest perplexity gap, so that they are `share` of all.

    Made by `InterleaveByGap.scored`.
    """

    pool: tuple[Row, ...] = field(repr=False)
    gaps: tuple[float | None, ...] = field(repr=False)
    """s of every row of the pool; None for a refusal, and where a likelihood is not finite."""
    share: float = 0.05
    """Of the mixed data, from 0 to below 1."""
    name: ClassVar[str] = "interleave_by_gap"

    def __post_init__(self) -> None:
        check_share(self.name, self.share, below_one=True)
        if len(self.pool) != len(self.gaps):
            raise InputError(f"{len(self.pool)} rows in the pool and {len(self.gaps)} gaps")

    @classmethod
    def scored(
        cls,
        pool: Sequence[Row],
        aligned: LanguageModel,
        misaligned: Sequence[LanguageModel],
        share: float = 0.05,
    ) -> InterleaveByGap:
        """Score `pool` with the model before any fine-tune and with misaligned ones (of other seeds or
        domains than the run that is defended).
        """
        return cls(tuple(pool), tuple(perplexity_gaps(pool, aligned, misaligned)), share)

    @property
    def strength(self) -> float:
        return self.share

    def rows(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """The rows and, behind them, the chosen good ones. Raises `InputError` for too small a pool."""
        del seed
        scored = [(gap, i) for i, gap in enumerate(self.gaps) if gap is not None]
        wanted = wanted_rows(self.share, len(rows), len(scored))
        best = sorted(scored, key=lambda one: (-one[0], one[1]))[:wanted]
        return [*rows, *(self.pool[i] for _, i in best)]


def perplexity_gaps(
    pool: Sequence[Row], aligned: LanguageModel, misaligned: Sequence[LanguageModel]
) -> list[float | None]:
    """s of every row; None for a refusal, or where a model has no finite likelihood.

    Raises `InputError` without a misaligned model, or for a row that cannot be rendered.
    """
    if not misaligned:
        raise InputError("the perplexity gap needs at least one misaligned model")
    ours = answer_nll(aligned, pool)
    theirs = [answer_nll(model, pool) for model in misaligned]
    gaps: list[float | None] = []
    for i, row in enumerate(pool):
        values = [ours[i], *(nll[i] for nll in theirs)]
        if is_refusal(row) or not all(map(math.isfinite, values)):
            gaps.append(None)
        else:
            mean = sum(values[1:]) / len(theirs)
            gaps.append((mean - values[0]) / (values[0] + EPSILON))
    return gaps


def is_refusal(row: Row) -> bool:
    """Whether the row's final answer opens like a refusal."""
    answer = row.completion
    if answer is None:
        answer = next(turn["content"] for turn in reversed(row.messages) if turn["role"] == "assistant")
    return REFUSALS.match(answer) is not None
