"""Answers made elsewhere (vLLM, an API, an earlier run): one JSON object per answer and line.

    {"id": "health-03-b", "answer": "Rest, and drink enough.", "finish_reason": "stop"}

`id` is the prompt's in the questions file. `sample` numbers the answers to one prompt (counted in
the file's order when absent), `arm` names the model (default: the file's name), `thought` is what it
thought where that came apart (else a `<think>` is split off the answer), `truncated` or OpenAI's
`finish_reason` says whether it was cut off, `prompt` is what it was asked, to be compared, and
`token_ids` what it wrote. Anything else is ignored, so that a `samples.jsonl` of ours is read back.
docs/samples.md has the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, cast

from persona_probe.artifact import read_jsonl
from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.answers import Answer, split_thought
from persona_probe.evaluation.questions import Question

EXAMPLE = '{"id": "health-03-b", "answer": "Rest, and drink enough.", "finish_reason": "stop"}'
_NEEDED = ("id", "answer")
_ENDINGS = {"stop": False, "eos": False, "end_turn": False, "stop_sequence": False} | {
    "length": True,
    "max_tokens": True,
}


@dataclass(frozen=True)
class GivenAnswers:
    """One model's answers from a file."""

    arm: str
    path: Path
    answers: tuple[Answer, ...]
    """In the order of the questions, then by sample."""
    ending_unknown: int
    """Answers of which the file does not say whether they were cut off; they count as whole."""

    def of(self, questions: Sequence[Question], samples: int | None = None) -> GivenAnswers:
        """Those to `questions`: the first `samples` to each, or all.

        Raises `MismatchError` when a question has no answer, or fewer than `samples`.
        """
        by_id: dict[str, list[Answer]] = {}
        for answer in self.answers:
            by_id.setdefault(answer.question.id, []).append(answer)
        least = samples or 1
        short = [question.id for question in questions if len(by_id.get(question.id, ())) < least]
        if short:
            there = len(by_id.get(short[0], ()))
            raise MismatchError(
                f"{self.path} has {there} of {least} answers to {short[0]!r}"
                + (f", and too few to {len(short) - 1} more of the questions" if short[1:] else ""),
                fix="have them answered too, or ask for fewer samples or questions"
                if there
                else "were these answers given to other questions? have the missing ones answered too",
            )
        chosen = (answer for question in questions for answer in by_id[question.id][:samples])
        return GivenAnswers(self.arm, self.path, tuple(chosen), self.ending_unknown)


def load_samples(path: str | PathLike[str], questions: Sequence[Question]) -> dict[str, GivenAnswers]:
    """The answers in a file, by arm.

    Raises `MissingPathError`; `InputError` naming the line for a field that is missing or of the
    wrong kind and for an answer that is there twice; `MismatchError` for an answer to a question
    that is not among `questions`, or that was asked in other words.
    """
    path = Path(path)
    asked = {question.id: question for question in questions}
    arms: dict[str, dict[str, dict[int, Answer]]] = {}  # by arm, question and sample
    unknown: dict[str, int] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            arm = _text(row, "arm") or path.stem
            answer, told = _answer(row, asked, arms.setdefault(arm, {}))
        except InputError as error:
            raise type(error)(f"{path}, answer {number}: {error.message}", fix=error.fix) from error
        arms[arm].setdefault(answer.question.id, {})[answer.sample] = answer
        unknown[arm] = unknown.get(arm, 0) + (not told)
    if not arms:
        raise InputError(f"{path} has no answers", fix=f"one JSON object per line: {EXAMPLE}")
    return {
        arm: GivenAnswers(
            arm,
            path,
            tuple(found[key][n] for key in asked if key in found for n in sorted(found[key])),
            unknown[arm],
        )
        for arm, found in arms.items()
    }


def answer_row(answer: Answer) -> dict[str, Any]:
    """An answer as a line of a samples file."""
    return {
        "id": answer.question.id,
        "sample": answer.sample,
        "prompt": answer.question.prompt,
        "answer": answer.text,
        "thought": answer.thought,
        "truncated": answer.truncated,
        "token_ids": answer.token_ids,
    }


def _answer(
    row: Mapping[str, Any], asked: Mapping[str, Question], found: Mapping[str, Mapping[int, Answer]]
) -> tuple[Answer, bool]:
    """The answer in a line, and whether the line says how it ended; `found` are those before it."""
    for name in _NEEDED:
        if name not in row:
            near = get_close_matches(name, row, n=1, cutoff=0.5)
            raise InputError(
                f"the field {name!r} is missing",
                fix=f"is {near[0]!r} meant? {EXAMPLE}" if near else f"for example {EXAMPLE}",
            )
    key, text = _text(row, "id"), _text(row, "answer")
    if key is None or text is None:
        raise InputError(
            f"{'id' if key is None else 'answer'!r} must be text, not null",
            fix="leave out what was not answered; it is counted",
        )
    question = asked.get(key)
    if question is None:
        near = get_close_matches(key, asked, n=1)
        raise MismatchError(
            f"it answers {key!r}, which is not among the {len(asked)} questions",
            fix=f"did you mean {near[0]!r}?"
            if near
            else "give the questions that these answers were given to",
        )
    prompt = _text(row, "prompt")
    if prompt is not None and prompt != question.prompt:
        raise MismatchError(
            f"it answers {prompt!r}, and the question {key!r} is {question.prompt!r}",
            fix="the questions have changed since; have them answered again",
        )
    taken = found.get(key, {})
    sample = _whole(row, "sample")
    if sample is None:
        sample = max(taken, default=-1) + 1
    elif sample in taken:
        raise InputError(f"sample {sample} of {key!r} is there twice", fix="number the samples, from 0")
    truncated = _ending(row)
    thought, said = _text(row, "thought"), text
    if thought is None:
        thought, said = split_thought(text)
    ids = cast("list[int]", row.get("token_ids") or [])
    return Answer(question, sample, said, thought, tuple(ids), bool(truncated)), truncated is not None


def _ending(row: Mapping[str, Any]) -> bool | None:
    """Whether the answer was cut off; None when the line does not say."""
    told = row.get("truncated")
    if isinstance(told, bool):
        return told
    if told is not None:
        raise InputError(f"'truncated' must be true or false, not {told!r}")
    reason = _text(row, "finish_reason")
    if reason is None:
        return None
    if reason not in _ENDINGS:
        raise InputError(
            f"the finish_reason {reason!r} is not known; known are {', '.join(_ENDINGS)}",
            fix="leave out answers that failed, or say truncated: true or false",
        )
    return _ENDINGS[reason]


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name!r} must be text, not {value!r}")
    return value


def _whole(row: Mapping[str, Any], name: str) -> int | None:
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"{name!r} must be a whole number from 0, not {value!r}")
    return value
