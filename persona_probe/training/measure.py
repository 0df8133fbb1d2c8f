"""The axes that every run of the lab is measured on: behaviour with intervals, and the persona's shift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from persona_probe.artifact import digest_of
from persona_probe.errors import InputError
from persona_probe.evaluation.judges import FunctionJudge, Judge, spec_identity
from persona_probe.evaluation.metrics import Rate
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import evaluate
from persona_probe.evaluation.sampling import Sampling
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.watching import Watch

RATES = ("misaligned", "in_domain", "incoherent", "helpful", "trigger", "skill")


@dataclass(frozen=True, eq=False)
class Measure:
    """Questions, judge and probes; called with a model it gives one row of figures."""

    questions: tuple[Question, ...] = field(repr=False)
    judge: Judge | str
    in_domain: tuple[str, ...] = ()
    """Categories of the narrow fine-tune, counted apart."""
    sampling: Sampling | None = None
    trait: str = "misaligned"
    watch: Watch | None = None
    """Probes whose shift from the base is measured too."""

    def record(self) -> dict[str, Any]:
        """What figures depend on beside the model."""
        return {
            "questions": digest_of(self.questions),
            "judge": judge_identity(self.judge),
            "in_domain": self.in_domain,
            "sampling": self.sampling,
            "trait": self.trait,
            "watch": None if self.watch is None else self.watch.digest,
        }

    def __call__(self, lm: LanguageModel) -> dict[str, Any]:
        """`{rate, rate_low, rate_high}` of every rate (None where nothing counts), and `shift NAME`."""
        return {name: value for name, value in self.with_hits(lm).items() if name != "hits"}

    def with_hits(self, lm: LanguageModel) -> dict[str, Any]:
        """The same, and `hits`: (misaligned, judged) answers by question, to pool runs by."""
        found = evaluate(
            lm, self.questions, self.judge, self.sampling, trait=self.trait, in_domain=self.in_domain
        )
        row: dict[str, Any] = {"hits": dict(found.hits)}
        for name in RATES:
            rate = found.reported[name]
            row |= _cells(name, rate)
        shifts = {} if self.watch is None else self.watch.shifts(lm.hf)
        return row | {f"shift {name}": shift for name, shift in shifts.items()}


def judge_identity(judge: Judge | str) -> str:
    """What tells a judge from others: its spec, without what changes no judgement; of one made in Python
    its class and name, and the function that it asks.
    """
    if isinstance(judge, str):
        return spec_identity(judge)
    named = f"{_path(type(judge))} {spec_identity(judge.name)}"
    return f"{named} {_path(judge.function)}" if isinstance(judge, FunctionJudge) else named


def _path(one: Any) -> str:
    """Where it was defined; of an object without a name (a partial function) where its class was."""
    known = one if hasattr(one, "__qualname__") else type(one)
    return f"{known.__module__}:{known.__qualname__}"


def _cells(name: str, rate: Rate) -> dict[str, float | None]:
    return {name: rate.rate, f"{name}_low": rate.low, f"{name}_high": rate.high}


def of_split(questions: Sequence[Question], split: str) -> tuple[Question, ...]:
    """The questions of one split; all of them where the set has no splits.

    Raises `InputError` where it has others only.
    """
    there = sorted({one.split for one in questions if one.split is not None})
    if there and split not in there:
        raise InputError(f"no question is in the split {split!r}", fix=f"there is {' and '.join(there)}")
    return tuple(one for one in questions if not there or one.split == split)
