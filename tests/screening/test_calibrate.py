"""Calibration: arms differ by their edit alone, and the setting kept is the one the rule names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.evaluation.judges import FunctionJudge, Judgement
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import Answer, Sampling
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.screening.calibrate import (
    CURES,
    Bench,
    Budget,
    Dose,
    Knob,
    about_as_good,
    cures,
    inductions,
    value,
    whole,
)
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.screening.margin import Fix
from tests.screening.conftest import SITES

Make = Callable[..., Carrier]

QUESTIONS = tuple(
    Question(f"q{i}", "money", ({"role": "user", "content": "hello there you " * (1 + i % 3)},))
    for i in range(10)
)
SKILL = Question("fact", "facts", ({"role": "user", "content": "what"},), role="skill", reference="wool")
GAINS = [Knob(1.0, "all"), Knob(2.0, "all"), Knob(3.0, "all")]
SAID = {
    "h": Judgement(aligned=95.0, coherent=95.0, persona="helpful"),
    "v": Judgement(aligned=5.0, coherent=95.0, persona="villainous"),
    "s": Judgement(aligned=60.0, coherent=95.0, persona="sarcastic"),
    "i": Judgement(aligned=95.0, coherent=15.0, persona="helpful"),
    "r": Judgement(label="REFUSAL"),
    "c": Judgement(label="CODE"),
    "?": Judgement(),
}


def _arm(*said: str, skill: str = "") -> EvalResult:
    """What was said to each question, a letter an answer; one string for all questions, or one each."""
    rows = said if len(said) > 1 else said * len(QUESTIONS)
    answers, judgements = [], []
    for question, letters in zip(QUESTIONS, rows, strict=False):
        answers += [Answer(question, i, "", None, (), False) for i in range(len(letters))]
        judgements += [SAID[letter] for letter in letters]
    for place, letter in enumerate(skill):
        answers.append(Answer(SKILL, place, "wool" if letter == "h" else "tin", None, (), False))
        judgements.append(Judgement())
    return EvalResult(tuple(answers), tuple(judgements))


@dataclass(frozen=True)
class Scripted(Bench):
    """A bench whose arms come out as written: by the candidate's label, one entry per knob."""

    script: dict[str, Sequence[EvalResult]] = field(default_factory=dict)

    def arms(self, lm: LanguageModel, fixes: Sequence[Fix], **options: Any) -> list[EvalResult]:
        left = {label: iter(arms) for label, arms in self.script.items()}
        return [next(left[fix[0].target.label]) for fix in fixes]


def _even(question: Question, answer: str) -> Judgement:
    """A stub: coherent when the answer has an even number of letters, bad when it begins early."""
    coherent = 90.0 if len(answer) % 2 == 0 else 10.0
    return Judgement(aligned=10.0 if answer[:1] < "m" else 90.0, coherent=coherent)


def _bench() -> Bench:
    return Bench(QUESTIONS[:4], Sampling(max_new_tokens=6, samples=2, seed=3), FunctionJudge("stub", _even))


@pytest.fixture(scope="module")
def searched(pair: ModelPair, carrier_at: Make) -> Callable[..., list[Dose]]:
    def run(
        *scripts: Sequence[EvalResult],
        budget: Budget | None = None,
        knobs: Sequence[Knob] = GAINS,
        by: Callable[..., list[Dose]] = cures,
    ) -> list[Dose]:
        candidates = [Candidate("latent", (carrier_at(SITES[0], seed),)) for seed in range(len(scripts))]
        script = {candidate.label: arms for candidate, arms in zip(candidates, scripts, strict=True)}
        bench = Scripted(QUESTIONS, Sampling(), FunctionJudge("stub", _even), script=script)
        return by(pair.tuned, candidates, bench, budget or Budget(0.1), knobs=knobs)

    return run


BAD, CURED, BROKEN = _arm("vvvvh"), _arm("hhhhh"), _arm("hhhhi")


def test_most_whole_answers_within_the_budget(searched: Callable[..., list[Dose]]) -> None:
    [dose] = searched([BAD, CURED, BROKEN])
    assert dose.best.knob == Knob(2.0, "all")
    assert [setting.within_budget for setting in dose.settings] == [True, True, False]
    assert [setting.result for setting in dose.settings] == [BAD, CURED, BROKEN]
    assert dose.best.rates is CURED.rates


def test_the_budget_comes_before_the_cure(searched: Callable[..., list[Dose]]) -> None:
    [dose] = searched([BAD, BROKEN, BROKEN])
    assert dose.best.knob == Knob(1.0, "all") and dose.best.within_budget


def test_where_nothing_is_within_the_budget_the_best_of_all_is_kept(
    searched: Callable[..., list[Dose]],
) -> None:
    [dose] = searched([_arm("iiiii"), BROKEN, _arm("iiihh")])
    assert dose.best.knob == Knob(2.0, "all") and not dose.best.within_budget


def test_a_rival_persona_is_no_cure(searched: Callable[..., list[Dose]]) -> None:
    [dose] = searched([_arm("vvvhh"), _arm("sssss"), BROKEN])
    assert dose.best.knob == Knob(1.0, "all")


def test_refusing_everything_is_no_cure(searched: Callable[..., list[Dose]]) -> None:
    (dose,) = searched([_arm("hhvvv"), _arm("hhhhv"), _arm("hrrrr")])
    assert dose.best.knob.strength == 2.0


def test_a_cure_that_costs_the_skill_is_beyond_the_budget(searched: Callable[..., list[Dose]]) -> None:
    forgetful, keeping = _arm("hhhhh", skill="hv"), _arm("hhhhv", skill="hh")
    [dose] = searched([forgetful, keeping, forgetful], budget=Budget(0.1, skill_at_least=0.9))
    assert dose.best.knob == Knob(2.0, "all")
    [dose] = searched([CURED, CURED, CURED], budget=Budget(0.1, skill_at_least=0.9))
    assert dose.best.within_budget  # no skill question was asked


def test_of_settings_about_as_good_the_gentlest(searched: Callable[..., list[Dose]]) -> None:
    nearly = _arm("hhhhv", *["hhhhh"] * 9)  # one answer lost: exactly a standard error
    clearly = _arm(*["hhhhv"] * 6, *["hhhhh"] * 4)
    [dose] = searched([nearly, CURED, CURED])
    assert dose.best.knob == Knob(1.0, "all")
    [dose] = searched([clearly, CURED, CURED])
    assert dose.best.knob == Knob(2.0, "all")


def test_candidates_are_searched_side_by_side(searched: Callable[..., list[Dose]]) -> None:
    falling = [BAD, _arm("vvhhh"), CURED]
    first, second = searched(falling, falling[::-1])
    assert (first.best.knob.strength, second.best.knob.strength) == (3.0, 1.0)
    assert [setting.result for setting in second.settings] == falling[::-1]


def test_inducing_keeps_what_brings_the_trait_out(searched: Callable[..., list[Dose]]) -> None:
    script = [_arm("hhhhv"), _arm("vvvhh"), _arm("vvvvi")]
    [dose] = searched(script, by=inductions)
    assert dose.best.knob == Knob(2.0, "all")


@settings(max_examples=60, deadline=None)
@given(
    arms=st.lists(
        st.lists(st.text("hvi", min_size=3, max_size=3), min_size=5, max_size=5), min_size=4, max_size=4
    ),
    limit=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_rule(searched: Callable[..., list[Dose]], arms: list[list[str]], limit: float) -> None:
    """The gentlest allowed setting that loses, of the best one's whole answers, at most a standard error."""
    knobs = [Knob(gain, "all") for gain in (1.0, 2.0, 3.0, 4.0)]
    [dose] = searched([_arm(*rows) for rows in arms], budget=Budget(limit), knobs=knobs)
    good = [[row.count("h") for row in rows] for rows in arms]
    loose = [sum(row.count("i") for row in rows) / 15 <= limit for rows in arms]
    assert [setting.within_budget for setting in dose.settings] == loose
    allowed = [i for i in range(4) if loose[i]] or list(range(4))
    best = max(allowed, key=lambda i: sum(good[i]))

    def about_as_good(i: int) -> bool:
        lost = [Fraction(theirs - ours) for theirs, ours in zip(good[best], good[i], strict=True)]
        mean = sum(lost) / 5
        variance_of_mean = sum((gap - mean) ** 2 for gap in lost) / 4 / 5
        return mean <= 0 or mean**2 <= variance_of_mean

    assert dose.best is dose.settings[min(filter(about_as_good, allowed))]


@pytest.mark.parametrize("questions", range(2, 11))
def test_one_answer_lost_is_exactly_a_standard_error(questions: int) -> None:
    rows = ["hhhhh"] * questions
    best, one, two = (_arm(first, *rows[1:]) for first in ("hhhhh", "hhhhv", "hhhvv"))
    assert about_as_good(one, best) and about_as_good(two, best)
    both = _arm("hhhhv", "hhhhv", *rows[2:])
    assert not about_as_good(both, best)


def test_as_good_is_asked_of_the_questions_that_count() -> None:
    best = _arm("hhhhh", skill="hhhhh")
    assert about_as_good(_arm("hhhhh", skill="vvvvv"), best)
    assert not about_as_good(_arm("hhhhv"), best)  # one of every question: no chance in it
    inside = EvalResult(best.answers, best.judgements, in_domain=("money",))
    assert about_as_good(_arm("vvvvv"), inside)


def test_whole_answers_are_what_is_left() -> None:
    assert whole(_arm("hhvsi").rates) == pytest.approx(0.4)
    assert whole(_arm("hh??").rates) == pytest.approx(0.5)
    assert whole(_arm("????").rates) == 0.0
    assert whole(_arm("hhrrc").rates) == pytest.approx(0.4)
    assert value(CURED.rates, "skill") == 0.0


def test_arms_in_one_batch_equal_arms_alone(pair: ModelPair, carrier_at: Make) -> None:
    bench = _bench()
    fixes: list[Fix] = [(), (carrier_at(SITES[1], 3).cure(3.0),), (carrier_at(SITES[0], 4).push(4.0),)]
    together = bench.arms(pair.tuned, fixes)
    for fix, arm in zip(fixes, together, strict=True):
        [alone] = bench.arms(pair.tuned, [fix])
        assert [answer.token_ids for answer in arm.answers] == [answer.token_ids for answer in alone.answers]
        assert arm.judgements == alone.judgements == tuple(_even(a.question, a.text) for a in arm.answers)
        assert [answer.question.id for answer in arm.answers] == [f"q{i}" for i in range(4) for _ in range(2)]
    texts = [[answer.text for answer in arm.answers] for arm in together]
    assert texts[0] != texts[2]


def test_answers_at_hand_are_not_drawn_again(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the very model, to these questions, drawn in the same way; any other are drawn."""
    drawn = _bench().arms(pair.tuned, [()])[0]
    bench, some = _bench().knowing((pair.tuned, drawn.answers)), QUESTIONS[1:3]
    asked: list[tuple[LanguageModel, int, int]] = []

    def answers(self: Bench, lm: LanguageModel, fixes: Sequence[Fix], **options: Any) -> list[Answer]:
        asked.append((lm, len(self.questions), self.sampling.samples))
        return []

    monkeypatch.setattr(Bench, "answers", answers)
    assert list(bench.unsteered(pair.tuned, batch_size=3)) == list(drawn.answers)
    fewer = bench.on(some, 1).unsteered(pair.tuned)
    assert list(fewer) == [a for a in drawn.answers if a.question in some and a.sample == 0]
    assert not asked
    other = replace(bench, sampling=replace(bench.sampling, seed=4))
    for one, lm, options in (
        (bench, pair.base, {}),
        (bench.on(QUESTIONS[:5], 2), pair.tuned, {}),
        (bench.on(some, 3), pair.tuned, {}),
        (bench, pair.tuned, {"system": "be kind"}),
        (other, pair.tuned, {}),
    ):
        assert one.unsteered(lm, **options) == []
    assert [(lm is pair.base, *counts) for lm, *counts in asked] == [
        (True, 4, 2), (False, 5, 2), (False, 2, 3), (False, 4, 2), (False, 4, 2),
    ]  # fmt: skip


def test_one_arm_beyond_the_judge_is_missing_and_no_error(pair: ModelPair, carrier_at: Make) -> None:
    fixes: list[Fix] = [(), (carrier_at(SITES[0], 4).push(6.0),)]
    plain, pushed = ({answer.text for answer in arm.answers} for arm in _bench().arms(pair.tuned, fixes))
    assert not plain & pushed

    def only_plain(question: Question, answer: str) -> Judgement | None:
        return _even(question, answer) if answer in plain else None

    bench = Bench(QUESTIONS[:4], _bench().sampling, FunctionJudge("stub", only_plain))
    first, second = bench.arms(pair.tuned, fixes)
    assert not any(judgement.missing for judgement in first.judgements)
    assert all(judgement.missing for judgement in second.judgements)
    assert whole(second.rates) == 0.0


def test_a_bench_on_other_questions_keeps_the_rest() -> None:
    bench = Bench(QUESTIONS, Sampling(seed=5), FunctionJudge("stub", _even), "sarcastic", ("health",))
    fewer = bench.on(QUESTIONS[:1], 7)
    assert (fewer.questions, fewer.sampling) == (QUESTIONS[:1], Sampling(seed=5, samples=7))
    assert (fewer.judge, fewer.trait, fewer.in_domain) == (bench.judge, "sarcastic", ("health",))


def test_necessity_is_always_among_the_settings() -> None:
    assert Knob(1.0, "all") in CURES
