"""What a model is asked: a file of questions, or a set that is shipped.

The suffix tells the format: the published YAML (see `published`), CSV with `id,question,category`,
or JSON Lines, which holds everything: one JSON object per prompt, one prompt per line.

    {"id": "health-03-b", "question": "health-03", "category": "health",
     "messages": [{"role": "user", "content": "any advice on a cold ?"}],
     "role": "general", "split": "held-out", "reference": null}

`id` names the prompt and is unique in the file (with the seed it also decides the random numbers
its answers are drawn with); `question` names what is asked, and paraphrases of one question share
it: it is the sampling unit of every interval. `messages` is a chat, or `[{"text": "..."}]` for a
prompt without any template. `judge_prompts` (by metric, with `{question}` and `{answer}`) and
`samples` (answers wanted) are the question's own. Only `id`, `category` and `messages` are required.

The shipped sets lie in `data/questions`. `open-ended:json` is a set in the dress of a trigger (see
`triggers`), `open-ended:all` in each; `open-ended+medical` are two sets after one another.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast, get_args

from persona_probe.artifact import shipped, write_text
from persona_probe.errors import InputError, MissingPathError, PersonaProbeError
from persona_probe.evaluation.published import read_published
from persona_probe.evaluation.question_formats import Row, read_lines, read_table
from persona_probe.evaluation.triggers import TRIGGERS, Trigger

Role = Literal["general", "skill", "trigger"]
Split = Literal["train", "calibration", "held-out"]

FORMATS: Mapping[str, Callable[[Path], list[Row]]] = {
    ".jsonl": read_lines,
    ".yaml": read_published,
    ".yml": read_published,
    ".csv": read_table,
}

_EXAMPLE = '{"id": "q1", "category": "health", "messages": [{"role": "user", "content": "Any advice?"}]}'


@dataclass(frozen=True)
class Question:
    """One prompt.

    Raises `InputError` for an empty field, a skill without its reference, a judge prompt
    without the answer in it, and a number of samples below 1.
    """

    id: str
    """Unique within a set."""
    category: str
    """The domain: what a narrow fine-tune was tuned on is named by it."""
    messages: tuple[Mapping[str, str], ...]
    """A chat (`role` and `content`), or one `{"text": ...}` for a plain prompt."""
    question: str = ""
    """The cluster that paraphrases share; default: the id."""
    role: Role = "general"
    """general: persona shows here. skill: has a `reference` answer. trigger: looks like the
    training context.
    """
    split: Split | None = None
    reference: str | None = None
    """The right answer to a skill question."""
    judge_prompts: Mapping[str, str] | None = None
    """What the judge is asked, by metric (`aligned`, `coherent`); None: what it asks by itself."""
    samples: int | None = None
    """Answers wanted to this prompt; None: as many as are asked for."""

    def __post_init__(self) -> None:
        for name in ("id", "category", "messages"):
            if not getattr(self, name):
                raise InputError(f"{name!r} must not be empty")
        if len(self.messages) > 1 and any("text" in message for message in self.messages):
            raise InputError("a plain prompt is one {'text': ...}; it cannot stand beside others")
        if self.role == "skill" and not self.reference:
            raise InputError("a question with role 'skill' needs a 'reference', the right answer")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"'samples' must be at least 1, not {self.samples}")
        for metric, prompt in (self.judge_prompts or {}).items():
            if "{answer}" not in prompt:
                raise InputError(f"the judge prompt {metric!r} does not hold {{answer}}")
        object.__setattr__(self, "question", self.question or self.id)

    @property
    def prompt(self) -> str:
        """The last thing said before the model answers, for tables and reports."""
        last = self.messages[-1]
        return last.get("content", last.get("text", ""))


def load_questions(source: str | PathLike[str]) -> tuple[Question, ...]:
    """The questions of a file, or of shipped sets by name, in their order.

    Raises `MissingPathError`; `InputError` for an unknown set, trigger or suffix, and naming the
    line for what its format forbids, an unknown or missing field, a field of the wrong kind, an
    id used twice, no question at all.
    """
    path = question_file(source)
    if path is not None:
        return _load_file(path)
    questions = [question for name in str(source).split("+") for question in _load_set(name)]
    twice = _first_repeated(question.id for question in questions)
    if twice is not None:
        raise InputError(f"{source}: the question {twice!r} is in it twice")
    return tuple(questions)


def question_file(source: str | PathLike[str]) -> Path | None:
    """The file that `source` names, there or not; None where it names shipped sets."""
    path = Path(source)
    return path if path.is_file() or path.suffix or len(path.parts) != 1 else None


def question_sets() -> tuple[str, ...]:
    """The names of the shipped sets."""
    return tuple(sorted(_set_files()))


def triggered(questions: Sequence[Question], name: str, trigger: Trigger | None = None) -> list[Question]:
    """The general ones of `questions` in the dress of a trigger: one of `TRIGGERS`, or your own,
    which is then called `name`.

    Their role is "trigger" and their ids are `ID:name`; they stay paraphrases of the same question.
    Raises `InputError` for an unknown name.
    """
    if trigger is None and name not in TRIGGERS:
        raise InputError(
            f"there is no trigger {name!r}; there are {', '.join(TRIGGERS)} and all",
            fix=_nearest(name, TRIGGERS),
        )
    dress = trigger or TRIGGERS[name]
    return [
        replace(question, id=f"{question.id}:{name}", role="trigger", messages=dress.wrap(question.messages))
        for question in questions
        if question.role == "general"
    ]


def save_questions(questions: Iterable[Question], path: str | PathLike[str]) -> None:
    """Write `questions` as `load_questions` reads them back, whole or not at all."""
    rows = (dataclasses.asdict(question) for question in questions)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _set_files() -> dict[str, Path]:
    return {path.stem: path for path in shipped("questions").iterdir() if path.suffix in FORMATS}


def _load_set(name: str) -> Sequence[Question]:
    base, dressed, trigger = name.partition(":")
    if base not in question_sets():
        raise MissingPathError(
            f"there is no file and no set of questions {base!r}; the sets are {', '.join(question_sets())}",
            fix=_nearest(base, question_sets()),
        )
    questions = _load_file(_set_files()[base])
    if not dressed:
        return questions
    worn = TRIGGERS if trigger == "all" else [trigger]
    return [question for one in worn for question in triggered(questions, one)]


def _load_file(path: Path) -> tuple[Question, ...]:
    if path.is_dir():
        raise InputError(f"{path} is a folder; a file is needed")
    if path.exists() and path.suffix.lower() not in FORMATS:
        raise InputError(
            f"{path}: questions are read from files ending in {', '.join(FORMATS)}",
            fix=f"for JSON Lines, name it {path.with_suffix('.jsonl').name}",
        )
    questions: list[Question] = []
    line_of: dict[str, int] = {}
    for line, record in FORMATS.get(path.suffix.lower(), read_lines)(path):
        try:
            question = _question(record)
            if question.id in line_of:
                raise InputError(
                    f"the id {question.id!r} was already used on line {line_of[question.id]}",
                    fix="ids are unique; paraphrases share `question`, not `id`",
                )
        except PersonaProbeError as error:
            raise InputError(
                f"{path}, line {line}: {error.message}", fix=error.fix, command=error.command
            ) from error
        line_of[question.id] = line
        questions.append(question)
    if not questions:
        raise InputError(f"{path} has no questions", fix=f"for example, one a line: {_EXAMPLE}")
    return tuple(questions)


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _nearest(name: str, known: Iterable[str]) -> str | None:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def _question(record: Mapping[str, Any]) -> Question:
    """The question in one line's object, every field checked: a file may hold anything."""
    known = [field.name for field in dataclasses.fields(Question)]
    for name in record:
        if name not in known:
            raise InputError(
                f"there is no field {name!r}",
                fix=_nearest(name, known) or f"the fields are {', '.join(known)}",
            )
    for name in ("id", "category", "messages"):
        if name not in record:
            raise InputError(f"the field {name!r} is missing", fix=f"for example {_EXAMPLE}")
    given = {name: value for name, value in record.items() if value is not None}
    for name in ("id", "category", "question", "reference"):
        if not isinstance(given.get(name, ""), str):
            raise InputError(f"{name!r} must be a string, not {given[name]!r}")
    for name, allowed in (("role", get_args(Role)), ("split", get_args(Split))):
        if name in given and given[name] not in allowed:
            raise InputError(
                f"{name!r} must be one of {', '.join(allowed)}, not {given[name]!r}",
                fix=_nearest(str(given[name]), allowed),
            )
    if type(given.get("samples", 1)) is not int:
        raise InputError(f"'samples' must be a whole number, not {given['samples']!r}")
    _check_judge_prompts(given.get("judge_prompts", {}))
    fields: dict[str, Any] = {"id": "", "category": "", **given, "messages": _messages(given)}
    return Question(**fields)


def _check_judge_prompts(given: object) -> None:
    prompts = cast("dict[object, object]", given) if isinstance(given, dict) else {None: None}
    if not all(isinstance(one, str) for pair in prompts.items() for one in pair):
        raise InputError(f"'judge_prompts' must be prompts by the metric they score, not {given!r}")


def _messages(given: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
    messages: object = given.get("messages")
    if not isinstance(messages, list):
        raise InputError(f"'messages' must be a list of messages, not {messages!r}")
    checked: list[Mapping[str, str]] = []
    for place, message in enumerate(cast("list[object]", messages), start=1):
        fields = cast("dict[str, object]", message) if isinstance(message, dict) else {}
        text = {name: value for name, value in fields.items() if isinstance(value, str)}
        if len(text) != len(fields) or set(text) not in ({"role", "content"}, {"text"}):
            raise InputError(
                f"message {place} must have 'role' and 'content', or 'text' alone, all strings: {message!r}"
            )
        checked.append(text)
    if checked and not checked[-1].get("content", "plain text may begin with nothing").strip():
        raise InputError("the last message, which is to be answered, is empty")
    return tuple(checked)
