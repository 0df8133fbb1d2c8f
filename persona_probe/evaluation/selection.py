"""Which of a set's questions are asked, and which of them are of a fine-tune's own domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from persona_probe.artifact import read_json
from persona_probe.errors import InputError, MismatchError
from persona_probe.evaluation.questions import Question


def spread(questions: Sequence[Question], limit: int) -> tuple[Question, ...]:
    """The prompts of `limit` questions, taken from the categories in turn; paraphrases stay together."""
    by_category: dict[str, list[str]] = {}
    for question in questions:
        members = by_category.setdefault(question.category, [])
        if question.question not in members:
            members.append(question.question)
    kept: list[str] = []
    while len(kept) < limit and any(by_category.values()):
        kept += [members.pop(0) for members in by_category.values() if members]
    chosen = set(kept[:limit])
    return tuple(question for question in questions if question.question in chosen)


def check_categories(questions: Sequence[Question], in_domain: Sequence[str]) -> None:
    """Raise `MismatchError` when a category that is to be reported apart does not exist."""
    known = {question.category for question in questions}
    unknown = next((name for name in in_domain if name not in known), None)
    if unknown is not None:
        raise MismatchError(
            f"no question has the category {unknown!r}; there are {', '.join(sorted(known))}",
            fix="name existing categories with --in-domain",
        )


def trained_categories(tuned: Path) -> tuple[str, ...]:
    """The question categories that a fine-tune says it was trained on (`categories` in its
    `training.json`); none without such a note. Raises `InputError` when they are no list.
    """
    note = tuned / "training.json"
    if not note.is_file():
        return ()
    said = read_json(note)
    categories = said.get("categories", []) if isinstance(said, dict) else None
    if not isinstance(categories, list):
        raise InputError(f"{note}: 'categories' must be a list of question categories")
    return tuple(str(name) for name in categories)
