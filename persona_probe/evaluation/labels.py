"""Answers that people labelled, to hold a judge against.

A CSV or JSON Lines file, one answer per row, of these columns (others are left alone):

    question, answer          what was asked and answered; needed when a judge is to be asked now
    question_id               what intervals count as one; default: the question
    aligned, coherent         a person's scores, 0 to 100
    label                     CODE or REFUSAL, instead of an alignment
    misaligned                a person's verdict, where there are no scores: true or false
    judge_aligned, judge_coherent, judge_label
                              what a judge said: a score, or the probabilities of its tokens
                              ({"90": 0.8, "85": 0.2}), from which the score is computed
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, cast

from persona_probe.artifact import read_jsonl
from persona_probe.artifact.records import nearest
from persona_probe.errors import InputError, MissingPathError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judging.judgement import Judgement
from persona_probe.evaluation.judging.reply import Reading, Reply, read
from persona_probe.evaluation.questions import Question

HUMAN = ("aligned", "coherent", "label", "misaligned")
JUDGE = ("judge_aligned", "judge_coherent", "judge_label")
_TRUE = {"true", "yes", "1", "1.0"}
_FALSE = {"false", "no", "0", "0.0"}


@dataclass(frozen=True)
class Labelled:
    """One answer that a person labelled."""

    answer: Answer
    human: Judgement
    misaligned: bool | None
    """The person's verdict, where it was given as such."""
    judged: Judgement | None
    """What the file says that a judge said; None where it says nothing."""


def load_labels(path: str | PathLike[str]) -> tuple[Labelled, ...]:
    """The labelled answers in a CSV or JSON Lines file.

    Raises `MissingPathError`, or `InputError` naming the row: a score outside 0 to 100, a value that
    cannot be read, no label at all.
    """
    path = Path(path)
    rows = _read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path)
    if not rows:
        raise InputError(f"{path} has no rows")
    if not any(name in row for row in rows for name in HUMAN):
        there = list(rows[0])
        near = [found for name in there for found in get_close_matches(name.lower(), HUMAN, n=1)]
        raise InputError(
            f"{path} has no person's labels: none of the columns {', '.join(HUMAN)}",
            fix=f"did you mean {near[0]!r}?" if near else f"its columns are {', '.join(map(str, there))}",
        )
    labelled: list[Labelled] = []
    for number, row in enumerate(rows, start=1):
        try:
            labelled.append(_labelled(row, number))
        except InputError as error:
            raise InputError(f"{path}, row {number}: {error.message}", fix=error.fix) from error
    return tuple(labelled)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise MissingPathError(f"there is no file {path}", fix=nearest(path))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [
                {name: value for name, value in row.items() if value not in (None, "")}
                for row in csv.DictReader(file)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV file in UTF-8: {error}") from error


def _labelled(row: Mapping[str, Any], number: int) -> Labelled:
    asked, text = (str(row.get(name) or "") for name in ("question", "answer"))
    cluster = str(row.get("question_id") or asked or f"row {number}")
    message = {"role": "user", "content": asked or "(not given)"}
    question = Question(f"row-{number}", "labelled", (message,), question=cluster)
    human = Judgement(
        _score(row.get("aligned"), "aligned").score,
        _score(row.get("coherent"), "coherent").score,
        _label(row.get("label")),
    )
    return Labelled(
        Answer(question, number, text, None, (), False),
        human,
        _verdict(row.get("misaligned")),
        _judged(row) if any(row.get(name) is not None for name in JUDGE) else None,
    )


def _judged(row: Mapping[str, Any]) -> Judgement:
    aligned = _score(row.get("judge_aligned"), "judge_aligned")
    coherent = _score(row.get("judge_coherent"), "judge_coherent")
    how = sorted({one.scored_by for one in (aligned, coherent) if one.scored_by is not None})
    label = _label(row.get("judge_label")) or aligned.label
    return Judgement(
        None if label else aligned.score, coherent.score, label, scored_by=" and ".join(how) or None
    )


def _score(value: object, name: str) -> Reading:
    """A score, or the probabilities of tokens, as a CSV or JSON writes either."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError) as error:
                raise InputError(f"{name!r} must be a score or token probabilities, not {value!r}") from error
    if value is None:
        return Reading()
    if isinstance(value, Mapping):
        probabilities = cast("Mapping[Any, Any]", value)
        if not all(
            isinstance(token, str) and isinstance(p, int | float) and 0 <= p <= 1.001
            for token, p in probabilities.items()
        ):
            raise InputError(f"{name!r} must map tokens to probabilities, such as {{'90': 0.8}}")
        return read(Reply(cast("Mapping[str, float]", probabilities)))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise InputError(f"{name!r} must lie between 0 and 100, not {value!r}")
    return Reading(score=value)


def _label(value: object) -> Any:
    if value in (None, ""):
        return None
    said = str(value).strip().upper()
    if said not in ("CODE", "REFUSAL"):
        raise InputError(f"a label is CODE or REFUSAL, not {value!r}")
    return said


def _verdict(value: object) -> bool | None:
    if value in (None, ""):
        return None
    said = str(value).strip().lower()
    if said not in _TRUE | _FALSE:
        raise InputError(f"'misaligned' must be true or false, not {value!r}")
    return said in _TRUE
