"""How often the intervals hold the truth, by simulation: `python -m benchmarks coverage`.

`python -m benchmarks.coverage` writes the tables to docs/coverage.md as well. Questions' own rates are
drawn from a beta distribution with the mean and the intraclass correlation asked for, answers from
them. Two arms of a comparison share their questions: their rates have a Gaussian copula with
correlation .7. The intervals are the ones that every table of the package shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy import special, stats

from benchmarks.figure import Figure
from persona_probe.artifact import write_text
from persona_probe.evaluation.comparison import compare
from persona_probe.evaluation.intervals import korn_graubard

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
QUESTIONS = (8, 24, 44)
CORRELATIONS = (0.1, 0.3)
RATES = (0.02, 0.05, 0.2, 0.5)
PAIRS = ((0.05, 0.05), (0.05, 0.2), (0.2, 0.5))
SAMPLES = 10
SHARED = 0.7
FLOOR = 0.93


@dataclass(frozen=True)
class Cell:
    """What one interval did at one setting."""

    questions: int
    correlation: float
    rate: str
    covered: float
    """Share of runs in which the interval held the truth."""
    width: float
    """Its mean width."""
    peer: float
    """Share of runs in which a t interval over the questions' own rates held it."""


def run(quick: bool) -> list[Figure]:
    """The worst coverage over all settings, of the rates and of the differences."""
    runs = 300 if quick else 4000
    return [
        *_figures("rate", list(rates(runs))),
        *_figures("difference", list(differences(runs // 2))),
    ]


def rates(runs: int) -> Iterator[Cell]:
    """Coverage of `korn_graubard` at every setting."""
    for questions, correlation, rate in product(QUESTIONS, CORRELATIONS, RATES):
        rng = np.random.default_rng([1, questions, int(10 * correlation), int(100 * rate)])
        truth = _beta(rng.random((runs, questions)), rate, correlation)
        hits = rng.binomial(SAMPLES, truth)
        ends = np.array([korn_graubard(row, [SAMPLES] * questions)[:2] for row in hits.tolist()])
        yield Cell(questions, correlation, f"{rate}", *_held(ends, rate), _t_holds(hits / SAMPLES, rate))


def differences(runs: int) -> Iterator[Cell]:
    """Coverage of `compare` at every setting."""
    for questions, correlation, (first, second) in product(QUESTIONS, CORRELATIONS, PAIRS):
        rng = np.random.default_rng(
            [2, questions, int(10 * correlation), int(100 * first), int(100 * second)]
        )
        common, own = rng.normal(size=(2, runs, questions))
        ease = special.ndtr(np.stack([common, SHARED * common + np.sqrt(1 - SHARED**2) * own]))
        one, other = (
            rng.binomial(SAMPLES, _beta(ease[arm], rate, correlation))
            for arm, rate in enumerate((first, second))
        )
        truth = second - first
        ends = np.array([_compared(x, y) for x, y in zip(one, other, strict=True)])
        peer = _t_holds((other - one) / SAMPLES, truth)
        yield Cell(questions, correlation, f"{first} and {second}", *_held(ends, truth), peer)


def _beta(quantile: Float[np.ndarray, "run question"], rate: float, correlation: float) -> np.ndarray:
    spread = 1 / correlation - 1
    return special.betaincinv(rate * spread, (1 - rate) * spread, quantile)


def _compared(
    first: Int[np.ndarray, " question"], second: Int[np.ndarray, " question"]
) -> tuple[float, float]:
    arms = ({str(i): (hits, SAMPLES) for i, hits in enumerate(arm.tolist())} for arm in (first, second))
    found = compare(*arms, draws=1)
    return found.low, found.high


def _held(ends: Float[np.ndarray, "run 2"], truth: float) -> tuple[float, float]:
    low, high = ends.T
    return float(((low <= truth) & (truth <= high)).mean()), float((high - low).mean())


def _t_holds(values: Float[np.ndarray, "run question"], truth: float) -> float:
    k = values.shape[1]
    reach = stats.t.ppf(0.975, k - 1) * values.std(1, ddof=1) / np.sqrt(k)
    return float((np.abs(values.mean(1) - truth) <= reach).mean())


def _figures(what: str, cells: list[Cell]) -> list[Figure]:
    worst = min(cell.covered for cell in cells)
    peer = min(cell.peer for cell in cells)
    return [
        Figure(
            name=f"worst coverage of the 95% interval of a {what}, {len(cells)} settings",
            value=worst,
            unit="of runs",
            against=f"t interval over questions: {peer:.3f}",
            bar=f">= {FLOOR}",
            holds=worst >= FLOOR,
        )
    ]


def page(of_rates: Iterable[Cell], of_differences: Iterable[Cell], runs: int) -> str:
    """docs/coverage.md."""
    return f"""# How often the intervals hold the truth

Written by `python -m benchmarks.coverage`: {runs} simulated evaluations per row for a rate, {runs // 2} for a
difference, {SAMPLES} answers to each question (beta-binomial, with the intraclass correlation in the second
column). Every interval is a nominal 95% one.

*Ours* is the one that every table shows: Korn and Graubard's, with questions as the sampling unit and the
effective number of answers capped at the number of questions while fewer than 10 questions show the
outcome or fewer than 10 lack it. *t* is Student's interval over the questions' own rates: a mean and its
standard error. At low rates and few questions ours is conservative (it holds more than 95%): so few
questions do not say how far questions differ. It is meant never to fall below {FLOOR:.0%}.

## A rate

{_table("rate", of_rates)}

## The difference of two models on the same questions

Low and high as `compare` gives them; the two models' rates on a question are correlated ({SHARED}). *t* is
the paired t interval, which needs fewer questions but misses more often where rates are low. With 8
questions, rely on the exact p-value of `compare` rather than on the width of its interval.

{_table("rates", of_differences)}
"""


def _table(rate: str, cells: Iterable[Cell]) -> str:
    head = (
        f"| questions | correlation | {rate} | ours holds | mean width | t holds |\n" + "| --- " * 6 + "|\n"
    )
    return head + "\n".join(
        f"| {c.questions} | {c.correlation} | {c.rate} | {c.covered:.3f} | {c.width:.3f} | {c.peer:.3f} |"
        for c in cells
    )


if __name__ == "__main__":
    write_text(PAGE, page(rates(4000), differences(2000), 4000))
