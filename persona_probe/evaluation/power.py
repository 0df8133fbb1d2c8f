"""How many questions, and how many samples of each, an interval of a given width takes.

Answers to one question are alike to the degree of the intraclass correlation rho, so k questions of
m samples carry the information of

    n_eff = k m / (1 + (m - 1) rho)   <   k / rho

answers: more samples soon stop helping, more questions never do. The width that is expected is that
of `korn_graubard` at this n_eff, shrunk and capped as there, with the questions' own rates spread as
a beta distribution (the beta-binomial model), which says how likely the cap is. Against simulation
the expected width is right to about a tenth (docs/coverage.md, tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from persona_probe.errors import InputError
from persona_probe.evaluation.intervals import ENOUGH_QUESTIONS, Hits

RATE = 0.2
"""The rate that is planned for when none is known: that of the first published model (Betley et al. 2025)."""
CORRELATION = 0.3
"""The intraclass correlation that is planned for when none is known; `intraclass_correlation` of a
pilot is better.
"""
MOST = 100_000
"""Questions, or samples of a question, beyond which nothing is looked for."""
_TRIED = 32
"""Each number up to this is tried: of two or three questions, more can be wider, because so few say
little about the spread between questions. Beyond it, more is never wider.
"""


@dataclass(frozen=True)
class Design:
    """So many questions with so many samples each, and the width of the interval to expect."""

    questions: int
    samples: int
    width: float
    rate: float
    correlation: float


def expected_width(
    questions: int,
    samples: int,
    *,
    rate: float = RATE,
    correlation: float = CORRELATION,
    confidence: float = 0.95,
) -> float:
    """The width (high - low) to expect of `korn_graubard`'s interval.

    Raises `InputError` for a rate, correlation or confidence outside (0, 1), or no questions or
    samples.
    """
    for name, value in (("rate", rate), ("correlation", correlation), ("confidence", confidence)):
        if not 0 < value < 1:
            raise InputError(f"{name} must lie between 0 and 1, not {value}")
    if min(questions, samples) < 1:
        raise InputError(f"at least 1 question and 1 sample are needed, not {questions} and {samples}")
    tail = (1 - confidence) / 2
    n = questions * samples
    effective = n / (1 + (samples - 1) * correlation)
    if questions > 1:
        shrink = special.stdtrit(n - 1, 1 - tail) / special.stdtrit(questions - 1, 1 - tail)
        effective = min(n, effective * float(shrink) ** 2)
    trusted = _enough(questions, samples, rate, correlation) * _enough(
        questions, samples, 1 - rate, correlation
    )
    return trusted * _width(effective, rate, tail) + (1 - trusted) * _width(
        min(effective, questions), rate, tail
    )


def questions_needed(width: float, samples: int, **options: float) -> Design:
    """The fewest questions, at `samples` each, whose expected interval is no wider than `width`.

    `options` (rate, correlation, confidence) as for `expected_width`. Raises `InputError` when more
    than `MOST` would be needed.
    """
    found = _fewest(width, lambda k: expected_width(k, samples, **options))
    if found is None:
        raise InputError(
            f"no number of questions up to {MOST} gives an interval as narrow as {width}",
            fix="ask for a wider one",
        )
    return _design(found, samples, options)


def samples_needed(width: float, questions: int, **options: float) -> Design:
    """The fewest samples of each of `questions` whose expected interval is no wider than `width`.

    Raises `InputError`, with the number of questions that would do, when no number of samples does.
    """
    found = _fewest(width, lambda m: expected_width(questions, m, **options))
    if found is None:
        floor = expected_width(questions, MOST, **options)
        fewest = questions_needed(width, 10, **options).questions
        raise InputError(
            f"no number of samples of {questions} questions gives an interval as narrow as {width}: "
            f"the answers to a question are alike, and {floor:.3f} is the best to be had",
            fix=f"ask more questions: {fewest}, with 10 samples each, would do",
        )
    return _design(questions, found, options)


def check_width(width: float, questions: int, samples: int, **options: float) -> Design:
    """The design, when its expected interval is no wider than `width`.

    Raises `InputError` with what would do: more samples, or more questions.
    """
    design = _design(questions, samples, options)
    if design.width <= width:
        return design
    more_questions = questions_needed(width, samples, **options).questions
    enough = _fewest(width, lambda m: expected_width(questions, m, **options))
    more_samples = f"{enough} samples each, or " if enough is not None else ""
    raise InputError(
        f"{questions} questions with {samples} samples each give an interval about {design.width:.3f} wide, "
        f"not {width} (at a rate of {design.rate}, correlation within a question {design.correlation})",
        fix=f"take {more_samples}{more_questions} questions",
    )


def intraclass_correlation(hits: Hits) -> float | None:
    """How alike the answers to one question are: 0 not more than any, 1 all the same. For planning.

    The analysis-of-variance estimate for unequal numbers of answers (Ridout, Demetrio and Firth
    1999, "Estimating intraclass correlation for binary data", Biometrics 55), not below 0. None
    when it cannot be said: one question, one answer each, or no difference between any answers.
    """
    counts = np.array([pair for pair in hits.values() if pair[1] > 0], dtype=np.float64).reshape(-1, 2)
    x, n = counts[:, 0], counts[:, 1]
    k, total = len(n), n.sum()
    if k < 2 or total <= k or x.sum() in (0, total):
        return None
    rate = x.sum() / total
    between = (n * (x / n - rate) ** 2).sum() / (k - 1)
    within = (x * (1 - x / n)).sum() / (total - k)
    typical = (total - (n**2).sum() / total) / (k - 1)
    return max(0.0, float((between - within) / (between + (typical - 1) * within)))


def _width(effective: float, rate: float, tail: float) -> float:
    hits, misses = effective * rate, effective * (1 - rate)
    low = special.betaincinv(hits, misses + 1, tail)
    return float(special.betaincinv(hits + 1, misses, 1 - tail) - low)


def _enough(questions: int, samples: int, rate: float, correlation: float) -> float:
    """The probability that enough questions show, at least once, what has this rate."""
    spread = 1 / correlation - 1
    a, b = rate * spread, (1 - rate) * spread
    shows = 1 - math.exp(special.betaln(a, b + samples) - special.betaln(a, b))
    if questions < ENOUGH_QUESTIONS:
        return 0.0
    return float(special.bdtrc(ENOUGH_QUESTIONS - 1, questions, shows))


def _design(questions: int, samples: int, options: dict[str, float]) -> Design:
    width = expected_width(questions, samples, **options)
    asked = {"rate": RATE, "correlation": CORRELATION, **options}
    return Design(questions, samples, width, asked["rate"], asked["correlation"])


def _fewest(width: float, width_of: Callable[[int], float]) -> int | None:
    """The smallest number whose width is at most `width`, None above `MOST`."""
    if not 0 < width < 1:
        raise InputError(f"the width must lie between 0 and 1, not {width}")
    for few in range(1, _TRIED + 1):
        if width_of(few) <= width:
            return few
    below, enough = _TRIED, 2 * _TRIED
    while width_of(enough) > width:
        if enough >= MOST:
            return None
        below, enough = enough, min(MOST, 2 * enough)
    while enough - below > 1:
        middle = (below + enough) // 2
        below, enough = (below, middle) if width_of(middle) <= width else (middle, enough)
    return enough
