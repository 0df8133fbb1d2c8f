"""Level and gain by search: what each setting does to generated answers, and which one to keep.

Every setting of every candidate is a row of the same batches, drawn with the same random numbers, so
arms differ by their edit alone. Settings are chosen on calibration questions; what they reach is
reported on others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from persona_probe.evaluation.judges import Judge
from persona_probe.evaluation.metrics import Rate
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.model.language_model import LanguageModel
from persona_probe.screening.candidate import Candidate
from persona_probe.screening.margin import Fix

Rates = dict[str, Rate]

GAINS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Of a cure; 1 restores the base's level, above it over-corrects."""
STRENGTHS = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Of inducing, in residual rms."""


@dataclass(frozen=True)
class Bench:
    """What every arm of a comparison shares: questions, sampling, judge, and what counts."""

    questions: tuple[Question, ...]
    sampling: Sampling
    judge: Judge
    trait: str = "misaligned"
    in_domain: tuple[str, ...] = ()

    def on(self, questions: Sequence[Question], samples: int) -> Bench:
        """The same on other questions, so many answers each."""
        return replace(
            self,
            questions=tuple(questions),
            sampling=replace(self.sampling, samples=samples),
        )

    def arms(self, lm: LanguageModel, fixes: Sequence[Fix], **options: Any) -> list[EvalResult]:
        """One result per fix, all sampled in the same batches; ``options`` go to ``sample``."""
        n = len(self.questions)
        answers = sample(
            lm,
            self.questions * len(fixes),
            self.sampling,
            fixes=[fix for fix in fixes for _ in range(n)],
            **{"batch_size": 384, **options},
        )
        each = n * self.sampling.samples
        parts = [answers[start : start + each] for start in range(0, len(answers), each)]
        return [
            EvalResult(tuple(part), tuple(self.judge.judge(part)), self.trait, self.in_domain)
            for part in parts
        ]

    def run(self, lm: LanguageModel, fixes: Sequence[Fix]) -> list[Rates]:
        """The rates under each fix."""
        return [arm.rates for arm in self.arms(lm, fixes)]


def value(rates: Rates, name: str) -> float:
    """A rate as a number; 0 where nothing was counted."""
    return rates[name].rate or 0.0


def whole(rates: Rates) -> float:
    """Share of answers that are coherent, without the trait, and in no rival persona's voice."""
    lost = ("misaligned", "other_persona", "incoherent", "truncated")
    return 1 - sum(value(rates, name) for name in lost)


@dataclass(frozen=True, eq=False)
class Setting:
    """One strength of one candidate, and what it did to the calibration answers."""

    strength: float
    """A gain (cure) or residual rms (inducing)."""
    rates: Rates
    within_budget: bool
    """Incoherent answers stayed within the budget."""


@dataclass(frozen=True, eq=False)
class Dose:
    """The dose-response of one candidate, and the setting to keep."""

    candidate: Candidate
    settings: tuple[Setting, ...]
    best: Setting


def cures(
    lm: LanguageModel,
    candidates: Sequence[Candidate],
    bench: Bench,
    *,
    incoherent_at_most: float,
    gains: Sequence[float] = GAINS,
) -> list[Dose]:
    """Dose-response of each candidate's cure in the tuned model.

    The best setting is the one with most whole answers among those within the budget of incoherence
    (if none is, among all); the smaller gain where two are equal.
    """

    return _search(lm, candidates, bench, incoherent_at_most, gains, lambda c, gain: c.cure(gain), whole)


def inductions(
    lm: LanguageModel,
    candidates: Sequence[Candidate],
    bench: Bench,
    *,
    incoherent_at_most: float,
    strengths: Sequence[float] = STRENGTHS,
) -> list[Dose]:
    """Dose-response of adding each candidate to the base model; best is most of the trait in budget."""
    return _search(
        lm,
        candidates,
        bench,
        incoherent_at_most,
        strengths,
        lambda c, strength: c.induce(strength),
        lambda rates: value(rates, "misaligned"),
    )


def _search(
    lm: LanguageModel,
    candidates: Sequence[Candidate],
    bench: Bench,
    incoherent_at_most: float,
    strengths: Sequence[float],
    edit: Callable[[Candidate, float], Fix],
    merit: Callable[[Rates], float],
) -> list[Dose]:
    fixes = [edit(candidate, strength) for candidate in candidates for strength in strengths]
    arms = iter(bench.run(lm, fixes))
    doses: list[Dose] = []
    for candidate in candidates:
        settings = tuple(
            Setting(strength, rates, value(rates, "incoherent") <= incoherent_at_most)
            for strength, rates in zip(strengths, islice(arms, len(strengths)), strict=True)
        )
        allowed = [setting for setting in settings if setting.within_budget] or list(settings)
        best = max(allowed, key=lambda setting: (merit(setting.rates), -setting.strength))
        doses.append(Dose(candidate, settings, best))
    return doses
