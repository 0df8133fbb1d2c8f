"""What an evaluation would take, before it is started: answers, judge calls and their price, memory."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from persona_probe.errors import InputError
from persona_probe.evaluation.arms import checkpoint_of
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.power import check_width
from persona_probe.evaluation.request import Asked, EvaluationRequest

FURTHER_CALLS = "if its tokenizer splits numbers into digits, some answers take a few calls more"


def plan_of(request: EvaluationRequest) -> dict[str, Any]:
    """Upper bounds, from the files alone: no model is loaded and nobody is asked.

    Raises what reading the inputs raises.
    """
    request.check_paths()
    asked = request.asked()
    request.check_prompts(asked.questions)
    judge = load_judge(request.judge)
    judge.check_questions(asked.questions)
    groups = asked.counts(request.samples_per_question)
    each = sum(count * len(members) for count, members in groups.items())
    forecasts = [
        judge.forecast(members, count * len(request.arms), request.sampling.max_new_tokens)
        for count, members in groups.items()
    ]
    forecasts += [judge.estimate(given.answers) for given in asked.given.values()]
    dollars = [one.dollars for one in forecasts if one.dollars is not None]
    weights = {Path(checkpoint_of(arm.model, request.base).path) for arm in request.arms}
    return {
        "warning": width_warning(request, asked),
        "questions": len({question.question for question in asked.questions}),
        "prompts": len(asked.questions),
        "models to ask": [arm.name for arm in request.arms],
        "answers to draw": each * len(request.arms),
        "answers given": sum(len(given.answers) for given in asked.given.values()),
        "judge calls, at most": sum(one.calls for one in forecasts),
        "judge calls, note": FURTHER_CALLS if request.judge.startswith("openai:") else None,
        "judge cost (dollars), about": sum(dollars) if dollars else None,
        "longest answer (tokens)": request.sampling.max_new_tokens,
        "weights in fp32 (bytes), about": max((_weight_bytes(folder) for folder in weights), default=0),
        "keys and values of a batch in fp32 (bytes), at most": max(
            (_cache_bytes(folder, request) for folder in weights), default=0
        ),
    }


def check_wanted_width(request: EvaluationRequest, asked: Asked) -> None:
    """Raise `InputError`, with what would do, when some model's rate is not going to have an interval
    as narrow as `request.width`, unless that is accepted.
    """
    too_wide = None if request.accept_wider else _too_wide(request, asked)
    if too_wide is not None:
        fix = f"{too_wide.fix}; or go on with --accept-wider" if too_wide.fix else None
        raise InputError(too_wide.message, fix=fix) from too_wide


def width_warning(request: EvaluationRequest, asked: Asked) -> str | None:
    """Why an interval will be wider than `request.width`, and what would do; None when none will."""
    too_wide = _too_wide(request, asked)
    if too_wide is None or too_wide.fix is None:
        return too_wide and too_wide.message
    return f"{too_wide.message}; {too_wide.fix}"


def _too_wide(request: EvaluationRequest, asked: Asked) -> InputError | None:
    if request.width is None:
        return None
    general = {q.id: q for q in asked.questions if q.role == "general" and q.category not in asked.in_domain}
    questions = len({question.question for question in general.values()})
    if questions == 0:
        return InputError("no question is left that the rate could be of")
    counts = [
        sum(answer.question.id in general for answer in given.answers) for given in asked.given.values()
    ]
    if request.arms:
        counts.append(sum(request.samples_per_question or q.samples or 1 for q in general.values()))
    try:
        check_width(request.width, questions, max(1, min(counts) // questions))
    except InputError as error:
        others = len({question.question for question in asked.questions}) - questions
        aside = f" (beside {others} that test skill, triggers or the trained domain)" if others else ""
        return InputError(error.message, fix=error.fix and error.fix + aside)
    return None


def _weight_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            total += sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return 4 * total


def _cache_bytes(folder: Path, request: EvaluationRequest) -> int:
    """Prompts aside, which are short beside the answers."""
    if not folder.is_dir():
        return 0
    config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * heads * width * 4
    return each * request.sampling.max_new_tokens * request.batch_size
