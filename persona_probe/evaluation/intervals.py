"""Intervals for rates whose sampling unit is the question, not the answer.

Answers to one question resemble each other, so n answers carry the information of fewer. Korn and
Graubard (1998, "Confidence intervals for proportions with small expected number of positive counts
estimated from survey data", Survey Methodology 24) put that *effective* number into Clopper and
Pearson's exact interval.

Beyond the paper: the effective n never exceeds n, and never the number of questions while fewer
than 10 questions show the outcome or fewer than 10 lack it, where the variance between questions is
too poorly known to trust. (Simulated coverage over 8 to 100 questions of 1 to 20 answers, rates .02
to .95, intraclass correlations .1 and .3: at least .948 with that cap, .81 without.) Questions are
taken to be independent: a set that is a few domains of like questions holds less than it seems, and
this does not show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from persona_probe.errors import InputError, MismatchError

ENOUGH_QUESTIONS = 10
"""So many questions must show an outcome, and as many lack it, to believe their variance."""


class Interval(NamedTuple):
    """An interval for a rate, and the number of independent answers that would give the same."""

    low: float
    high: float
    n_effective: float


def korn_graubard(
    hits_by_cluster: Sequence[int | float],
    n_by_cluster: Sequence[int | float],
    confidence: int | float = 0.95,
) -> Interval:
    """The Korn–Graubard interval of the rate sum(hits) / sum(n), clusters (questions) being the
    sampling unit.

    With k clusters, p = sum(x) / sum(n):

        v     = k / (k - 1) * sum((x_i - p n_i)^2) / n^2           variance of p between clusters
        deff  = v / (p (1 - p) / (n - 1))                         over that of independent answers
        n_eff = n / deff * (t[n - 1] / t[k - 1])^2                 t: two-sided Student quantiles
        low   = Beta quantile ((1 - c) / 2; n_eff p, n_eff (1 - p) + 1)
        high  = Beta quantile ((1 + c) / 2; n_eff p + 1, n_eff (1 - p))

    with n_eff capped as this module says. One answer per cluster gives Clopper and Pearson's
    interval exactly. Clusters without answers do not count.

    Raises `InputError` when there is no answer, or hits are not between 0 and n.
    """
    n_i = np.asarray(n_by_cluster, dtype=np.float64)
    x_i = np.asarray(hits_by_cluster, dtype=np.float64)
    if n_i.shape != x_i.shape or n_i.ndim != 1:
        raise InputError(f"hits and n must be two lists of one length, not {x_i.shape}, {n_i.shape}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, not {confidence}")
    if not (np.all(x_i >= 0) and np.all(x_i <= n_i)):  # NaN fails too
        raise InputError("hits must lie between 0 and n in every cluster")
    x_i, n_i = x_i[n_i > 0], n_i[n_i > 0]
    if not len(n_i):
        raise InputError("a rate over no answers has no interval")
    k, n, p = len(n_i), float(n_i.sum()), float(x_i.sum() / n_i.sum())
    tail = (1 - confidence) / 2
    effective = n
    if k > 1 and n > 1 and 0 < p < 1:
        variance = k / (k - 1) * float(((x_i - p * n_i) ** 2).sum()) / n**2
        if variance > 0:
            design_effect = variance / (p * (1 - p) / (n - 1))
            shrink = special.stdtrit(n - 1, 1 - tail) / special.stdtrit(k - 1, 1 - tail)
            effective = min(n, float(n / design_effect * shrink**2))
    if min(int((x_i > 0).sum()), int((x_i < n_i).sum())) < ENOUGH_QUESTIONS:
        effective = min(effective, float(k))
    hits, misses = effective * p, effective * (1 - p)
    low = float(special.betaincinv(hits, misses + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, misses, 1 - tail)) if misses > 0 else 1.0
    return Interval(low, high, effective)


class Necessity(NamedTuple):
    """The share of the excess misalignment that an edit removed; None where it cannot be said."""

    fraction: float | None
    low: float | None
    high: float | None


Hits = Mapping[str, tuple[int, int]]
"""Per question (cluster): how many of its answers show the trait, of how many."""


def necessity(
    base: Hits,
    tuned: Hits,
    fixed: Hits,
    *,
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Necessity:
    """(tuned - fixed) / (tuned - base): 1 when the edit brings the base's rate back, 0 when it does
    nothing.

    The interval is a percentile bootstrap over questions, the same ones drawn for the three arms
    (they are paired). `fraction` is None when tuned shows no excess over base; `low` and `high` are
    None when that cannot be ruled out, that is when more than (1 - confidence) / 2 of the draws
    have none. Questions unanswered in any arm are left out. Raises `MismatchError` when the arms
    were not asked the same questions.
    """
    for other in (tuned, fixed):
        if set(other) != set(base):
            odd = min(set(other) ^ set(base))
            raise MismatchError(f"the arms were not asked the same questions: {odd!r} is not in all")
    arms = np.array([[arm[key] for key in sorted(base)] for arm in (base, tuned, fixed)], np.float64)
    if not arms.size:
        return Necessity(None, None, None)
    arms = arms[:, (arms[:, :, 1] > 0).all(0)]  # arm question (hits, n)
    k = arms.shape[1]
    if not k:
        return Necessity(None, None, None)
    fraction = _fraction(np.ones((1, k)), arms)[0]
    if np.isnan(fraction):
        return Necessity(None, None, None)
    weights = np.random.default_rng(seed).multinomial(k, np.full(k, 1 / k), size=draws)
    drawn = _fraction(weights.astype(np.float64), arms)
    tail = (1 - confidence) / 2
    if np.isnan(drawn).mean() > tail:
        return Necessity(float(fraction), None, None)
    low, high = np.nanquantile(drawn, (tail, 1 - tail))
    return Necessity(float(fraction), float(low), float(high))


def _fraction(
    weights: Float[np.ndarray, "draw question"], arms: Float[np.ndarray, "3 question 2"]
) -> Float[np.ndarray, " draw"]:
    base, tuned, fixed = ((weights @ arm[:, 0]) / (weights @ arm[:, 1]) for arm in arms)
    excess = tuned - base
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(excess > 0, (tuned - fixed) / excess, np.nan)
    return share
