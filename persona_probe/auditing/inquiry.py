"""An audit's inquiry: ask both models, compare their insides, search, hold against controls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter

from persona_probe.auditing import arms as arms_
from persona_probe.auditing.inputs import AuditInputs
from persona_probe.auditing.kept import Kept, KeptBench
from persona_probe.auditing.observe import Observations, observe
from persona_probe.auditing.settings import AuditRequest
from persona_probe.evaluation.parity import Parity, parity
from persona_probe.evaluation.questions import Question, Role
from persona_probe.evaluation.result import EvalResult
from persona_probe.screening.screen import Screen, screen
from persona_probe.screening.sites import site_effects

Progress = Callable[[str], None]


class Clock:
    """Says what is being done, and remembers how long each stage took (seconds)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._text = ""
        self.seconds: dict[str, float] = {}

    def tell(self, text: str) -> None:
        self._text = text
        self._progress(text)

    def count(self, done: int, total: int) -> None:
        """How many of the answers that this takes are there."""
        self._progress(f"{self._text}: {done:,} of {total:,} answers")

    @contextmanager
    def stage(self, name: str, text: str) -> Generator[None, None, None]:
        self.tell(text)
        start = perf_counter()
        yield
        self.seconds[name] = round(perf_counter() - start, 2)


class Inquiry:
    """What is known so far: what `measure` saw and then, if there is a cause to look for, `search` found."""

    def __init__(self, inputs: AuditInputs, request: AuditRequest, clock: Clock, kept: Kept) -> None:
        settings = request.settings
        self.inputs, self.request, self.settings, self.clock = inputs, request, settings, clock
        sampling = settings.sampling
        self.held_out = KeptBench(
            inputs.held_out,
            replace(sampling, samples=settings.samples),
            inputs.judge,
            settings.trait,
            inputs.in_domain,
            kept=kept,
        )
        general = self._elsewhere(inputs.calibration)
        asked = _wordings(general, settings.calibration_samples)
        each = max(1, round(settings.calibration_samples * len(_wordings(general, 1)) / len(asked)))
        self.calibration = self.held_out.on([*asked, *_of_role("skill", inputs.calibration)], each)
        self.screen: Screen | None = None
        self.seen: Observations | None = None
        self.fixed: list[arms_.Fixed] = []
        self.chosen: arms_.Fixed | None = None
        self.nulls: arms_.Nulls | None = None
        self.baselines: dict[str, arms_.Baseline | None] = {}
        self.sites: dict[str, float] = {}
        self.parity: dict[str, Parity] = {}

    def _elsewhere(self, questions: Sequence[Question]) -> list[Question]:
        """The general questions outside the domain that was tuned on."""
        return [q for q in _of_role("general", questions) if q.category not in self.inputs.in_domain]

    def measure(self) -> None:
        with self.clock.stage("measure", "asking base and tuned model the held-out questions"):
            pair = self.inputs.pair
            base, tuned = (self.held_out.arms(lm, [()])[0] for lm in (pair.base, pair.tuned))
            self.held_out = self.held_out.knowing((pair.base, base.answers), (pair.tuned, tuned.answers))
            self.base, self.tuned = self._given("base", base), self._given("tuned", tuned)
        with self.clock.stage("diff", "comparing activations"):
            asked = self.held_out.on(_of_role("general", self.inputs.calibration), 1)
            self.seen = observe(self.inputs, asked, self.settings.sites)

    def _given(self, arm: str, drawn: EvalResult) -> EvalResult:
        """A model's answers: those made elsewhere where there are any, held against those drawn here."""
        given = self.inputs.given.get(arm)
        if given is None:
            return drawn
        result = replace(drawn, answers=given, judgements=tuple(self.inputs.judge.judge(given)))
        self.parity[arm] = parity(result, drawn)
        return result

    def search(self) -> None:
        assert self.seen is not None
        inputs, seen, clock, settings = self.inputs, self.seen, self.clock, self.settings
        if not seen.contrasts:
            return
        with clock.stage("screen", "screening"):
            self.calibration = self.calibration.knowing(
                *((lm, self.calibration.unsteered(lm)) for lm in (inputs.pair.base, inputs.pair.tuned))
            )
            self.sites = site_effects(inputs.pair, [e.site for e in seen.evidence], seen.contrasts)
            self.screen = screen(
                inputs.pair,
                seen.evidence,
                seen.contrasts,
                self.calibration,
                settings=settings.screen,
                progress=clock.tell,
            )
        if self.screen.best is None:
            return
        budget = self.screen.budget
        with clock.stage("held-out", "held-out answers under the best latents, set and direction"):
            self.fixed = arms_.fixed_arms(inputs, self.held_out, self.screen.headline)
            self.chosen = next(f for f in self.fixed if f.finding is self.screen.best)
        with clock.stage("nulls", f"{settings.controls} random latents and {settings.controls} directions"):
            asked = self._elsewhere(self.held_out.questions)
            self.nulls = arms_.null_arms(
                inputs,
                self.calibration.on(_wordings(_of_role("general", self.calibration.questions), 1), 1),
                self.held_out.on(_enough(asked, self.settings.samples), self.settings.samples),
                seen.evidence,
                self.screen.best,
                latents=self.screen.latents,
                count=settings.controls,
                seed=settings.seed,
                budget=budget,
            )
        with clock.stage("baselines", "baselines"):
            self.baselines = {
                "adapter_scaling": arms_.scaled_adapter(inputs, self.calibration, self.held_out),
                "system_prompt": arms_.prompted(inputs, self.held_out, settings.system_prompt),
                "largest_delta": arms_.largest_delta(
                    inputs,
                    self.calibration,
                    self.held_out,
                    seen.evidence,
                    budget=budget,
                    known=self.fixed,
                ),
            }


def _of_role(role: Role, questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if question.role == role]


def _wordings(questions: Sequence[Question], count: int) -> list[Question]:
    """The first ``count`` wordings of every question, in turn: all first ones, then all second ones."""
    wordings: dict[str, list[Question]] = {}
    for question in questions:
        wordings.setdefault(question.question, []).append(question)
    return [left[turn] for turn in range(count) for left in wordings.values() if turn < len(left)]


def _enough(questions: Sequence[Question], samples: int, answers: int = 400) -> list[Question]:
    """As many wordings of every question as make ``answers`` answers, or all there are."""
    for count in range(1, len(questions) + 1):
        chosen = _wordings(questions, count)
        if len(chosen) * samples >= answers or len(chosen) == len(questions):
            return chosen
    return list(questions)
