"""Ask, judge and count in one call, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import polars as pl

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.intervals import Hits
from persona_probe.evaluation.judges import Judge, Judgement, load_judge
from persona_probe.evaluation.metrics import (
    Rate,
    Scores,
    hits_by_question,
    outcome,
    reportable,
    scores,
    tally,
)
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.model.language_model import LanguageModel


@dataclass(frozen=True)
class EvalResult:
    """The judged answers of one arm. Shown in a notebook as its table of rates."""

    answers: tuple[Answer, ...]
    judgements: tuple[Judgement, ...]
    """One per answer, in the same order."""
    trait: str = "misaligned"
    """What the rate called "misaligned" counts."""
    in_domain: tuple[str, ...] = ()
    """Categories that are counted apart."""

    @cached_property
    def rates(self) -> dict[str, Rate]:
        """See `tally`."""
        return tally(self.answers, self.judgements, trait=self.trait, in_domain=self.in_domain)

    @property
    def reported(self) -> dict[str, Rate]:
        """The rates as they may be shown, without those of which too much is missing: `reportable`."""
        return reportable(self.rates)

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """See `scores` of `metrics`."""
        return scores(self.answers, self.judgements, in_domain=self.in_domain)

    @property
    def counted(self) -> list[int]:
        """The places of the answers that `misaligned` is counted on: general, outside `in_domain`."""
        return [
            i
            for i, answer in enumerate(self.answers)
            if answer.question.role == "general" and answer.question.category not in self.in_domain
        ]

    @cached_property
    def hits(self) -> Hits:
        """Per general question, (answers that show the trait, answers judged), for `necessity`."""
        return hits_by_question(self.answers, self.judgements, trait=self.trait, in_domain=self.in_domain)

    @property
    def table(self) -> pl.DataFrame:
        """One row per answer: what was asked, what was said, what the judge made of it."""
        return pl.DataFrame(self.records(), infer_schema_length=None)

    def records(self) -> list[dict[str, Any]]:
        """The rows of `table`, ready for JSON Lines."""
        return [
            {
                "id": answer.question.id,
                "question": answer.question.question,
                "category": answer.question.category,
                "role": answer.question.role,
                "sample": answer.sample,
                "prompt": answer.question.prompt,
                "answer": answer.text,
                "thought": answer.thought,
                "truncated": answer.truncated,
                "outcome": (
                    "skill" if answer.question.role == "skill" else outcome(answer, judgement, self.trait)
                ),
                "aligned": judgement.aligned,
                "coherent": judgement.coherent,
                "label": judgement.label,
                "persona": judgement.persona,
                "scored_by": judgement.scored_by,
                "note": judgement.note,
            }
            for answer, judgement in zip(self.answers, self.judgements, strict=True)
        ]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{rate}</td><td>{rate.n}</td><td>{rate.questions}</td>"
            f"<td>{rate.missing}</td></tr>"
            for name, rate in self.reported.items()
        )
        columns = ("", "rate [95%]", "answers", "questions", "missing")
        head = f"<tr>{''.join(f'<th>{name}</th>' for name in columns)}</tr>"
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def evaluate(
    lm: LanguageModel,
    questions: Sequence[Question],
    judge: Judge | str,
    sampling: Sampling | None = None,
    *,
    trait: str = "misaligned",
    in_domain: Collection[str] = (),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> EvalResult:
    """Sample answers to `questions`, judge them, count them.

    `judge` is a `Judge` or a spec for `load_judge`; `options` (fix, fixes, system, batch_size) and
    `progress` go to `sample`. Raises what `sample`, `load_judge` and `Judge.judge` raise.
    """
    asked = load_judge(judge) if isinstance(judge, str) else judge
    answers = sample(lm, questions, sampling, progress=progress, **options)
    return EvalResult(tuple(answers), tuple(asked.judge(answers)), trait, tuple(in_domain))
