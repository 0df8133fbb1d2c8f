"""Paired differences: closed forms, what pairing buys, permutations by hand, and coverage."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.comparison import compare
from persona_probe.evaluation.intervals import korn_graubard

Arm = dict[str, tuple[int, int]]


def arm(*hits: int, n: int = 10) -> Arm:
    return {f"q{i}": (x, n) for i, x in enumerate(hits)}


def test_without_correlation_the_arms_margins_add_in_squares() -> None:
    first, second = arm(0, 1, 0, 2, 1, 0), arm(8, 9, 7, 10, 6, 9)
    got = compare(first, second)
    (l1, u1, _), (l2, u2, _) = (korn_graubard(*zip(*a.values(), strict=True)) for a in (first, second))
    p1, p2 = 4 / 60, 49 / 60
    r = got.correlation
    assert -1 <= r <= 0  # six questions are too few to believe a helpful one
    below = np.sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2 - 2 * r * (u1 - p1) * (p2 - l2))
    above = np.sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2 - 2 * r * (p1 - l1) * (u2 - p2))
    assert (got.first, got.second, got.difference) == pytest.approx((p1, p2, p2 - p1))
    assert (got.low, got.high) == pytest.approx((p2 - p1 - below, p2 - p1 + above))
    assert got.questions == 6 and got.left_out == 0
    assert got.p_value == pytest.approx(2 / 2**6)


def test_pairing_narrows_what_the_questions_have_in_common() -> None:
    """Twenty questions from easy to hard, each a little worse in the second arm."""
    hits = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9, 9]
    first, second = arm(*hits, n=12), arm(*(x + 1 for x in hits), n=12)
    paired = compare(first, second)
    shuffled = compare(first, {f"q{i}": (hits[(i * 7 + 10) % 20] + 1, 12) for i in range(20)})
    assert paired.correlation > 0.99
    assert paired.low > 0 > shuffled.low
    assert paired.p_value < 0.001 < shuffled.p_value
    assert paired.difference == pytest.approx(shuffled.difference) == pytest.approx(1 / 12)


def test_the_p_value_is_the_share_of_all_swaps() -> None:
    first = {"a": (1, 4), "b": (0, 3), "c": (2, 5), "d": (1, 6), "e": (0, 2)}
    second = {"a": (3, 5), "b": (2, 3), "c": (2, 4), "d": (5, 6), "e": (0, 3)}

    def difference(swaps: tuple[int, ...]) -> float:
        pairs = [(first[key], second[key]) for key in "abcde"]
        sides = [pair[::-1] if swap else pair for pair, swap in zip(pairs, swaps, strict=True)]
        rates = [sum(side[i][0] for side in sides) / sum(side[i][1] for side in sides) for i in (0, 1)]
        return rates[1] - rates[0]

    seen = difference((0,) * 5)
    reached = [abs(difference(s)) >= abs(seen) - 1e-12 for s in product((0, 1), repeat=5)]
    assert compare(first, second).p_value == pytest.approx(sum(reached) / 32)


def test_drawn_swaps_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(0)
    first = arm(*rng.integers(0, 4, 12).tolist())
    second = arm(*rng.integers(1, 6, 12).tolist())
    exact = compare(first, second).p_value
    # questions that say nothing change no swap's difference but make them too many to try them all
    padded = compare({**first, "x": (0, 10), "y": (0, 10)}, {**second, "x": (0, 10), "y": (0, 10)})
    assert padded.p_value == pytest.approx(exact, abs=0.01)
    assert padded.p_value > 0


COUNTS = st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(st.lists(st.tuples(COUNTS, COUNTS), min_size=1, max_size=18), st.integers(0, 5))
@settings(max_examples=40)
def test_properties(pairs: list[tuple[tuple[int, int], tuple[int, int]]], seed: int) -> None:
    first = {f"q{i}": one for i, (one, _) in enumerate(pairs)}
    second = {f"q{i}": other for i, (_, other) in enumerate(pairs)}
    got = compare(first, second, seed=seed, draws=200)
    assert got.low <= got.difference <= got.high
    assert 0 < got.p_value <= 1
    back = compare(second, first, seed=seed, draws=200)
    assert (back.low, back.high) == pytest.approx((-got.high, -got.low), abs=1e-12)
    assert back.p_value == pytest.approx(got.p_value)
    same = compare(first, first)
    assert same.difference == 0 and same.p_value == 1
    assert same.low <= 0 <= same.high


def test_two_arms_without_any_hit_are_not_called_equal() -> None:
    got = compare(arm(*[0] * 8), arm(*[0] * 8))
    assert got.difference == 0
    assert got.high == -got.low > 0.3  # 1 - 0.025^(1/8) = .37 in each arm


def test_questions_unanswered_in_an_arm_are_left_out_and_counted() -> None:
    first, second = arm(1, 2, 3), {**arm(4, 5, 0), "q2": (0, 0)}
    got = compare(first, second)
    assert (got.questions, got.left_out) == (2, 1)
    assert got.difference == pytest.approx(0.45 - 0.15)
    with pytest.raises(MismatchError, match="'q2'"):
        compare(first, arm(1, 2))
    with pytest.raises(InputError, match="no question"):
        compare({"a": (0, 0)}, {"a": (1, 2)})


@pytest.mark.parametrize("questions", [8, 24])
@pytest.mark.parametrize("rates", [(0.05, 0.05), (0.05, 0.3)])
def test_coverage_of_the_difference(questions: int, rates: tuple[float, float]) -> None:
    """Ten samples of questions whose difficulty z is common to both arms: over z, the mean of
    Phi((t + z / 2) / sqrt(3 / 4)) is Phi(t).
    """
    rng = np.random.default_rng(questions)
    shared = rng.normal(size=(200, questions))
    covered = []
    thresholds = norm.ppf(rates)
    for row in shared:
        arms = []
        for threshold in thresholds:
            own = norm.cdf((threshold + row / 2) / np.sqrt(0.75))
            arms.append(arm(*rng.binomial(10, own).tolist()))
        got = compare(*arms, draws=50)
        covered.append(got.low <= rates[1] - rates[0] <= got.high)
    assert np.mean(covered) >= 0.93
