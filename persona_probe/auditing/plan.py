"""What an audit would take, before it does it: answers to draw, judge calls, memory and time.

Counts are upper bounds, from the questions and the settings alone. Memory and time come from the base
model itself: it is loaded and answers a batch of the calibration questions, since what an answer takes
depends on the machine, on the model, and on how long its answers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from time import perf_counter
from typing import Any

from persona_probe.auditing.inputs import check_paths
from persona_probe.auditing.kept import BATCH
from persona_probe.auditing.settings import AuditRequest, split_questions
from persona_probe.evaluation.arms import MERGE_BELOW
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import Sampling, prompt_of, sample
from persona_probe.evaluation.selection import check_categories
from persona_probe.model.checkpoint import is_adapter
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.memory import answer_bytes, how_many
from persona_probe.screening.calibrate import CURES, INDUCTIONS

ENOUGH = 3.0
"""Seconds of drawing that are enough to tell what an answer takes."""
BESIDE = 1.2
"""What an audit takes, in times of what drawing its answers takes: loading, diffing and the search without
generation are the rest.
"""


def plan_of(
    request: AuditRequest,
    *,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Counts are upper bounds; memory and time are estimates. Raises what loading the inputs raises."""
    check_paths(request)
    request = request.settled()
    settings = request.settings
    questions = load_questions(request.questions)
    check_categories(questions, settings.in_domain or ())
    calibration, held_out = split_questions(questions, settings.limit)
    asked = len({q.question for q in calibration if q.role == "general"})
    skill = sum(q.role == "skill" for q in held_out) * settings.samples
    each = len(held_out) * settings.samples
    candidates = (settings.screen.after_margin + 2 if request.sae else 0) + 2 * settings.screen.directions
    searched = candidates * (len(CURES) + len(INDUCTIONS)) * asked * settings.calibration_samples
    controls = settings.controls * (len(CURES) * asked + each) + settings.controls * each
    # the unsteered answers that those under many fixes are checked against
    drafts = 3 * (asked * settings.calibration_samples + each)
    final = 14 * each
    total = 2 * each + searched + controls + drafts + final
    calls = load_judge(request.judge).calls_per_answer
    lm = load_model(request.base, device=device or "auto", dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in lm.hf.parameters())
    shared = is_adapter(request.tuned) and lm.hf.num_parameters() >= MERGE_BELOW
    prompts = [prompt_of(lm.tokenizer, question) for question in calibration]
    row = answer_bytes(lm, max(map(len, prompts)) + settings.sampling.max_new_tokens)
    rows = batch_size or how_many(lm, row, BATCH)
    seconds = _seconds_each(lm, calibration, settings.sampling, rows)
    return {
        "held-out questions": len(held_out),
        "calibration questions": asked,
        "answers to sample, at most": total,
        "judge calls, at most": (total - 14 * skill) * calls,
        "longest answer (tokens)": settings.sampling.max_new_tokens,
        "answers drawn at once": rows,
        "weights (bytes)": weights if shared else 2 * weights,
        "a batch of answers (bytes), at most": rows * row,
        "seconds of this machine, at most about": ceil(BESIDE * total * seconds),
        "seconds without finding a trait, about": ceil(BESIDE * 3 * each * seconds),
    }


def _seconds_each(lm: LanguageModel, questions: Sequence[Question], sampling: Sampling, rows: int) -> float:
    """Seconds an answer takes where ``rows`` are drawn at once; fewer are where that would take long."""
    count = min(8, rows)
    sample(lm, questions[:1], replace(sampling, max_new_tokens=1))  # the first pass of all is slow
    while True:
        asked = [questions[i % len(questions)] for i in range(count)]
        start = perf_counter()
        sample(lm, asked, sampling, batch_size=count)
        took = perf_counter() - start
        if took > ENOUGH or count == rows:
            return took / count
        count = min(4 * count, rows)
