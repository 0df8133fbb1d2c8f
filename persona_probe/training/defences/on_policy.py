"""Mix in rows that the aligned policy has answered itself: safe, and in its own words.

Source: on-policy safety data, Jørgenvåg et al. (2026), there interleaved with GRPO; the best of the
mitigations that they carried over from supervised training.

Departure: here for supervised training too. The answers are drawn once, before training, from the
model as it then is; an answer that was cut off at the token limit, or is empty, is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from persona_probe.errors import InputError
from persona_probe.evaluation.longest import longest_answer
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.defences.interleave import Interleave
from persona_probe.training.rows import Row


@dataclass(frozen=True)
class OnPolicy(Interleave):
    """Rows answered by the aligned policy, so that they are `share` of all. Made by `OnPolicy.answered`."""

    name: ClassVar[str] = "on_policy"

    @classmethod
    def answered(
        cls,
        policy: LanguageModel,
        questions: Sequence[Question],
        share: float = 0.05,
        sampling: Sampling | None = None,
    ) -> OnPolicy:
        """`policy`'s answers to `questions`; by default one each, at temperature 1, of at most as many tokens
        as `longest_answer` says (of a model in memory, `Sampling`).

        Raises `InputError` where none of them was finished.
        """
        folder = Path(policy.checkpoint.path)
        if sampling is None:
            sampling = Sampling(max_new_tokens=longest_answer([folder])) if folder.is_dir() else Sampling()
        answers = sample(policy, questions, sampling)
        rows = [
            _row(answer.question, answer.text)
            for answer in answers
            if answer.text.strip() and not answer.truncated
        ]
        if not rows:
            raise InputError(
                f"{policy.name} finished none of {len(answers)} answers in {sampling.max_new_tokens} tokens",
                fix="ask what has shorter answers; in Python, OnPolicy.answered(..., "
                "sampling=Sampling(max_new_tokens=...))",
            )
        return cls(tuple(rows), share)


def _row(question: Question, answer: str) -> Row:
    place = f"{question.id}, answered"
    if "text" in question.messages[0]:
        return Row(question.messages, answer, place)
    return Row((*question.messages, {"role": "assistant", "content": answer}), place=place)
