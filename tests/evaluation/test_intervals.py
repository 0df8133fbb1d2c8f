"""Closed forms, symmetry, coverage by simulation, and an independent reading of the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.intervals import Necessity, korn_graubard, necessity


def clopper_pearson(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    interval = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (1, 30), (4, 12), (15, 30), (30, 30), (0, 1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_one_answer_per_question_is_clopper_pearson(hits: int, n: int, confidence: float) -> None:
    got = korn_graubard([1] * hits + [0] * (n - hits), [1] * n, confidence)
    assert got[:2] == pytest.approx(clopper_pearson(hits, n, confidence), abs=1e-12)
    assert got.n_effective == pytest.approx(n)


@pytest.mark.parametrize(("hits", "expected"), [(0, 0), (5, 1)])
def test_no_hits_or_only_hits_count_each_question_once(hits: int, expected: int) -> None:
    got = korn_graubard([hits] * 20, [5] * 20)
    assert got[:2] == pytest.approx(clopper_pearson(20 * expected, 20), abs=1e-12)
    # the closed form: 1 - (alpha / 2)^(1 / n)
    free_end = got.high if expected == 0 else 1 - got.low
    assert free_end == pytest.approx(1 - 0.025 ** (1 / 20))


def test_questions_that_answer_all_or_nothing_count_once_each() -> None:
    """Intraclass correlation 1: forty answers of one question say what one says."""
    got = korn_graubard([40] * 12 + [0] * 12, [40] * 24)
    alone = korn_graubard([1] * 12 + [0] * 12, [1] * 24)
    n, k = 960, 24
    v = k / (k - 1) * k * (20.0**2) / n**2
    n_eff = n / (v / (0.25 / (n - 1))) * (stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, k - 1)) ** 2
    assert got.n_effective == pytest.approx(n_eff)
    assert got.n_effective < alone.n_effective == 24


def test_answers_that_vary_less_than_chance_gain_nothing() -> None:
    got = korn_graubard([2] * 15, [4] * 15)
    assert got.n_effective == 60
    assert got[:2] == pytest.approx(clopper_pearson(30, 60), abs=1e-12)


def test_against_the_formula_read_anew_on_unequal_questions() -> None:
    hits = [3, 0, 5, 1, 1, 0, 2, 4, 1, 2, 6, 1, 2, 0, 3]
    n_i = [5, 4, 8, 3, 6, 2, 4, 9, 3, 5, 8, 4, 5, 3, 6]
    n, k = sum(n_i), len(n_i)
    p = sum(hits) / n
    residuals = [x - p * m for x, m in zip(hits, n_i, strict=True)]
    variance = k / (k - 1) * math.fsum(r * r for r in residuals) / n**2
    deff = variance / (p * (1 - p) / (n - 1))
    n_eff = min(n, n / deff * (stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, k - 1)) ** 2)
    expected = (
        stats.beta.ppf(0.025, n_eff * p, n_eff * (1 - p) + 1),
        stats.beta.ppf(0.975, n_eff * p + 1, n_eff * (1 - p)),
        n_eff,
    )
    assert korn_graubard(hits, n_i) == pytest.approx(expected)
    assert korn_graubard([0, *hits, 0], [0, *n_i, 0]) == pytest.approx(expected)


@pytest.mark.parametrize(("showing", "capped"), [(9, True), (10, False)])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_cap_ends_where_ten_questions_show_and_ten_lack_the_outcome(
    showing: int, capped: bool, flipped: bool
) -> None:
    hits = [1] * showing + [0] * (20 - showing)
    if flipped:
        hits = [8 - x for x in hits]
    got = korn_graubard(hits, [8] * 20)
    assert (got.n_effective == 20) is capped
    assert got.n_effective >= 20


@given(
    st.lists(
        st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
        min_size=1,
        max_size=40,
    )
)
@settings(max_examples=60, deadline=None)
def test_properties(counts: list[tuple[int, int]]) -> None:
    hits, n = zip(*counts, strict=True)
    low, high, n_eff = korn_graubard(hits, n)
    p = sum(hits) / sum(n)
    assert 0 <= low <= p <= high <= 1
    assert 0 < n_eff <= sum(n)
    mirrored = korn_graubard([m - x for x, m in counts], n)
    assert mirrored == pytest.approx((1 - high, 1 - low, n_eff), abs=1e-9)
    wider = korn_graubard(hits, n, 0.99)
    assert wider.low <= low and wider.high >= high


@pytest.mark.parametrize("questions", [8, 24, 44])
@pytest.mark.parametrize("icc", [0.1, 0.3])
@pytest.mark.parametrize("rate", [0.02, 0.05, 0.2, 0.5])
def test_coverage_on_correlated_answers(questions: int, icc: float, rate: float) -> None:
    rng = np.random.default_rng([questions, int(icc * 10), int(rate * 100)])
    spread = 1 / icc - 1
    runs = 800
    truth = rng.beta(rate * spread, (1 - rate) * spread, (runs, questions))
    hits = rng.binomial(10, truth)
    ends = [korn_graubard(row, [10] * questions) for row in hits.tolist()]
    covered = np.mean([low <= rate <= high for low, high, _ in ends])
    assert covered >= 0.93


@pytest.mark.parametrize(
    ("hits", "n"),
    [([], []), ([0], [0]), ([2], [1]), ([-1], [1]), ([math.nan], [1]), ([1, 1], [1])],
)
def test_impossible_counts_are_refused(hits: list[float], n: list[float]) -> None:
    with pytest.raises(InputError):
        korn_graubard(hits, n)


def test_a_confidence_in_percent_is_refused() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        korn_graubard([1], [2], 95)


Arm = dict[str, tuple[int, int]]


def arm(*hits: int, n: int = 10) -> Arm:
    return {f"q{i}": (x, n) for i, x in enumerate(hits)}


def test_necessity_is_the_share_of_the_excess_that_goes() -> None:
    base, tuned = arm(0, 1, 0, 2, 1, 0), arm(8, 9, 7, 10, 6, 9)
    assert necessity(base, tuned, base)[0] == 1
    assert necessity(base, tuned, tuned) == Necessity(0, 0, 0)
    half = arm(*((b[0] + t[0]) // 2 for b, t in zip(base.values(), tuned.values(), strict=True)))
    got = necessity(base, tuned, half)
    assert got.fraction == pytest.approx((49 - sum(x for x, _ in half.values())) / (49 - 4))
    assert got.low is not None and got.high is not None
    assert got.low <= got.fraction <= got.high
    worse = necessity(base, tuned, arm(9, 9, 9, 10, 9, 9))
    assert worse.fraction is not None and worse.fraction < 0


def test_necessity_pairs_the_questions() -> None:
    """An edit that halves each question's excess has no spread between questions, however these
    differ.
    """
    tuned = arm(2, 10, 4, 8, 6, 10, 2, 4)
    half = arm(*(x // 2 for x, _ in tuned.values()))
    assert necessity(arm(*[0] * 8), tuned, half) == pytest.approx(Necessity(0.5, 0.5, 0.5))


def test_necessity_against_a_slow_bootstrap() -> None:
    base, tuned, fixed = arm(0, 1, 0, 2), arm(8, 9, 3, 10), arm(3, 9, 1, 4)
    got = necessity(base, tuned, fixed, draws=4000, seed=1)
    rng = np.random.default_rng(7)
    slow = []
    for _ in range(4000):
        keys = [f"q{i}" for i in rng.integers(0, 4, 4)]
        b, t, f = (sum(side[key][0] for key in keys) for side in (base, tuned, fixed))
        slow.append((t - f) / (t - b))
    assert got[1:] == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=0.03)


def test_necessity_without_a_certain_excess() -> None:
    assert necessity(arm(5, 5), arm(4, 4), arm(0, 0)) == Necessity(None, None, None)
    unsure = necessity(arm(0, 6, 0), arm(9, 0, 0), arm(0, 0, 0))
    assert unsure.fraction == pytest.approx(3.0)
    assert unsure.low is None and unsure.high is None
    assert necessity({}, {}, {}) == Necessity(None, None, None)


def test_necessity_leaves_out_what_an_arm_did_not_answer() -> None:
    base, tuned = arm(0, 0, 0), arm(10, 10, 10)
    fixed = {"q0": (5, 10), "q1": (5, 10), "q2": (0, 0)}
    assert necessity(base, tuned, fixed).fraction == 0.5
    with pytest.raises(MismatchError, match="'q2'"):
        necessity(base, tuned, arm(1, 2))
