"""The test against benign tunes: calibrated where nothing is there, and able to see what is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from persona_probe.diffing.cluster_sums import ClusterSums
from persona_probe.diffing.moments import Moments
from persona_probe.diffing.significance import (
    Significance,
    against_benign,
    benjamini_hochberg,
    fit_prior,
)
from persona_probe.diffing.tally import beyond_benign
from persona_probe.errors import InputError

LATENTS, QUESTIONS = 400, 24


def simulate(
    n_benign: int, seed: int, *, tunes: float, spread: float, louder: float = 1.0, effect: float = 0.0
) -> Significance:
    """Tunes that shift every latent at random, on questions that answer to each tune differently.

    Latents differ in scale by orders of magnitude, and in how far tunes move them by `spread`; the
    tuned model is one more such tune, `louder` on single questions, with `effect` on 20 latents.
    """
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 1.5, LATENTS))
    moves = tunes * scale * np.exp(rng.normal(0, spread, LATENTS))
    base = np.abs(rng.normal(0, 1, (QUESTIONS, LATENTS))) * scale
    arms = [base]
    for tune in range(n_benign + 1):
        shift = rng.normal(0, 1, LATENTS) * moves
        own = rng.normal(0, 1, (QUESTIONS, LATENTS)) * scale * (louder if tune == 0 else 1.0)
        arms.append(base + shift + own)
    arms[1][:, :20] += effect * scale[:20]
    moments = Moments(len(arms), LATENTS)
    moments.add([dense(arm) for arm in arms], torch.ones(QUESTIONS, dtype=torch.long))
    return beyond_benign(moments)


def dense(arm: NDArray[np.float64]) -> ClusterSums:
    """Sums of one model in which every latent fires on every question."""
    question, latent = torch.ones(QUESTIONS, LATENTS).nonzero(as_tuple=True)
    none = torch.zeros(0, dtype=torch.float64)
    return ClusterSums(
        cluster=question,
        latent=latent,
        activation=torch.from_numpy(arm).flatten(),
        fires=torch.ones(len(latent), dtype=torch.float64),
        maximum=torch.zeros(LATENTS),
        fired=torch.ones(LATENTS, dtype=torch.long),
        mean=torch.zeros(QUESTIONS, 0, dtype=torch.float64),
        token_sum=none,
        error_sum=none,
        squares=torch.zeros(2, dtype=torch.float64),
    )


@pytest.mark.parametrize("n_benign", [2, 3, 4])
@pytest.mark.parametrize(
    "world",
    [
        {"tunes": 0.0, "spread": 0.0},
        {"tunes": 0.3, "spread": 1.0},
        {"tunes": 1.0, "spread": 1.0},
        {"tunes": 0.3, "spread": 1.0, "louder": 3.0},
    ],
    ids=["questions only", "tunes", "strong tunes", "louder"],
)
def test_one_more_benign_tune_is_rarely_called(n_benign: int, world: dict[str, float]) -> None:
    """p is uniform or conservative, and a false latent is claimed in few of the worlds."""
    found = [simulate(n_benign, seed, **world) for seed in range(12)]
    share = float(np.mean([(each.p < 0.05).mean() for each in found]))
    assert share < 0.065
    assert np.mean([(each.p < 0.005).mean() for each in found]) < 0.009
    assert sum(bool((each.q < 0.05).any()) for each in found) <= 3


def test_it_is_not_needlessly_timid() -> None:
    share = np.mean([(simulate(3, s, tunes=0.3, spread=1.0).p < 0.05).mean() for s in range(12)])
    assert share > 0.035


def test_a_latent_that_only_this_tune_moves_is_found() -> None:
    """And those called are those moved: false discoveries stay near their rate."""
    found = [simulate(3, seed, tunes=0.1, spread=0.5, effect=4.0) for seed in range(8)]
    called = [np.flatnonzero(each.q < 0.05) for each in found]
    assert np.mean([(each < 20).sum() / 20 for each in called]) > 0.9
    assert np.mean([(each >= 20).sum() / max(len(each), 1) for each in called]) < 0.1


def test_the_statistic_is_the_formula_where_the_prior_says_nothing_or_all() -> None:
    """Equal variances: the prior is certain, every latent gets the common one."""
    did, ones = np.array([0.0, 1.0, -3.0, 2.0]), np.ones(4)
    found = against_benign(
        did, 0.5 * ones, 2.0 * ones, 0.75 * ones, ones, n_benign=4, n_clusters=11,
        tested=np.array([True, True, True, False]),
    )  # fmt: skip
    prior = fit_prior(2.0 * np.ones(3), 3)
    assert np.isinf(prior.df) and found.df == 10
    t = did[:3] / np.sqrt((prior.scale - 0.75) * 1.25 + 0.25)
    np.testing.assert_allclose(found.z[:3], t)
    np.testing.assert_allclose(found.p[:3], 2 * stats.t.sf(np.abs(t), 10))
    np.testing.assert_allclose(found.q[:3], stats.false_discovery_control(found.p[:3]))
    assert np.isnan([found.z[3], found.p[3], found.q[3]]).all()


@pytest.mark.parametrize(("df", "true_df", "scale"), [(2, 4.0, 3.0), (3, 10.0, 0.2), (5, 2.5, 1.0)])
def test_the_prior_is_recovered(df: int, true_df: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    variances = true_df * scale / rng.chisquare(true_df, 40_000)
    sample = variances * rng.chisquare(df, 40_000) / df
    found = fit_prior(sample, df)
    assert found.df == pytest.approx(true_df, rel=0.1)
    assert found.scale == pytest.approx(scale, rel=0.05)


def test_one_true_variance_makes_a_certain_prior() -> None:
    """With a single variance behind them, sample variances say that they are all alike."""
    rng = np.random.default_rng(1)
    found = fit_prior(7.0 * rng.chisquare(3, 5000) / 3, 3)
    assert found.df > 50 and found.scale == pytest.approx(7.0, rel=0.05)


def test_benjamini_and_hochberg_by_definition() -> None:
    p = np.random.default_rng(0).random(200) ** 3
    q = benjamini_hochberg(p)
    for i in range(200):
        larger = p[p >= p[i]]
        by_definition = min(min(x * 200 / (p <= x).sum() for x in larger), 1.0)
        assert q[i] == pytest.approx(by_definition)
    np.testing.assert_allclose(q, stats.false_discovery_control(p))


def test_too_little_to_test_with_is_refused() -> None:
    zero = np.zeros(3)
    for n_benign, n_clusters in ((1, 9), (3, 1)):
        with pytest.raises(InputError, match="two benign tunes and two questions"):
            against_benign(
                zero, zero, zero, zero, zero, n_benign=n_benign, n_clusters=n_clusters,
                tested=np.ones(3, dtype=bool),
            )  # fmt: skip
    found = against_benign(
        zero, zero, zero, zero, zero, n_benign=2, n_clusters=5, tested=np.ones(3, dtype=bool)
    )
    assert np.isnan(found.q).all()
