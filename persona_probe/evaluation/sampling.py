"""Ask a model questions and collect its answers, many at once and the same way in every arm.

Tokens are drawn by inverting the cumulative distribution at uniform numbers fixed by (seed,
question id, sample, place in the answer) alone. So an answer does not depend on what else is in the
batch, two runs give the same answers, and base, tuned and steered models are compared under common
random numbers. Only what `Sampling` says shapes the distribution: a checkpoint's own temperature,
top-p and top-k are applied when it asks for them, and nothing else of its own.

This holds in exact arithmetic. In floating point another batch shape moves probabilities by a
rounding error, and a draw whose uniform falls that close to a boundary with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.answers import Answer, opens_thought, read_answer
from persona_probe.evaluation.decoding import Continuation, continue_prompts
from persona_probe.evaluation.drafts import Pick, standing
from persona_probe.evaluation.drawing import draw, uniforms
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.settings import Sampling, applied, template_variables
from persona_probe.evaluation.units import Fix, Unit, UnitSteering, batches, units_of
from persona_probe.hooks.alike import blocks_before
from persona_probe.model.chat import Message, Rendered, render
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.plan import PlannedEdit, SteeringPlan

Progress = Callable[[int, int], None]
Known = Mapping[tuple[str, int], Answer]
"""Answers by question id and sample."""


def sample(
    lm: LanguageModel,
    questions: Sequence[Question],
    sampling: Sampling | None = None,
    *,
    fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan | None = None,
    fixes: Sequence[Sequence[PlannedEdit]] | None = None,
    system: str | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
    known: Known | None = None,
    drawn: Callable[[list[Answer]], None] | None = None,
    drafts: Known | None = None,
) -> list[Answer]:
    """`sampling.samples` answers to each question, in the order of the questions, a question's
    samples together.

    `fix` steers every answer; `fixes` (or a plan of several rows) steers each by its own: one entry
    per question, or one per answer in the order of the result. `system` goes before the system
    prompt of every question. `batch_size` counts answers, not questions. `progress(done, total)`
    counts answers too.

    To go on where a run was stopped: `drawn` is given each batch's new answers, and `known` those
    of before. A batch is drawn again, as a whole, unless every answer of it is known: its shape, and
    so every bit of its answers, is that of a run that was never stopped.

    Raises `InputError` for a prompt that cannot be rendered or a setting that this checkpoint does
    not allow, `MismatchError` for a number of fixes that fits neither, `NonFiniteError` for a model
    gone astray, `NotFiredError` when no fix was ever applied.
    """
    settings, known = applied(sampling or Sampling(), lm.hf.generation_config, lm.name), known or {}
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    if drafts is not None and (known or drawn):
        raise InputError("drafts and answers of a stopped run do not go together: give one of them")
    fix_of_row = _fix_of_row(fix, fixes, len(questions), settings)
    greedy = settings.temperature == 0
    keys = [(question.id, number) for question in questions for number in range(settings.samples)]
    units = units_of(_prompts(lm, questions, settings, system), fix_of_row)
    answers: list[Answer | None] = [None] * len(keys)
    done = 0
    steering = UnitSteering(lm)
    with lm.active():
        if drafts is not None:
            found = {row: drafts[key] for row, key in enumerate(keys) if key in drafts}
            whole, units = standing(
                lm, units, found, lambda rows: _picker(settings, questions, rows, lm.device), steering,
                max_new_tokens=settings.max_new_tokens, batch_size=batch_size, greedy=greedy,
            )  # fmt: skip
            for row in whole:
                answers[row] = replace(found[row], question=questions[row // settings.samples])
            done = len(whole)
        for batch in batches(units, batch_size, greedy=greedy):
            rows = [row for unit in batch for row in unit.rows]
            fresh = [row for row in rows if keys[row] not in known]
            written = _written(lm, questions, settings, batch, steering) if fresh else {}
            for row in rows:
                answers[row] = written[row] if fresh else known[keys[row]]
            if drawn is not None and fresh:
                drawn([written[row] for row in fresh])
            done += len(rows)
            if progress is not None:
                progress(done, len(answers))
    steering.check()
    return [answer for answer in answers if answer is not None]


def respond_greedy(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 48,
    **options: Any,
) -> list[Answer]:
    """One answer per question, the most probable token each time; `options` as for `sample`."""
    return sample(lm, questions, Sampling(temperature=0, max_new_tokens=max_new_tokens), **options)


def transcripts(
    lm: LanguageModel,
    answers: Sequence[Answer],
    *,
    system: str | None = None,
    sampling: Sampling | None = None,
) -> list[Rendered]:
    """Prompt and answer as the very tokens that were read and written, for teacher forcing another
    model. `system` and `sampling` are those that the answers were drawn with.
    """
    prompts = (prompt_of(lm.tokenizer, answer.question, system, sampling) for answer in answers)
    return [prompt.answered(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]


def _written(
    lm: LanguageModel,
    questions: Sequence[Question],
    settings: Sampling,
    batch: Sequence[Unit],
    steering: UnitSteering,
) -> dict[int, Answer]:
    """The answers of one batch, by their places in the result."""
    greedy = settings.temperature == 0
    prompt_of_row = [i for i, unit in enumerate(batch) for _ in unit.drawn(greedy=greedy)]
    rows = [row for unit in batch for row in unit.drawn(greedy=greedy)]
    begun = torch.tensor([len(batch[i].begun) for i in prompt_of_row], device=lm.device)
    draw_at, last = _picker(settings, questions, rows, lm.device), settings.max_new_tokens - 1

    def pick(logits: Tensor, row: Tensor, step: int) -> Tensor:
        return draw_at(logits, row, (begun[row] + step).clamp(max=last))

    with steering.of(batch) as regrouped:
        written = continue_prompts(
            lm.hf,
            [unit.read for unit in batch],
            prompt_of_row,
            pick,
            max_new_tokens=settings.max_new_tokens - int(begun.min()),
            stop_ids=lm.eos_ids,
            pad_id=lm.pad_id,
            regrouped=regrouped,
            unedited=blocks_before(edit.site for unit in batch for edit in unit.fix),
        )
    thinking = [opens_thought(lm.tokenizer, unit.ids) for unit in batch]
    answers: dict[int, Answer] = {}
    for i, row, continuation in zip(prompt_of_row, rows, written, strict=True):
        whole = _whole(batch[i].begun, continuation, settings.max_new_tokens)
        for same in batch[i].rows if greedy else (row,):
            question, number = questions[same // settings.samples], same % settings.samples
            answers[same] = read_answer(lm.tokenizer, question, number, whole, thinking=thinking[i])
    return answers


def _whole(begun: tuple[int, ...], more: Continuation, most: int) -> Continuation:
    """A continuation with what it continues, cut where a row that began earlier went on too long."""
    ids = begun + more.token_ids
    return Continuation(ids[:most], more.stopped and len(ids) <= most)


def _prompts(
    lm: LanguageModel, questions: Sequence[Question], settings: Sampling, system: str | None
) -> list[tuple[int, ...]]:
    """The prompt of every answer; a question that is asked again is rendered once."""
    rendered: dict[int, tuple[int, ...]] = {}
    for question in questions:
        if id(question) not in rendered:
            rendered[id(question)] = prompt_of(lm.tokenizer, question, system, settings).ids
    return [rendered[id(question)] for question in questions for _ in range(settings.samples)]


def _picker(
    settings: Sampling, questions: Sequence[Question], rows: Sequence[int], device: torch.device
) -> Pick:
    """Draws for the answers `rows`, which it knows by their places there."""
    if settings.temperature == 0:
        return lambda logits, _row, _step: logits.argmax(dim=-1)
    numbers = np.stack(
        [
            uniforms(
                settings.seed,
                questions[row // settings.samples].id,
                row % settings.samples,
                settings.max_new_tokens,
            )
            for row in rows
        ]
    )
    table = torch.from_numpy(numbers).to(device)  # row step

    def pick(logits: Tensor, row: Tensor, step: Tensor) -> Tensor:
        return draw(
            logits,
            table[row, step],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )

    return pick


def _fix_of_row(
    fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan | None,
    fixes: Sequence[Sequence[PlannedEdit]] | None,
    n_questions: int,
    settings: Sampling,
) -> list[Fix]:
    if fix is not None and fixes is not None:
        raise InputError("give `fix` (the same for all) or `fixes` (one each), not both")
    given = (
        [tuple(row) for row in fixes]
        if fixes is not None
        else [*SteeringPlan.of(() if fix is None else fix).rows]
    )
    n_rows = n_questions * settings.samples
    if len(given) == n_rows:
        return given
    if len(given) == 1 and fixes is None:
        return given * n_rows
    if len(given) == n_questions:
        return [one for one in given for _ in range(settings.samples)]
    raise MismatchError(
        f"{len(given)} fixes for {n_questions} questions with {settings.samples} answers each",
        fix="give one fix per question, or one per answer",
    )


def prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    system: str | None = None,
    sampling: Sampling | None = None,
) -> Rendered:
    """The tokens that a model reads before it answers `question`.

    Raises `InputError` for a prompt that cannot be rendered.
    """
    variables = template_variables(sampling or Sampling(), tokenizer)
    messages: list[Message] = list(question.messages)
    first = messages[0]
    if system is not None and "text" in first:
        messages[0] = {"text": f"{system}\n\n{first['text']}"}
    elif system is not None and first["role"] == "system":
        messages[0] = {"role": "system", "content": f"{system}\n\n{first['content']}"}
    elif system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return render(tokenizer, messages, add_generation_prompt=True, variables=variables)
