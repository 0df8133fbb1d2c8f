"""The answers of every model of an evaluation, drawn from where an earlier process left off.

`samples.jsonl` grows by a batch at a time. A process that takes it up drops a half-written last
line and draws the batches that are not whole there; because an answer's random numbers are its own
and a batch keeps its shape (see `sampling`), the result is, bit for bit, that of a run that was
never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from persona_probe.artifact import append_jsonl, read_jsonl
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.arms import Models, SampledArm
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.request import Asked, EvaluationRequest
from persona_probe.evaluation.samples_file import answer_row
from persona_probe.evaluation.sampling import Known, sample
from persona_probe.steering.io import load_fix

Progress = Callable[[str, int, int], None]
"""Told what is being done, and (answers done, answers in all)."""


@dataclass
class Asking:
    """Asks the models of `request` one after the other, into the samples file `file`."""

    request: EvaluationRequest
    asked: Asked
    models: Models
    file: Path
    tell: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    """What drawing took in this process, by arm."""

    def answers(self) -> dict[str, list[Answer]]:
        """By arm, in the order of the questions; arms from files come last."""
        before = _drawn_before(self.file, self.asked.questions)
        drawn: dict[str, list[Answer]] = {}
        for arm in self.request.arms:
            start = time.perf_counter()
            drawn[arm.name] = self._of(arm, before.get(arm.name, {}))
            self.seconds[arm.name] = round(time.perf_counter() - start, 2)
        return drawn | {name: list(given.answers) for name, given in self.asked.given.items()}

    def _of(self, arm: SampledArm, known: Known) -> list[Answer]:
        groups = self.asked.counts(self.request.samples_per_question)
        total = sum(count * len(members) for count, members in groups.items())
        answers: dict[str, list[Answer]] = {}
        done = 0
        for count, members in groups.items():
            for answer in self._group(
                arm, members, count, known, lambda n, at=done: self._say(arm, at + n, total)
            ):
                answers.setdefault(answer.question.id, []).append(answer)
            done += count * len(members)
        return [answer for question in self.asked.questions for answer in answers[question.id]]

    def _group(
        self,
        arm: SampledArm,
        questions: Sequence[Question],
        count: int,
        known: Known,
        say: Callable[[int], None],
    ) -> list[Answer]:
        """`count` answers to each question."""
        say(0)
        wanted = [(question.id, number) for question in questions for number in range(count)]
        if all(key in known for key in wanted):  # then the model need not even be loaded
            return [known[key] for key in wanted]
        return sample(
            self.models[arm.model],
            questions,
            replace(self.asked.sampling, samples=count, generation_config=False),
            fix=() if arm.fix is None else load_fix(arm.fix),
            system=self.request.system,
            batch_size=self.request.batch_size,
            progress=lambda done, _: say(done),
            known=known,
            drawn=lambda new: append_jsonl(self.file, ({"arm": arm.name, **answer_row(a)} for a in new)),
        )

    def _say(self, arm: SampledArm, done: int, total: int) -> None:
        self.tell(f"asking {arm.name}", done, total)


def _drawn_before(file: Path, questions: Sequence[Question]) -> dict[str, dict[tuple[str, int], Answer]]:
    """What is in the samples file, by arm; a line torn by a kill is not."""
    by_id: Mapping[str, Question] = {question.id: question for question in questions}
    known: dict[str, dict[tuple[str, int], Answer]] = {}
    for row in read_jsonl(file, torn_tail=True) if file.is_file() else ():
        answer = Answer(
            question=by_id[row["id"]],
            sample=row["sample"],
            text=row["answer"],
            thought=row["thought"],
            token_ids=tuple(row["token_ids"]),
            truncated=row["truncated"],
        )
        known.setdefault(row["arm"], {})[answer.question.id, answer.sample] = answer
    return known
