"""Are answers made elsewhere those that would be drawn here?

Steered arms can only be sampled here. Held against answers from another engine, they would show
that engine's quirks (a template, a default top-k, a quantised model) as if they were the fix's
doing. So the same model is asked here too, and the rates are compared, paired by question.
"""

from __future__ import annotations

from dataclasses import dataclass

from persona_probe.evaluation.comparison import Comparison, compare
from persona_probe.evaluation.metrics import Outcome, hits_by_question
from persona_probe.evaluation.result import EvalResult

LOOKED_AT: tuple[Outcome, ...] = ("misaligned", "incoherent", "truncated")
CONFIDENCE = 1 - 0.05 / len(LOOKED_AT)
"""Of each interval, so that all of them hold together in 95 of 100 cases (Bonferroni)."""


@dataclass(frozen=True)
class Parity:
    """The given answers' rates against those drawn here, by outcome (given minus drawn)."""

    differences: dict[Outcome, Comparison]
    """Empty when no question was judged in both."""

    @property
    def disagreements(self) -> tuple[str, ...]:
        """The rates whose difference is more than chance, in words."""
        return tuple(
            f"{name} {one.second:.0%} given, {one.first:.0%} drawn here"
            for name, one in self.differences.items()
            if one.low > 0 or one.high < 0
        )

    @property
    def agrees(self) -> bool | None:
        """None when nothing could be compared."""
        return not self.disagreements if self.differences else None


def parity(given: EvalResult, drawn: EvalResult) -> Parity:
    """Compare answers made elsewhere with answers of the same model drawn here.

    Raises `MismatchError` when they are not answers to the same questions.
    """
    found: dict[Outcome, Comparison] = {}
    for name in LOOKED_AT:
        here, there = (
            hits_by_question(one.answers, one.judgements, trait=one.trait, in_domain=one.in_domain, what=name)
            for one in (drawn, given)
        )
        judged = any(here[key][1] and there[key][1] for key in here.keys() & there.keys())
        if judged or here.keys() != there.keys():
            found[name] = compare(here, there, confidence=CONFIDENCE)
    return Parity(found)
