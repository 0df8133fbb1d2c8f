"""A Python function as judge."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judging.judge import Judge, Progress
from persona_probe.evaluation.judging.judgement import Judgement, judgement_of
from persona_probe.evaluation.questions import Question

Function = Callable[[Question, str], Judgement | Mapping[str, Any] | None]


@dataclass(frozen=True)
class FunctionJudge(Judge):
    """Asks `function` of (question, answer text), one answer after another."""

    name: str
    function: Function
    personas: tuple[str, ...] | None = None
    """Where its module says so (`PERSONAS`)."""
    knows: Callable[[Question], bool] | None = None
    """Which questions it can judge answers to, where its module says so (`knows`)."""
    source: Path | None = None
    """The file of its module."""

    def check_questions(self, questions: Iterable[Question]) -> None:
        """See `Judge.check_questions`."""
        if self.knows is None:
            return
        for question in questions:
            if question.role != "skill" and not self.knows(question):
                raise InputError(
                    f"the judge {self.name!r} does not know the question {question.question!r}",
                    fix="name one that judges any answer: --judge openai:MODEL@URL, local:DIR or "
                    "python:module:function",
                )

    def judge(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Judgement]:
        """See `Judge.judge`. An answer is missing when the function returns nothing or garbage, or raises."""
        judgements: list[Judgement] = []
        asked, failed = 0, list[str]()
        first: Exception | None = None
        for done, answer in enumerate(answers, start=1):
            judgement = Judgement()
            if answer.question.role != "skill":
                asked += 1
                try:
                    judgement = judgement_of(self.function(answer.question, answer.text))
                except Exception as error:
                    first = first or error
                    judgement = Judgement(note=f"{type(error).__name__}: {error}")
                if judgement.missing:
                    failed.append(judgement.note or "it gave neither 'coherent' nor a 'label'")
            judgements.append(judgement)
            if progress is not None:
                progress(done, len(answers))
        if failed and len(failed) == asked:
            raise JudgeError(
                f"the judge {self.name!r} judged none of {asked} answers ({failed[0]})",
                fix="it must return a Judgement or a dict such as {'aligned': 90, 'coherent': 95}",
            ) from first
        return judgements


def function_judge(spec: str, place: str) -> FunctionJudge:
    """The judge at `place`, a `module:function`; the working folder is searched too. `spec` is what
    the user wrote.

    Raises `InputError`, with the nearest thing that would work, when there is none.
    """
    module_name, _, function_name = place.partition(":")
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
    personas, knows = getattr(module, "PERSONAS", None), getattr(module, "knows", None)
    source: str | None = getattr(module, "__file__", None)
    return FunctionJudge(
        spec,
        cast("Function", function),
        tuple(map(str, personas)) if isinstance(personas, tuple | list) else None,
        cast("Callable[[Question], bool]", knows) if callable(knows) else None,
        None if source is None else Path(source),
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
