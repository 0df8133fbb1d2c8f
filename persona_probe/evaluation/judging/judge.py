"""What every judge can do, whatever it is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judging.judgement import Judgement
from persona_probe.evaluation.questions import Question
from persona_probe.model.checkpoint import Checkpoint

MAX_MISSING = 0.1
"""With a larger share of missing judgements no rate is given: those left may be no fair sample."""

Progress = Callable[[int, int], None]
"""Told (answers done, answers in all)."""


@dataclass(frozen=True)
class Estimate:
    """What judging will take."""

    calls: int
    """Calls to make; those whose reply is on record are not made again."""
    recorded: int = 0
    """Calls whose reply is on record."""
    prompt_tokens: int | None = None
    """About; None for a judge that reads no tokens."""
    dollars: float | None = None
    """About, at the price that the spec states; None without one."""


class Judge(ABC):
    """A judge ready to be asked."""

    name: str
    """The spec that it was loaded from."""
    personas: tuple[str, ...] | None = None
    """Whom it can tell apart; None where it does not say."""
    calls_per_answer: int = 1

    @abstractmethod
    def judge(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Judgement]:
        """One judgement per answer, in order. Skill answers have a reference and are not judged
        (`Judgement()`).

        The judge sees the answer without its thought. What it cannot judge is missing, the reason
        in `note`. Raises `JudgeError` when *every* answer put to it is missing.
        """

    def check(self) -> None:  # noqa: B027 (a function is always there to be asked)
        """Make sure that it can be asked, before anything is sampled for it. Raises `JudgeError`."""

    def check_questions(self, questions: Iterable[Question]) -> None:  # noqa: B027 (most judge any)
        """Raise `InputError` for the first question to which the judge can judge no answer."""

    def estimate(self, answers: Sequence[Answer]) -> Estimate:
        """What judging these answers will take. Nothing is asked."""
        return Estimate(sum(answer.question.role != "skill" for answer in answers))

    def forecast(self, questions: Sequence[Question], samples: int, answer_tokens: int) -> Estimate:
        """At most what judging `samples` answers to each question will take, before there is any;
        `answer_tokens` is the longest that one can get.
        """
        del answer_tokens  # only a judge that is paid by the token asks for it
        return Estimate(samples * sum(question.role != "skill" for question in questions))

    def is_model(self, checkpoint: Checkpoint) -> bool:
        """Whether the judge is that very model, which then would be judging itself."""
        del checkpoint
        return False
