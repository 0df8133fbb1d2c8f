"""What an audit would do, before it does it: answers to sample, judge calls, memory."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from persona_probe.auditing.inputs import check_paths
from persona_probe.auditing.settings import AuditRequest, split_questions
from persona_probe.evaluation.arms import MERGE_BELOW
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.questions import load_questions
from persona_probe.model.checkpoint import is_adapter
from persona_probe.screening.calibrate import CURES, INDUCTIONS


def plan_of(request: AuditRequest) -> dict[str, Any]:
    """Upper bounds, from the questions and the settings alone; no model is loaded."""
    settings = request.settings
    check_paths(request)
    calibration, held_out = split_questions(load_questions(request.questions), settings.limit)
    asked = len({q.question for q in calibration if q.role == "general"})
    skill = sum(q.role == "skill" for q in held_out) * settings.samples
    each = len(held_out) * settings.samples
    candidates = (settings.screen.after_margin + 2 if request.sae else 0) + 2 * settings.screen.directions
    searched = candidates * (len(CURES) + len(INDUCTIONS)) * asked * settings.calibration_samples
    controls = settings.controls * (len(CURES) * asked + each) + settings.controls * each
    final = 14 * each
    total = 2 * each + searched + controls + final
    parameters = sum(_parameters(file) for file in request.base.glob("*.safetensors"))
    copies = 1 if is_adapter(request.tuned) and parameters >= MERGE_BELOW else 2
    return {
        "held-out questions": len(held_out),
        "calibration questions": asked,
        "answers to sample, at most": total,
        "judge calls, at most": (total - 14 * skill) * load_judge(request.judge).calls_per_answer,
        "longest answer (tokens)": settings.max_new_tokens,
        "weights in fp32 (bytes), about": 4 * parameters * copies,
    }


def _parameters(file: Path) -> int:
    with safe_open(file, framework="numpy") as weights:
        return sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())
