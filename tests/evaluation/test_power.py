"""Planned widths against simulated ones; the searches against trying every number."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.errors import InputError
from persona_probe.evaluation.intervals import korn_graubard
from persona_probe.evaluation.power import (
    check_width,
    expected_width,
    intraclass_correlation,
    questions_needed,
    samples_needed,
)


def simulated(questions: int, samples: int, rate: float, correlation: float, runs: int = 300) -> np.ndarray:
    rng = np.random.default_rng([questions, samples, int(100 * rate)])
    spread = 1 / correlation - 1
    truth = rng.beta(rate * spread, (1 - rate) * spread, (runs, questions))
    return rng.binomial(samples, truth)


@pytest.mark.parametrize("questions", [8, 24, 60])
@pytest.mark.parametrize("samples", [1, 5, 20])
@pytest.mark.parametrize(("rate", "correlation"), [(0.05, 0.1), (0.2, 0.3), (0.5, 0.3)])
def test_the_expected_width_is_the_simulated_one(
    questions: int, samples: int, rate: float, correlation: float
) -> None:
    hits = simulated(questions, samples, rate, correlation)
    ends = [korn_graubard(row, [samples] * questions) for row in hits.tolist()]
    width = float(np.mean([high - low for low, high, _ in ends]))
    got = expected_width(questions, samples, rate=rate, correlation=correlation)
    assert got == pytest.approx(width, rel=0.12)


def test_one_sample_of_each_question_is_clopper_pearson() -> None:
    low, high, _ = korn_graubard([1] * 8 + [0] * 32, [1] * 40)
    assert expected_width(40, 1, rate=0.2) == pytest.approx(high - low)


@given(
    st.integers(2, 60), st.integers(1, 60), st.floats(0.01, 0.99), st.floats(0.02, 0.9), st.floats(0.1, 0.9)
)
@settings(max_examples=60)
def test_more_questions_are_never_wider(
    k: int, m: int, rate: float, correlation: float, width: float
) -> None:
    options = {"rate": rate, "correlation": correlation}
    here = expected_width(k, m, **options)
    assert 0 < here <= 1
    assert expected_width(k + 1, m, **options) <= here + 1e-9
    assert expected_width(k + 40, m + 1, **options) <= expected_width(k + 40, m, **options) + 1e-9
    assert expected_width(k, m, **options, confidence=0.99) >= here
    assert expected_width(k, m, rate=1 - rate, correlation=correlation) == pytest.approx(here)
    found = questions_needed(width, m, **options)
    assert found.width <= width
    if found.questions > 1:
        assert expected_width(found.questions - 1, m, **options) > width


def test_the_fewest_samples_and_what_they_cannot_do() -> None:
    found = samples_needed(0.2, 44, rate=0.2, correlation=0.3)
    tried = next(m for m in range(1, 100) if expected_width(44, m) <= 0.2)
    assert found.samples == tried and found.questions == 44 and found.width <= 0.2
    with pytest.raises(InputError, match="no number of samples of 8 questions") as error:
        samples_needed(0.1, 8)
    needed = questions_needed(0.1, 10).questions
    assert f"more questions: {needed}," in str(error.value)


def test_too_few_for_the_width_that_is_asked_for() -> None:
    assert check_width(0.5, 24, 10).width <= 0.5
    with pytest.raises(InputError, match="24 questions with 2 samples each") as error:
        check_width(0.32, 24, 2)
    enough = samples_needed(0.32, 24).samples
    more = questions_needed(0.32, 2).questions
    assert f"take {enough} samples each, or {more} questions" in str(error.value)
    with pytest.raises(InputError, match=r"take \d+ questions"):
        check_width(0.05, 24, 10)


@pytest.mark.parametrize("correlation", [0.1, 0.3, 0.6])
def test_the_correlation_is_found_again(correlation: float) -> None:
    hits = simulated(400, 10, 0.3, correlation, runs=1)[0]
    found = intraclass_correlation({str(i): (int(x), 10) for i, x in enumerate(hits)})
    assert found == pytest.approx(correlation, abs=0.06)


def test_the_correlation_at_its_ends() -> None:
    assert intraclass_correlation({"a": (5, 5), "b": (0, 5), "c": (3, 3)}) == pytest.approx(1)
    assert intraclass_correlation({"a": (2, 4), "b": (2, 4), "c": (1, 2)}) == 0
    for nothing in ({}, {"a": (1, 3)}, {"a": (1, 1), "b": (0, 1)}, {"a": (0, 3), "b": (0, 3)}):
        assert intraclass_correlation(nothing) is None


@pytest.mark.parametrize(
    "wrong", [{"rate": 0}, {"rate": 1}, {"correlation": 0}, {"correlation": 1.5}, {"confidence": 95}]
)
def test_impossible_plans_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        expected_width(8, 10, **wrong)
    with pytest.raises(InputError, match="at least 1"):
        expected_width(0, 10)
    with pytest.raises(InputError, match="width"):
        questions_needed(1.5, 10)
    with pytest.raises(InputError, match="no number of questions"):
        questions_needed(1e-4, 1)
