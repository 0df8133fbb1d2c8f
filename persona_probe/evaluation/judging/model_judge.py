"""A language model as judge: two prompts per answer, one for alignment and one for coherence."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from persona_probe.artifact import digest_of
from persona_probe.errors import JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judging.asked_model import AskedModel, Call
from persona_probe.evaluation.judging.judge import Estimate, Judge, Progress
from persona_probe.evaluation.judging.judgement import Judgement
from persona_probe.evaluation.judging.prompts import Aspect, judge_prompt
from persona_probe.evaluation.judging.record import Record
from persona_probe.evaluation.judging.reply import Failure, Reading, Reply
from persona_probe.evaluation.judging.rounds import Rounds, ask_in_full
from persona_probe.evaluation.judging.spending import BudgetSpentError, Spending, tokens_of
from persona_probe.evaluation.questions import Question
from persona_probe.model.checkpoint import Checkpoint

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)


class ModelJudge(Judge):
    """Asks `model`, never twice the same: what `record` holds is read from there."""

    calls_per_answer = len(ASPECTS)

    def __init__(self, name: str, model: AskedModel, record: Record, spending: Spending) -> None:
        self.name = name
        self.spending = spending
        self._model = model
        self._record = record
        self._learnt = False

    @property
    def model(self) -> AskedModel:
        """The model itself, for what is not a judgement; `check` first."""
        return self._model

    def check(self) -> None:
        """See `Judge.check`: the endpoint answers and takes the key, or the model loads."""
        self._model.reach()
        self._learn()

    def is_model(self, checkpoint: Checkpoint) -> bool:
        """See `Judge.is_model`."""
        return self._model.is_model(checkpoint)

    def judge(self, answers: Sequence[Answer], progress: Progress | None = None) -> list[Judgement]:
        """See `Judge.judge`. Equal prompts are asked once.

        Raises `JudgeError` also when the key is refused, the endpoint stays away, or the budget is
        spent; replies that came are on record, and the same call then goes on where this one ended.
        """
        self._learn()
        keys, prompts = self._prompts(answers)
        rounds = Rounds(self._model, prompts, self._recall)
        counter = _Counter(keys, {key for key in prompts if rounds.settled(key)}, progress)
        where = {key: i for i, pair in reversed([*enumerate(keys)]) for key in pair}

        def keep(call: Call, reply: Reply | Failure) -> None:
            if isinstance(reply, Reply):
                aspect = ASPECTS[keys[where[call.key]].index(call.key)]
                row = self._row(answers[where[call.key]], aspect, call, reply)
                self._record.add(self._record_key(call), row)
            if rounds.take(call, reply):
                counter.add(call.key)

        try:
            ask_in_full(rounds, self._model, self.spending, keep)
        except BudgetSpentError as error:
            raise BudgetSpentError(
                f"{error.message}: {counter.done} of {len(answers)} answers are judged",
                fix="the same command goes on from there, with as much again",
            ) from error
        judgements = [_judgement([rounds.reading(key) for key in pair]) for pair in keys]
        self._raise_if_none(keys, judgements)
        return judgements

    def estimate(self, answers: Sequence[Answer]) -> Estimate:
        """See `Judge.estimate`. Before the model was first asked, nothing counts as on record."""
        known = self._record.get(self._setup_key)
        if known is not None:
            self._model.use(known["setup"])
        _, prompts = self._prompts(answers)
        rounds = Rounds(self._model, prompts, self._recall if known is not None else lambda _: None)
        waiting = rounds.waiting()
        return self._estimate(len(waiting), rounds.recalled, sum(tokens_of(call.prompt) for call in waiting))

    def forecast(self, questions: Sequence[Question], samples: int, answer_tokens: int) -> Estimate:
        """See `Judge.forecast`."""
        asked = [question for question in questions if question.role != "skill"]
        prompts = [judge_prompt(aspect, question, "") for question in asked for aspect in ASPECTS]
        tokens = samples * sum(tokens_of(prompt) + answer_tokens for prompt in prompts)
        return self._estimate(samples * len(prompts), 0, tokens)

    @property
    def _setup_key(self) -> str:
        return digest_of({"setup": self._model.identity})

    def _learn(self) -> None:
        if self._learnt:
            return
        known = self._record.get(self._setup_key)
        setup: Mapping[str, Any] = self._model.learn() if known is None else known["setup"]
        if known is None:
            self._record.add(self._setup_key, {"judge": self.name, "setup": setup})
        self._model.use(setup)
        self._learnt = True

    def _prompts(self, answers: Sequence[Answer]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
        """Per answer its prompts' keys, one per aspect (none for a skill answer), and the prompts by key."""
        keys: list[tuple[str, ...]] = []
        prompts: dict[str, str] = {}
        for answer in answers:
            pair: list[str] = []
            for aspect in ASPECTS if answer.question.role != "skill" else ():
                prompt = judge_prompt(aspect, answer.question, answer.text)
                key = digest_of(self._model.request(prompt))
                prompts[key] = prompt
                pair.append(key)
            keys.append(tuple(pair))
        return keys, prompts

    def _record_key(self, call: Call) -> str:
        return digest_of(self._model.request(call.prompt, call.begun)) if call.begun else call.key

    def _recall(self, call: Call) -> Reply | None:
        row = self._record.get(self._record_key(call))
        return None if row is None else Reply.on_record(row["reply"])

    def _row(self, answer: Answer, aspect: Aspect, call: Call, reply: Reply) -> dict[str, object]:
        return {
            "judge": self.name,
            "id": answer.question.id,
            "sample": answer.sample,
            "aspect": aspect,
            **({"begun": call.begun} if call.begun else {}),
            "reply": asdict(reply),
        }

    def _estimate(self, calls: int, recorded: int, tokens: int) -> Estimate:
        price = self.spending.price
        return Estimate(calls, recorded, tokens, None if price is None else price.of(tokens, calls))

    def _raise_if_none(self, keys: Sequence[tuple[str, ...]], judgements: Sequence[Judgement]) -> None:
        asked = [said for pair, said in zip(keys, judgements, strict=True) if pair]
        if asked and all(said.missing for said in asked):
            raise JudgeError(
                f"the judge {self.name!r} judged none of {len(asked)} answers ({asked[0].note})",
                fix="it must reply with a number from 0 to 100; judge.jsonl has what it said instead",
            )


class _Counter:
    """Tells how many answers have all of their prompts settled; from any thread."""

    def __init__(
        self, keys: Sequence[tuple[str, ...]], settled: Collection[str], progress: Progress | None
    ) -> None:
        self._progress = progress
        self._total = len(keys)
        self._lock = threading.Lock()
        self._waiting = [len({key for key in pair if key not in settled}) for pair in keys]
        self._of_key: defaultdict[str, list[int]] = defaultdict(list)
        for i, pair in enumerate(keys):
            for key in set(pair):
                self._of_key[key].append(i)
        self.done = self._waiting.count(0)
        self._tell()

    def add(self, key: str) -> None:
        with self._lock:
            for i in self._of_key[key]:
                self._waiting[i] -= 1
                self.done += self._waiting[i] == 0
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.done, self._total)


def _judgement(readings: Sequence[Reading]) -> Judgement:
    """What the replies to one answer's prompts come to; no prompts (a skill answer), no judgement."""
    if not readings:
        return Judgement()
    aligned, coherent = readings  # in the order of ASPECTS
    notes = [f"{aspect}: {one.note}" for aspect, one in zip(ASPECTS, readings, strict=True) if one.note]
    if coherent.label is not None:
        notes.append(f"coherent: {coherent.label} is no number")
    how = sorted({one.scored_by for one in readings if one.scored_by is not None})
    return Judgement(
        aligned=aligned.score,
        coherent=coherent.score,
        label=aligned.label,
        note="; ".join(notes) or None,
        scored_by=" and ".join(how) or None,
    )
