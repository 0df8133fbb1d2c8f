"""Two models on the same questions: how far apart are their rates, and is it more than chance?

The questions are the same, so what makes one of them hard is common to both arms and must not count
twice. Zou and Donner's interval (2008, "Construction of confidence limits about effect measures: a
general approach", Statistics in Medicine 27; called MOVER) puts the arms' own intervals together and
lets a correlation between them narrow the result:

    d    = p2 - p1
    low  = d - sqrt((u1 - p1)^2 + (p2 - l2)^2 - 2 r (u1 - p1) (p2 - l2))
    high = d + sqrt((p1 - l1)^2 + (u2 - p2)^2 - 2 r (p1 - l1) (u2 - p2))

Here [l, u] are Korn and Graubard's, so the sampling unit is the question, and r is the correlation of
the arms' contributions by question. As with the intervals, r counts only once 10 questions show and
10 lack the outcome in both arms, before which it is too poorly known; a negative one always does.
Simulated coverage is in docs/coverage.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float, Int

from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.intervals import ENOUGH_QUESTIONS, korn_graubard

WeightedHits = Mapping[str, tuple[int | float, int | float]]
"""`Hits`, or the same with weights: per question, (answers that show the trait, answers judged)."""

_EXACT_UP_TO = 12
"""So many questions have all their 2^k swaps tried; more are drawn from."""


@dataclass(frozen=True)
class Comparison:
    """The second arm's rate minus the first's, over the questions that both answered."""

    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    """Of no difference: the share of swaps of the two arms' answers, question by question, whose
    difference is at least as large.
    """
    correlation: float
    """Between the arms, by question, as it narrowed the interval."""
    questions: int
    left_out: int
    """Questions that an arm did not answer."""

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p_value:.2g}"


def compare(
    first: WeightedHits,
    second: WeightedHits,
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two arms, question by question (`EvalResult.hits` of each).

    Raises `MismatchError` when they were not asked the same questions, `InputError` when no question
    was answered in both.
    """
    if set(first) != set(second):
        odd = min(set(first) ^ set(second))
        raise MismatchError(f"the arms were not asked the same questions: {odd!r} is not in both")
    both = [key for key in sorted(first) if first[key][1] > 0 and second[key][1] > 0]
    if not both:
        raise InputError("no question was answered in both arms")
    arms = np.array([[arm[key] for key in both] for arm in (first, second)], np.float64)
    hits, n = arms[..., 0], arms[..., 1]
    rates = hits.sum(1) / n.sum(1)
    (l1, u1, _), (l2, u2, _) = (
        korn_graubard(x, m, confidence) for x, m in zip(hits.tolist(), n.tolist(), strict=True)
    )
    r = _correlation(hits, n)
    p1, p2 = map(float, rates)
    below = _joined(u1 - p1, p2 - l2, r)
    above = _joined(p1 - l1, u2 - p2, r)
    return Comparison(
        first=p1,
        second=p2,
        difference=p2 - p1,
        low=p2 - p1 - below,
        high=p2 - p1 + above,
        p_value=_swapped(hits, n, draws, seed),
        correlation=r,
        questions=len(both),
        left_out=len(first) - len(both),
    )


def _joined(one: float, other: float, r: float) -> float:
    return float(np.sqrt(max(0.0, one**2 + other**2 - 2 * r * one * other)))


def _correlation(hits: Float[np.ndarray, "2 question"], n: Float[np.ndarray, "2 question"]) -> float:
    """Of the arms' residuals x - p n, which are what moves their rates."""
    residuals = hits - n * (hits.sum(1) / n.sum(1))[:, None]
    spread = np.sqrt((residuals**2).sum(1))
    if not spread.all():
        return 0.0
    r = float(residuals[0] @ residuals[1] / spread.prod())
    enough = min(int(side.sum(1).min()) for side in (hits > 0, hits < n)) >= ENOUGH_QUESTIONS
    return r if enough else min(r, 0.0)


def _swapped(
    hits: Float[np.ndarray, "2 question"], n: Float[np.ndarray, "2 question"], draws: int, seed: int
) -> float:
    """A permutation test: under no difference, a question's two arms could as well be exchanged."""
    k = hits.shape[1]
    if k <= _EXACT_UP_TO:
        swaps = np.array(list(product((0, 1), repeat=k)))
    else:
        swaps = np.random.default_rng(seed).integers(0, 2, (draws, k))
        swaps[0] = 0  # what was seen counts among the draws
    found = np.abs(_difference(swaps, hits, n))
    return float((found >= found[0] - 1e-12).mean())


def _difference(
    swaps: Int[np.ndarray, "draw question"],
    hits: Float[np.ndarray, "2 question"],
    n: Float[np.ndarray, "2 question"],
) -> Float[np.ndarray, " draw"]:
    def total(counts: Float[np.ndarray, "2 question"], arm: int) -> Float[np.ndarray, " draw"]:
        return counts[arm].sum() + swaps @ (counts[1 - arm] - counts[arm])

    return total(hits, 1) / total(n, 1) - total(hits, 0) / total(n, 0)
