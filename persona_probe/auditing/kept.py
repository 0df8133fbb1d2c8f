"""Answers that outlive the process that drew them: a killed audit goes on where it was.

An audit draws tens of thousands of answers, and they are most of what it takes. It asks for them in the
same order whenever it runs, so a portion is known by its number; a digest of what was asked (inputs,
model, prompts, sampling, edits to the last bit) guards against anything else, and what does not match is
drawn again. All else is computed anew: it is quick, and it is what makes the digests match.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from persona_probe.artifact import RunFolder, digest_of
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.drafts import drafted
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import prompt_of, sample
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.memory import answer_bytes, halving, how_many
from persona_probe.screening.calibrate import Bench
from persona_probe.screening.margin import Fix
from persona_probe.steering.matched import RandomMatched
from persona_probe.steering.plan import PlannedEdit

BATCH = 384
"""Most answers drawn at once."""
PORTION = 16 * BATCH
"""Answers that are kept together: what a kill costs at most. Fixes in one portion share work."""


class Kept:
    """The portions of one audit, in its run folder.

    Nothing is written before the judge has judged something: an audit whose judge cannot is refused, and
    leaves nothing behind.
    """

    def __init__(
        self,
        run: RunFolder,
        inputs: Mapping[str, str],
        *,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``inputs`` are the digests of all that the answers depend on besides what is asked."""
        self._run, self._inputs, self._progress = run, dict(inputs), progress
        self._number = 0
        self._held: dict[str, object] | None = {}
        self._size = batch_size or run.stage("batch")
        self.drawn = 0
        """Answers drawn by this process."""
        self.found = 0
        """Answers that an earlier one had drawn."""

    def portion(
        self, asked: Mapping[str, object], questions: Sequence[Question], draw: Callable[[], list[Answer]]
    ) -> list[Answer]:
        """The next portion: read back if it was kept, else drawn and kept."""
        name, digest = f"answers-{self._number:04}", digest_of([self._inputs, asked])
        self._number += 1
        saved = self._run.stage(name)
        if saved is not None and saved["asked"] == digest:
            answers = [
                _answer(row, question) for row, question in zip(saved["answers"], questions, strict=True)
            ]
            self.found += len(answers)
            return answers
        answers = draw()
        self.drawn += len(answers)
        self._save(name, {"asked": digest, "answers": [_row(answer) for answer in answers]})
        return answers

    def in_batches(self, guess: Callable[[], int], run: Callable[[int], list[Answer]]) -> list[Answer]:
        """``run`` with as many rows at once as fit: ``guess()`` at first, less where that was too much.

        A run that is taken up goes on with the size it had, for an answer's last bits depend on it.
        """

        def attempt(size: int) -> list[Answer]:
            if size != self._size:
                self._size = size
                self._save("batch", size)
            return run(size)

        return halving(attempt, self._size or guess())

    def count(self, done: int, total: int) -> None:
        """Tell how far a call has come."""
        if self._progress is not None:
            self._progress(done, total)

    def judged(self) -> None:
        """The judge works: what was held back is written, and from now on everything at once."""
        held, self._held = self._held or {}, None
        for name, value in held.items():
            self._run.save_stage(name, value)

    def _save(self, name: str, value: object) -> None:
        if self._held is None:
            self._run.save_stage(name, value)
        else:
            self._held[name] = value


@dataclass(frozen=True)
class KeptBench(Bench):
    """A bench whose answers are kept."""

    kept: Kept = field(kw_only=True)

    def answers(self, lm: LanguageModel, fixes: Sequence[Fix], **options: Any) -> list[Answer]:
        """As a bench's, portion by portion, with as many rows at once as fit in memory."""
        kept, samples = self.kept, self.sampling.samples
        drafts = drafted(fixes, lambda: self.unsteered(lm, **options))
        edits = {id(fix): [edit_digest(edit) for edit in fix] for fix in fixes}
        rows = [(fix, question) for fix in fixes for question in self.questions]
        each = max(1, PORTION // samples)
        answers: list[Answer] = []
        for start in range(0, len(rows), each):
            kept.count(len(answers), len(rows) * samples)
            part = rows[start : start + each]
            asked = {
                "model": (str(lm.checkpoint), lm.name),
                "sampling": self.sampling,
                "options": options,
                "rows": [(question.id, edits[id(fix)]) for fix, question in part],
            }
            answers += kept.portion(
                asked,
                [question for _, question in part for _ in range(samples)],
                lambda part=part: kept.in_batches(
                    lambda: self._batch(lm), lambda size: self._drawn(lm, part, size, drafts, options)
                ),
            )
        return answers

    def arms(self, lm: LanguageModel, fixes: Sequence[Fix], **options: Any) -> list[EvalResult]:
        """As a bench's."""
        results = super().arms(lm, fixes, **options)
        self.kept.judged()
        return results

    def _drawn(
        self,
        lm: LanguageModel,
        rows: Sequence[tuple[Fix, Question]],
        size: int,
        drafts: Mapping[tuple[str, int], Answer] | None,
        options: Mapping[str, Any],
    ) -> list[Answer]:
        questions, fixes = [question for _, question in rows], [fix for fix, _ in rows]
        return sample(lm, questions, self.sampling, fixes=fixes, batch_size=size, drafts=drafts, **options)

    def _batch(self, lm: LanguageModel) -> int:
        """How many answers to the longest prompt can be drawn at once."""
        prompts = (prompt_of(lm.tokenizer, question, None, self.sampling) for question in self.questions)
        tokens = max(map(len, prompts), default=0) + self.sampling.max_new_tokens
        return how_many(lm, answer_bytes(lm, tokens), BATCH)


def edit_digest(edit: PlannedEdit) -> str:
    """Of all that an edit does; a dictionary's encoder is named by the dictionary's digest."""
    if isinstance(edit, RandomMatched):
        return digest_of([edit_digest(edit.intervention), _digest(edit.vector)])
    target, condition = edit.target, edit.condition
    of = condition.of
    return digest_of(
        [
            (edit.op, edit.site, edit.positions, edit.level, edit.gain, edit.read),
            (condition.kind, condition.threshold, condition.read, condition.decided),
            [
                (_digest(one.decoder), one.indices, one.dictionary_digest)
                for one in (target, of)
                if one is not None
            ],
        ]
    )


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _row(answer: Answer) -> tuple[str, int, str, str | None, str, bool]:
    # the ids as one text: indented JSON would give each a line of its own
    ids = " ".join(map(str, answer.token_ids))
    return (answer.question.id, answer.sample, answer.text, answer.thought, ids, answer.truncated)


def _answer(row: Sequence[Any], question: Question) -> Answer:
    _, number, text, thought, ids, truncated = row
    return Answer(question, number, text, thought, tuple(map(int, ids.split())), truncated)
