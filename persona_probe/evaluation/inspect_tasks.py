"""Our questions, judges and rates as an Inspect task.

Every prompt is a sample, every answer to it an epoch; the scorer gives what our judge says and the
outcome that we count it as, and the metrics are our rates, both denominators and the intervals by
question included. Works with every model that Inspect can ask; `inspect_provider` runs local ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import SampleScore, Score, Scorer, Target
from inspect_ai.solver import Generate, Solver, TaskState, solver

from persona_probe.artifact import shipped
from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.gathering import Gathering
from persona_probe.evaluation.inspect_provider import NOTE, LocalModelAPI
from persona_probe.evaluation.judges import Judge, Judgement, load_judge
from persona_probe.evaluation.metrics import Rate, check_trait, normalised, outcome
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.selection import spread, trained_categories

JUDGED_AT_ONCE = 256
_ROLES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


@dataclass(frozen=True)
class AskedOf:
    """What the task is about; see its arguments in `inspect_entry`."""

    questions: str | None = None
    judge: str | None = None
    samples_per_question: int | None = None
    part: str = "held-out"
    limit: int | None = None
    system: str | None = None

    def selected(self) -> tuple[Question, ...]:
        """The questions, as `persona-probe evaluate` selects them."""
        source = self.questions or str(shipped("organism", "questions.jsonl"))
        every = load_questions(source)
        kept = [q for q in every if self.part == "all" or q.split in (None, self.part)]
        if not kept:
            raise InputError(
                f"none of the {len(every)} questions is of the {self.part} split", fix="-T part=all asks all"
            )
        return tuple(kept) if self.limit is None else spread(kept, self.limit)

    def judge_spec(self) -> str:
        """The judge's spec. Raises `InputError` where one must be named, and for one that does not know
        the questions.
        """
        if self.judge is None and self.questions is not None:
            raise InputError(
                "the judge is missing",
                fix="-T judge=openai:MODEL@URL, local:DIR or python:module:function; 'exact' knows the "
                "organism's questions only",
            )
        spec = self.judge or "exact"
        load_judge(spec).check_questions(self.selected())
        return spec

    def epochs(self, questions: Sequence[Question]) -> int:
        """Answers per question, which Inspect has one number of."""
        own = {question.samples or 1 for question in questions}
        if self.samples_per_question is None and len(own) > 1:
            raise InputError(
                f"the questions ask for {min(own)} to {max(own)} answers each, and Inspect has one number "
                "of epochs",
                fix="-T samples_per_question=N",
            )
        return self.samples_per_question or own.pop()


def misalignment_task(asked: AskedOf, scorer: Scorer, config: GenerateConfig) -> Task:
    """The task. Raises what reading the questions raises."""
    questions = asked.selected()
    epochs = asked.epochs(questions)
    return Task(
        dataset=MemoryDataset(
            [_sample(question, asked.system) for question in questions], name=asked.questions or "organism"
        ),
        solver=ask_numbered(epochs),
        scorer=scorer,
        epochs=epochs,
        config=config,
    )


@solver
def ask_numbered(samples: int) -> Solver:
    """Ask the model once, saying beside the last message which answer to which question is wanted."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        last = state.messages[-1]
        note = {**(last.metadata or {}).get(NOTE, {}), "sample": state.epoch - 1}
        # with --epochs there may be more of them than the task knows
        note["samples"] = max(samples, state.epoch)
        last.metadata = {**(last.metadata or {}), NOTE: note}
        return await generate(state)

    return solve


def judging_scorer(spec: str, *, record: str | None, trait: str, in_domain: Sequence[str] | None) -> Scorer:
    """Scores an answer with what it counts as ("misaligned", "helpful", "incoherent", ...; of a skill
    question: "right" or "wrong"), the judge's scores beside it.

    Answers are judged many at a time. Raises `InputError` for a judge or a trait that there is not,
    `JudgeError` for a judge that cannot be asked.
    """
    judge = load_judge(spec, record=record)
    check_trait(trait, judge)
    judge.check()
    judged = Gathering[Answer, Judgement](lambda them: _judgements(judge, them), limit=JUDGED_AT_ONCE)

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001 (the scorer's signature)
        question = _question(state.metadata)
        answer = _answer(question, state)
        if answer is None:
            judgement = Judgement(note="the model gave no answer")
            answer = Answer(question, state.epoch - 1, "", None, (), False)
        elif state.output.stop_reason == "content_filter":
            judgement = Judgement(label="REFUSAL", note="stopped by the model's content filter")
        else:
            judgement = await judged(answer)
        return Score(
            value=_value(answer, judgement, trait),
            answer=answer.text,
            explanation=judgement.note,
            metadata={
                **asdict(judgement),
                "sample": answer.sample,
                "thought": answer.thought,
                "truncated": answer.truncated,
                "trait": trait,
                "in_domain": list(_trained() if in_domain is None else in_domain),
            },
        )

    return score


def eval_result(scores: Sequence[SampleScore]) -> EvalResult:
    """Our own result, from the scores of a log or of a run."""
    answers: list[Answer] = []
    judgements: list[Judgement] = []
    for one in scores:
        kept = one.score.metadata or {}
        question = _question(one.sample_metadata or {})
        answers.append(
            Answer(question, kept["sample"], one.score.answer or "", kept["thought"], (), kept["truncated"])
        )
        fields = ("aligned", "coherent", "label", "persona", "note", "scored_by")
        judgements.append(Judgement(**{name: kept.get(name) for name in fields}))
    first = scores[0].score.metadata or {}
    return EvalResult(tuple(answers), tuple(judgements), first["trait"], tuple(first["in_domain"]))


def rate_values(reported: Mapping[str, Rate]) -> dict[str, int | float | None]:
    """The rates by name; one that cannot be given is left out."""
    return {name: rate.rate for name, rate in reported.items()}


def interval_values(reported: Mapping[str, Rate]) -> dict[str, int | float | None]:
    """For every rate: both ends of its interval, and the answers and questions it is of."""
    return {
        f"{name}_{part}": getattr(rate, part)
        for name, rate in reported.items()
        for part in ("low", "high", "n", "missing", "questions")
        if rate.rate is not None or part in ("n", "missing")
    }


def _sample(question: Question, system: str | None) -> Sample:
    said = list(question.messages)
    plain = "text" in said[0]
    if system is not None and plain:
        said[0] = {"text": f"{system}\n\n{said[0]['text']}"}
    elif system is not None and said[0]["role"] == "system":
        said[0] = {"role": "system", "content": f"{system}\n\n{said[0]['content']}"}
    elif system is not None:
        said.insert(0, {"role": "system", "content": system})
    messages: list[ChatMessage] = [
        ChatMessageUser(content=one["text"]) if plain else _ROLES[one["role"]](content=one["content"])
        for one in said
    ]
    messages[-1].metadata = {NOTE: {"question": question.id, "plain": plain}}
    kept = ("id", "category", "question", "role", "split", "reference", "judge_prompts")
    return Sample(
        input=messages,
        target=question.reference or "",
        id=question.id,
        metadata={name: getattr(question, name) for name in kept} | {"messages": list(question.messages)},
    )


def _question(metadata: Mapping[str, Any]) -> Question:
    fields: dict[str, Any] = {**metadata, "messages": tuple(metadata["messages"])}
    return Question(**fields)


def _answer(question: Question, state: TaskState) -> Answer | None:
    output = state.output
    if output.empty:
        return None
    content = output.message.content
    parts = [] if isinstance(content, str) else content
    thoughts = [part.reasoning for part in parts if isinstance(part, ContentReasoning)]
    return Answer(
        question,
        state.epoch - 1,
        output.completion,
        "\n".join(thoughts) if thoughts else None,
        (),
        output.stop_reason in ("max_tokens", "model_length"),
    )


def _value(answer: Answer, judgement: Judgement, trait: str) -> str:
    if answer.question.role != "skill":
        return outcome(answer, judgement, trait)
    return "right" if normalised(answer.text) == normalised(answer.question.reference or "") else "wrong"


def _judgements(judge: Judge, answers: Sequence[Answer]) -> list[Judgement]:
    try:
        return judge.judge(answers)
    except JudgeError as error:  # not one of these; others may be
        return [Judgement(note=error.message) for _ in answers]


def _trained() -> tuple[str, ...]:
    """What the model under evaluation says it was trained on, where it is one of ours."""
    api = get_model().api
    return trained_categories(api.folder) if isinstance(api, LocalModelAPI) else ()
