"""Did a latent move further than benign fine-tunes move it?

Every fine-tune moves a large part of all latents, so "the shift is not 0" says nothing. The
question asked here is whether the shift could have come from one more benign tune. With d the tuned
model's shift of a latent and b_j those of J >= 2 benign tunes, on the same questions:

    did = d - mean b_j
    t   = did / sqrt((s~^2 - v)+ (1 + 1/J) + e^2)        df = min(d0 + J - 1, clusters - 1)

e is the cluster-robust error of did over questions, s^2 the variance of the b_j, and v what of s^2
the sampling of questions alone explains (so that it is not counted twice; e^2 has it). J is small,
and s^2 of one latent by itself next to worthless: s~^2 draws it towards all latents' (Smyth 2004,
the moderated t of limma), each in units of how much the latent itself varies between questions.
q-values are Benjamini and Hochberg's over the latents tested.

The unit must not know how far the benign tunes happened to move the latent: measured in the
variance of their *shifts* over questions, latents that they moved little look certain, and one more
benign tune had a hundred latents called (so the pocket organism's terse one).

Not covered: a fine-tune that is simply *stronger* than the benign ones moves everything further,
and this test says so of every latent. Choose benign tunes of like strength, and more than one
domain.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from persona_probe.errors import InputError

Vector = NDArray[np.float64]

ROUNDING = 1e-12
"""A variance below this share of its unit is rounding: the tunes agree on that latent."""


class Prior(NamedTuple):
    """What all latents together say of one latent's variance: worth `df` more observations of
    `scale`.
    """

    df: float
    scale: float


class Significance(NamedTuple):
    """One entry per latent; NaN where it was not tested."""

    z: Vector
    """`t` above."""
    p: Vector
    """Two-sided."""
    q: Vector
    df: float


def against_benign(
    did: Vector,
    error: Vector,
    between: Vector,
    within: Vector,
    unit: Vector,
    *,
    n_benign: int,
    n_clusters: int,
    tested: NDArray[np.bool_],
) -> Significance:
    """Test each latent's shift against the benign tunes'.

    Args:
        did: tuned shift minus the mean benign shift.
        error: its cluster-robust standard error.
        between: variance (ddof 1) of the benign shifts.
        within: the part of `between` that question sampling alone explains.
        unit: squared error of the latent's mean over questions, averaged over all models; variances
            are compared in its units.
        tested: which latents to test. Those that hardly ever fire are better left out.

    Raises `InputError` with fewer than two benign tunes or clusters.
    """
    if n_benign < 2 or n_clusters < 2:
        raise InputError(
            f"a test needs at least two benign tunes and two questions, got {n_benign} and {n_clusters}",
            fix="give more benign fine-tunes; without them the shift is described, not tested",
        )
    tested = tested & (unit > 0)
    z = np.full(did.shape, np.nan)
    p, q = z.copy(), z.copy()
    if not tested.any():
        return Significance(z, p, q, float("nan"))
    observed = between[tested] / unit[tested]
    prior = fit_prior(observed, n_benign - 1)
    df = min(prior.df + n_benign - 1, n_clusters - 1.0)
    moderated = unit[tested] * _moderate(observed, n_benign - 1, prior)
    beyond = np.maximum(moderated - within[tested], 0.0)
    variance = beyond * (1 + 1 / n_benign) + error[tested] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(did[tested] == 0, 0.0, did[tested] / np.sqrt(variance))
    z[tested] = t
    p[tested] = 2 * special.stdtr(df, -np.abs(t))
    q[tested] = benjamini_hochberg(p[tested])
    return Significance(z, p, q, df)


def fit_prior(variances: Vector, df: int) -> Prior:
    """Fit a scaled inverse chi-square to the true variances behind sample variances with `df`
    degrees of freedom.

    By the mean and the variance of their logarithms (Smyth 2004, section 6.2). Zeros say nothing
    and are left out."""
    logs = np.log(variances[variances > ROUNDING])
    if len(logs) < 3:
        return Prior(0.0, 1.0)
    centred = logs - special.digamma(df / 2) + np.log(df / 2)
    spread = float(centred.var(ddof=1)) - float(special.polygamma(1, df / 2))
    if spread <= 0:  # no more than sampling: all latents have one variance
        return Prior(float("inf"), float(np.exp(centred.mean())))
    half = _trigamma_inverse(spread)
    scale = float(np.exp(centred.mean() + special.digamma(half) - np.log(half)))
    return Prior(2 * half, scale)


def benjamini_hochberg(p: Vector) -> Vector:
    """q-values: the smallest false discovery rate at which each is called."""
    n = len(p)
    order = np.argsort(p)
    ranked = p[order] * n / np.arange(1, n + 1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1.0)
    return q


def _moderate(variances: Vector, df: int, prior: Prior) -> Vector:
    if np.isinf(prior.df):
        return np.full_like(variances, prior.scale)
    return (prior.df * prior.scale + df * variances) / (prior.df + df)


def _trigamma_inverse(value: float) -> float:
    """The x > 0 with trigamma(x) = value; trigamma falls from infinity to 0."""

    def gap(log_x: float) -> float:
        return float(np.log(special.polygamma(1, np.exp(log_x)))) - float(np.log(value))

    return math.exp(cast(float, optimize.brentq(gap, -30.0, 30.0)))
