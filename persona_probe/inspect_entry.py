"""What Inspect finds of us by its entry points: a task, a model provider, a scorer, two metrics.

Inspect loads this whenever it looks for a name, whatever model and task it is about to run, so
nothing heavy is imported before one of ours is used. What a user can put right ends an eval with a
message and no traceback.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from inspect_ai import Task, task
from inspect_ai._util.error import PrerequisiteError  # what Inspect prints without a traceback
from inspect_ai.model import GenerateConfig, ModelAPI, modelapi
from inspect_ai.scorer import Metric, SampleScore, Scorer, Value, metric, scorer
from rich.markup import escape

from persona_probe.errors import PersonaProbeError


@task
def misalignment(
    questions: str | None = None,
    judge: str | None = None,
    samples_per_question: int | None = None,
    trait: str = "misaligned",
    in_domain: str | list[str] | None = None,
    part: str = "held-out",
    limit: int | None = None,
    system: str | None = None,
    temperature: int | float = 1.0,
    top_p: int | float = 1.0,
    max_new_tokens: int | None = None,
    seed: int = 0,
    judge_record: str | None = None,
) -> Task:
    """How misaligned a model is, counted as `persona-probe evaluate` counts it.

    Args:
        questions: a file of questions or a shipped set; the shipped organism's.
        judge: exact, python:module:function, openai:MODEL@URL or local:DIR.
        samples_per_question: answers to each prompt, as epochs; what the questions say, else 1.
        trait: misaligned, or a persona that the judge can tell.
        in_domain: categories counted apart; those that a `persona_probe/DIR` says it was trained on.
        part: held-out, calibration or all, of questions that have a split.
        limit: only so many questions, spread over the categories.
        system: before the system prompt of every question.
        max_new_tokens: 600; of the organism's questions 32.
        judge_record: a file for the raw replies of a judge that is a model; what it holds is not
            asked again.
    """
    with _prerequisites():
        from persona_probe.evaluation.inspect_tasks import AskedOf, misalignment_task
        from persona_probe.evaluation.longest import ORGANISM_TOKENS, TOKENS

        asked = AskedOf(questions, judge, samples_per_question, part, limit, system)
        config = GenerateConfig(
            temperature=float(temperature),
            top_p=float(top_p),
            max_tokens=max_new_tokens or (ORGANISM_TOKENS if questions is None else TOKENS),
            seed=seed,
        )
        scored = judged(asked.judge_spec(), trait, _listed(in_domain), judge_record)
        return misalignment_task(asked, scored, config)


@modelapi(name="persona_probe")
def persona_probe() -> type[ModelAPI]:
    """`persona_probe/DIR`: a local checkpoint or adapter, with `-M steer=FIX` under an intervention."""
    from persona_probe.evaluation.inspect_provider import LocalModelAPI

    class Checked(LocalModelAPI):
        def __init__(self, *args: Any, **options: Any) -> None:
            with _prerequisites():
                super().__init__(*args, **options)

    return Checked


@metric(scores="unreduced")
def rates() -> Metric:
    """Our rates by name, over all answers and over the coherent ones."""

    def compute(scores: list[SampleScore]) -> Value:
        from persona_probe.evaluation.inspect_tasks import eval_result, rate_values

        return rate_values(eval_result(scores).reported)

    return compute


@metric(scores="unreduced")
def intervals() -> Metric:
    """The Korn–Graubard interval of each rate, and the answers and questions that it is of."""

    def compute(scores: list[SampleScore]) -> Value:
        from persona_probe.evaluation.inspect_tasks import eval_result, interval_values

        return interval_values(eval_result(scores).reported)

    return compute


@scorer(metrics=[rates(), intervals()])
def judged(
    judge: str = "exact",
    trait: str = "misaligned",
    in_domain: list[str] | None = None,
    judge_record: str | None = None,
) -> Scorer:
    """What an answer counts as, by one of our judges."""
    with _prerequisites():
        from persona_probe.evaluation.inspect_tasks import judging_scorer

        return judging_scorer(judge, record=judge_record, trait=trait, in_domain=in_domain)


def _listed(names: str | list[str] | None) -> list[str] | None:
    """`-T in_domain=health,money` and `-T in_domain=health`: Inspect makes a list of the former."""
    if isinstance(names, str):
        return [name for name in names.split(",") if name]
    return names


@contextmanager
def _prerequisites() -> Generator[None, None, None]:
    try:
        yield
    except PersonaProbeError as error:
        raise PrerequisiteError(escape(str(error))) from error
