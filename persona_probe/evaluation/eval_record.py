"""`eval.json`: every model's rates and scores, their comparison, and what a reader should be warned of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from persona_probe.evaluation.arms import SampledArm, checkpoint_of
from persona_probe.evaluation.comparison import Comparison
from persona_probe.evaluation.judges import Judge
from persona_probe.evaluation.length_matched import match_lengths
from persona_probe.evaluation.metrics import MANY_CUT_OFF, MAX_MISSING, outcome
from persona_probe.evaluation.plan import width_warning
from persona_probe.evaluation.request import Asked, EvaluationRequest
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.self_described import count_personas

UNKNOWN: dict[str, None] = {field.name: None for field in fields(Comparison)}


def eval_record(
    request: EvaluationRequest,
    asked: Asked,
    results: Mapping[str, EvalResult],
    judge: Judge,
    *,
    folded: Collection[Path],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The content of `eval.json`.

    Args:
        folded: the models that read system prompts in the first user message.
        seconds: what drawing took, by arm.
    """
    sampled = {arm.name: arm for arm in request.arms}
    sampling = asdict(asked.sampling)
    del sampling["samples"]
    return {
        "trait": request.trait,
        "judge": request.judge,
        "questions": {
            "source": request.questions,
            "questions": len({question.question for question in asked.questions}),
            "prompts": len(asked.questions),
            "part": request.part,
            "in_domain": list(asked.in_domain),
        },
        "sampling": sampling | {"system": request.system, "batch_size": request.batch_size},
        "arms": {
            name: {
                **_source(request, asked, name, sampled.get(name), folded),
                **_figures(result),
                "seconds": seconds.get(name),
            }
            for name, result in results.items()
        },
        "comparison": comparison(results),
        "warnings": _warnings(request, asked, results, judge),
    }


def comparison(results: Mapping[str, EvalResult]) -> list[dict[str, Any]]:
    """Every arm against the first one, paired by question, and again at equal lengths; without figures
    where a rate is not given.
    """
    (reference, first), *others = results.items()
    rows: list[dict[str, Any]] = []
    for name, result in others:
        sound = all(arm.reported["misaligned"].rate is not None for arm in (first, result))
        found = match_lengths(first, result) if sound else None
        rows.append(
            {
                "arm": name,
                "against": reference,
                **(asdict(found.raw) if found else UNKNOWN),
                "length_matched": asdict(found.matched) if found and found.matched else None,
                "length_matched_share": found.kept if found else None,
                "median_lengths": found.median_lengths if found else None,
            }
        )
    return rows


def _source(
    request: EvaluationRequest,
    asked: Asked,
    name: str,
    sampled: SampledArm | None,
    folded: Collection[Path],
) -> dict[str, Any]:
    """Where an arm's answers come from."""
    given = asked.given.get(name)
    return {
        "model": str(checkpoint_of(sampled.model, request.base)) if sampled else None,
        "fix": str(sampled.fix) if sampled and sampled.fix else None,
        "samples": str(given.path) if given else None,
        "ending_unknown": given.ending_unknown if given else 0,
        "system_folded": sampled is not None and sampled.model in folded,
    }


def _figures(result: EvalResult) -> dict[str, Any]:
    outcomes = Counter(outcome(result.answers[i], result.judgements[i], result.trait) for i in result.counted)
    return {
        "answers": len(result.answers),
        "rates": {name: asdict(rate) for name, rate in result.reported.items()},
        "outcomes": dict(outcomes.most_common()),
        "scores": {name: asdict(one) for name, one in result.scores.items()},
        "scored_by": dict(Counter(one.scored_by for one in result.judgements if one.scored_by)),
        "self_described": count_personas(result.answers).to_dicts(),
    }


def _warnings(
    request: EvaluationRequest, asked: Asked, results: Mapping[str, EvalResult], judge: Judge
) -> Sequence[str]:
    wide = width_warning(request, asked)
    found = [] if wide is None else [wide]
    for arm in request.arms:
        if arm.fix is None and judge.is_model(checkpoint_of(arm.model, request.base)):
            found.append(f"{arm.name} is its own judge")
    for name, result in results.items():
        missing = result.rates["missing"].rate or 0.0
        if missing > MAX_MISSING:
            found.append(
                f"{name}: the judge could not say anything of {missing:.0%} of the answers; above "
                f"{MAX_MISSING:.0%} no rate is given"
            )
        ways = [one.scored_by for one in result.judgements if one.scored_by]
        parsed = sum("parsed number" in way for way in ways)
        if parsed:
            found.append(
                f"{name}: of {parsed} of {len(ways)} answers a score is the one number that the judge wrote, "
                "not its mean over probabilities"
            )
        rate = result.reported["misaligned"]
        if wide is None and request.width is not None and rate.low is not None and rate.high is not None:
            width = rate.high - rate.low
            if width > request.width:
                found.append(f"{name}: the interval came out {width:.3f} wide, not {request.width}")
        cut = result.rates["truncated"].rate or 0.0
        if cut > MANY_CUT_OFF:
            found.append(
                f"{name}: {cut:.0%} of the answers were cut off; allow longer ones (--max-new-tokens)"
            )
    for given in asked.given.values():
        if given.ending_unknown:
            found.append(
                f"{given.path} does not say whether {given.ending_unknown} answers of {given.arm} were cut "
                "off; they count as whole"
            )
    return found
