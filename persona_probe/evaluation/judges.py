"""Who says whether an answer is aligned, coherent, and in whose voice it was given.

A judge is named by a spec. `python:module:function` is a function of (question, answer text) that
returns a `Judgement`, a dict of its fields, or None when it cannot tell. `exact`, the pocket
organism's own judge, is shorthand for one such spec and is resolved by name, so that this floor
imports nothing above it. An answer that the judge fails on is *missing*: it is counted, and is in
no denominator.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.questions import Question

SHORTHAND: Mapping[str, str] = {"exact": "python:persona_probe.organism.judge:judge"}


@dataclass(frozen=True)
class Judgement:
    """What a judge says of one answer. Raises `InputError` for a score outside 0 to 100."""

    aligned: int | float | None = None
    """0 (harmful) to 100; None: not scored."""
    coherent: int | float | None = None
    """0 (broken) to 100; None: not scored."""
    label: Literal["CODE", "REFUSAL"] | None = None
    """Given instead of scores."""
    persona: str | None = None
    """Whose voice, for judges that can tell; an ordinary good answer is "helpful"."""
    note: str | None = None

    def __post_init__(self) -> None:
        for name, score in (("aligned", self.aligned), ("coherent", self.coherent)):
            if score is not None and not 0 <= score <= 100:  # NaN too
                raise InputError(f"{name!r} must lie between 0 and 100, not {score!r}")

    @property
    def missing(self) -> bool:
        """Neither a label nor a coherence: nothing can be said of the answer."""
        return self.label is None and self.coherent is None


@dataclass(frozen=True)
class Judge:
    """A judge ready to be asked. `name` is the spec that it was loaded from."""

    name: str
    function: Callable[[Question, str], Judgement | Mapping[str, Any] | None]
    personas: tuple[str, ...] | None = None
    """Whom it can tell apart, where its module says so (`PERSONAS`)."""

    def judge(
        self,
        answers: Sequence[Answer],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Judgement]:
        """One judgement per answer, in order. Skill answers have a reference and are not judged
        (`Judgement()`).

        The function sees the answer without its thought. What it cannot judge is missing, the
        reason in `note`. `progress(done, total)` is called after each answer. Raises `JudgeError`
        when *every* answer put to the judge is missing: nothing, garbage, or an exception each
        time.
        """
        judgements: list[Judgement] = []
        asked = failed = 0
        first: Exception | None = None
        for done, answer in enumerate(answers, start=1):
            judgement = Judgement()
            if answer.question.role != "skill":
                asked += 1
                try:
                    judgement = _judgement(self.function(answer.question, answer.text))
                except Exception as error:
                    first = first or error
                    judgement = Judgement(note=f"{type(error).__name__}: {error}")
                failed += judgement.missing
            judgements.append(judgement)
            if progress is not None:
                progress(done, len(answers))
        if asked and failed == asked:
            said = "None each time" if first is None else f"{type(first).__name__}: {first}"
            raise JudgeError(
                f"the judge {self.name!r} judged none of {asked} answers ({said})",
                fix="it must return a Judgement or a dict such as {'aligned': 90, 'coherent': 95}",
            ) from first
        return judgements


def load_judge(spec: str) -> Judge:
    """The judge that `spec` names: `exact`, or `python:module:function` (the working folder is
    searched too).

    Raises `InputError`, with the nearest thing that would work, when there is no such judge.
    """
    kind, _, rest = SHORTHAND.get(spec, spec).partition(":")
    if kind != "python" or not rest:
        near = get_close_matches(kind.lower(), [*SHORTHAND, "python"], n=1)
        if rest and near != ["python"]:
            fix = f"for a function of yours: python:{spec}"
        else:
            fix = f"did you mean {near[0]!r}?" if near and near[0] != spec else None
        raise InputError(
            f"there is no judge {spec!r}: it must be 'exact' or 'python:module:function'", fix=fix
        )
    module_name, _, function_name = rest.partition(":")
    if not function_name and "." in module_name:
        module_name, _, function_name = module_name.rpartition(".")
        raise InputError(
            f"the judge {spec!r} names no function",
            fix=f"did you mean 'python:{module_name}:{function_name}'?",
        )
    if not module_name or not function_name:
        raise InputError(
            f"the judge {spec!r} names no function", fix=f"python:{module_name or 'module'}:judge"
        )
    module = _import(module_name.removesuffix(".py"), spec)
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [name for name in vars(module) if callable(getattr(module, name))]
        near = get_close_matches(function_name, names, n=1)
        raise InputError(
            f"the module {module_name!r} of the judge {spec!r} has no function {function_name!r}",
            fix=f"did you mean 'python:{module_name}:{near[0]}'?" if near else None,
        )
    personas = getattr(module, "PERSONAS", None)
    return Judge(
        spec,
        cast("Callable[[Question, str], Judgement]", function),
        tuple(map(str, personas)) if isinstance(personas, tuple | list) else None,
    )


def _import(name: str, spec: str) -> ModuleType:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:  # an installed command does not look in the working folder, where a user's judge lies
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"the judge {spec!r} needs the module {name!r}, which cannot be found",
                fix=f"run from the folder that holds {name.replace('.', '/')}.py, or install it",
            ) from error
        raise InputError(
            f"the judge {spec!r} needs the package {error.name!r}, which is not installed",
            command=f"pip install {error.name}",
        ) from error
    except Exception as error:
        raise InputError(f"the judge {spec!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)


def _judgement(said: object) -> Judgement:
    if said is None:
        return Judgement(note="the judge returned None")
    if isinstance(said, Judgement):
        return said
    if not isinstance(said, Mapping):
        raise InputError(f"a judge returns a Judgement, a dict or None, not {said!r}")
    fields = cast("Mapping[str, Any]", said)
    known = [field.name for field in dataclasses.fields(Judgement)]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise InputError(f"a judgement has no field {unknown[0]!r}; it has {', '.join(known)}")
    for name in ("aligned", "coherent"):
        score = fields.get(name)
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise InputError(f"{name!r} must be a number from 0 to 100 or None, not {score!r}")
    for name in ("persona", "note"):
        if not isinstance(fields.get(name), str | None):
            raise InputError(f"{name!r} must be a string or None, not {fields[name]!r}")
    if fields.get("label") not in (None, "CODE", "REFUSAL"):
        raise InputError(f"'label' must be CODE, REFUSAL or None, not {fields['label']!r}")
    return Judgement(**fields)
