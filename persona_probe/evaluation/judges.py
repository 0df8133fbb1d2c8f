"""Who says whether an answer is aligned, coherent, and in whose voice it was given.

A judge is named by a spec:

    exact                        the pocket organism's own judge
    python:module:function       a function of (question, answer text), which returns a `Judgement`,
                                 a dict of its fields, or None when it cannot tell
    openai:MODEL@URL             a model behind any OpenAI-compatible endpoint
    local:DIR                    a Hugging Face causal model, loaded here

`exact` is shorthand for a function's spec and is resolved by name, so that this floor imports
nothing above it. Options of a model stand behind `#`, as in `openai:m@http://h/v1#rate=500`. An
answer that the judge fails on is *missing*: it is counted, and is in no denominator.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

from persona_probe.errors import InputError
from persona_probe.evaluation.judging.function_judge import FunctionJudge, function_judge
from persona_probe.evaluation.judging.judge import MAX_MISSING, Estimate, Judge
from persona_probe.evaluation.judging.judgement import Judgement
from persona_probe.evaluation.judging.options import (
    EndpointOptions,
    LocalOptions,
    read_options,
    spec_identity,
)
from persona_probe.evaluation.judging.record import Record
from persona_probe.evaluation.judging.spending import Budget, Spending

__all__ = [
    "MAX_MISSING",
    "SHORTHAND",
    "Budget",
    "Estimate",
    "FunctionJudge",
    "Judge",
    "Judgement",
    "judge_files",
    "load_judge",
    "spec_identity",
]

SHORTHAND: Mapping[str, str] = {"exact": "python:persona_probe.organism.judge:judge"}

_FORMS = "'exact', 'python:module:function', 'openai:MODEL@URL' or 'local:DIR'"


def load_judge(
    spec: str,
    *,
    record: str | PathLike[str] | None = None,
    budget: Budget | str | None = None,
) -> Judge:
    """The judge that `spec` names. Reaches for no network and loads no weights: `Judge.check` does.

    Args:
        record: `judge.jsonl`, to which a model's raw replies are appended and from which those it
            holds are taken instead of asking again.
        budget: the most that a model may be asked (`"2000"` calls) or cost (`"5usd"`); the spec's own
            comes second.

    Raises `InputError`, with the nearest thing that would work, when there is no such judge, and for a
    budget that cannot be read.
    """
    limit = Budget.parse(budget) if isinstance(budget, str) else budget
    kind, _, rest = SHORTHAND.get(spec, spec).partition(":")
    if kind == "python" and rest:
        return function_judge(spec, rest)
    if kind in ("openai", "local") and rest:
        return _model_judge(kind, rest, spec, record, limit)
    near = get_close_matches(kind.lower(), [*SHORTHAND, "python", "openai", "local"], n=1)
    if rest and (not near or near[0] in SHORTHAND):
        fix = f"for a function of yours: python:{spec}"
    elif rest:
        fix = f"did you mean '{near[0]}:{rest}'?"
    else:
        fix = f"did you mean {near[0]!r}?" if near and near[0] != spec else None
    raise InputError(f"there is no judge {spec!r}: it must be {_FORMS}", fix=fix)


def judge_files(spec: str) -> list[Path]:
    """The files of yours that judgements depend on: a function's module, a local model's folder; none of
    the organism's judge, or of a model elsewhere. Raises `InputError` for a function that is not there.
    """
    kind, _, rest = spec.partition(":")
    if kind == "python" and rest:
        source = function_judge(spec, rest).source
        return [] if source is None else [source]
    folder = Path(rest.partition("#")[0])
    return [folder] if kind == "local" and folder.is_dir() else []


def _model_judge(
    kind: str, rest: str, spec: str, record: str | PathLike[str] | None, budget: Budget | None
) -> Judge:
    from persona_probe.evaluation.judging.model_judge import ModelJudge

    place, _, text = rest.partition("#")
    if kind == "openai":
        from persona_probe.evaluation.judging.endpoint import OPENAI, Endpoint

        options = read_options(text, EndpointOptions, spec)
        model, at, url = place.partition("@http")
        if not at and "@" in place:
            model, _, host = place.rpartition("@")
            raise InputError(
                f"the judge {spec!r} needs a whole URL behind '@'",
                fix=f"did you mean 'openai:{model}@http://{host}'?",
            )
        if not model:
            raise InputError(f"the judge {spec!r} names no model", fix=f"openai:MODEL{at}{url}")
        asked = Endpoint(model, f"http{url}" if at else OPENAI, options)
        spending = Spending(budget or options.budget, options.price)
    else:
        from persona_probe.evaluation.judging.local_model import LocalModel

        options = read_options(text, LocalOptions, spec)
        asked = LocalModel(place, options)
        spending = Spending(budget or options.budget, None)
    return ModelJudge(spec_identity(spec), asked, Record(record), spending)
