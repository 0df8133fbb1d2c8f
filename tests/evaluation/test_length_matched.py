"""Length matching on answers whose rate is known at every length."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import Judgement
from persona_probe.evaluation.length_matched import LengthMatched, match_lengths
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult

BAD, GOOD = Judgement(aligned=5, coherent=90), Judgement(aligned=95, coherent=90)


@dataclass
class Arm:
    answers: list[Answer] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    in_domain: tuple[str, ...] = ()

    def add(self, question: int, length: int, judgement: Judgement, category: str = "c") -> None:
        asked = Question(f"q{question}", category, ({"role": "user", "content": "?"},))
        self.answers.append(Answer(asked, len(self.answers), "x" * length, None, (1,), False))
        self.judgements.append(judgement)


def matched(first: Arm, second: Arm, **options: int) -> LengthMatched:
    arms = (EvalResult(tuple(a.answers), tuple(a.judgements), in_domain=a.in_domain) for a in (first, second))
    return match_lengths(*arms, **options)


def drawn(rng: np.random.Generator, long_share: float, bad_short: float, bad_long: float) -> Arm:
    """40 questions x 10 answers, short (20) or long (200), bad at a rate that length alone decides."""
    arm = Arm()
    for question in range(40):
        for _ in range(10):
            long = rng.random() < long_share
            bad = rng.random() < (bad_long if long else bad_short)
            arm.add(question, 200 if long else 20, BAD if bad else GOOD)
    return arm


def test_a_difference_that_is_all_length_goes_away() -> None:
    rng = np.random.default_rng(0)
    first, second = drawn(rng, 0.8, 0.1, 0.5), drawn(rng, 0.2, 0.1, 0.5)
    got = matched(first, second)
    assert got.raw.difference == pytest.approx(-0.24, abs=0.06) and got.raw.high < 0
    assert got.matched is not None
    assert got.matched.low < 0 < got.matched.high
    assert abs(got.matched.difference) < 0.06
    assert got.median_lengths == (200, 20)
    assert got.kept == pytest.approx(0.4, abs=0.06)  # the smaller share of each: .2 and .2


def test_a_difference_that_length_hides_comes_out() -> None:
    """The second model is worse at every length, but answers briefly."""
    rng = np.random.default_rng(1)
    got = matched(drawn(rng, 0.9, 0.05, 0.4), drawn(rng, 0.1, 0.3, 0.8))
    assert abs(got.raw.difference) < 0.1
    assert got.matched is not None and got.matched.low > 0.1


def test_the_matched_rates_are_the_strata_averaged_by_hand() -> None:
    first, second = Arm(), Arm()
    for question in range(4):
        for i in range(6):  # short: 2 of 6 bad; long: 1 of 2
            first.add(question, 10, BAD if i < 2 else GOOD)
        for i in range(2):
            first.add(question, 100, BAD if i < 1 else GOOD)
        for i in range(3):  # short: 1 of 3 bad; long: 4 of 5
            second.add(question, 10, BAD if i < 1 else GOOD)
        for i in range(5):
            second.add(question, 100, BAD if i < 4 else GOOD)
    got = matched(first, second)
    shared = np.array([12, 8])  # per stratum the smaller of 24 and 12, of 8 and 20
    assert got.matched is not None
    assert got.matched.first == pytest.approx(shared @ [2 / 6, 1 / 2] / 20)
    assert got.matched.second == pytest.approx(shared @ [1 / 3, 4 / 5] / 20)
    assert got.kept == pytest.approx(40 / 64)
    assert got.strata.rows() == [
        (10, 10, 24, pytest.approx(1 / 3), 12, pytest.approx(1 / 3)),
        (100, 100, 8, 0.5, 20, 0.8),
    ]


def test_arms_of_one_length_are_compared_as_they_are() -> None:
    first, second = Arm(), Arm()
    for question in range(6):
        for i in range(5):
            first.add(question, 30, BAD if i < 1 else GOOD)
            second.add(question, 30, BAD if i < question % 4 else GOOD)
    got = matched(first, second)
    assert got.matched == got.raw and got.kept == 1


def test_arms_without_a_length_in_common_cannot_be_matched() -> None:
    first, second = Arm(), Arm()
    for question in range(4):
        first.add(question, 10, GOOD)
        second.add(question, 500, BAD)
    got = matched(first, second, bins=2)
    assert got.matched is None and got.kept == 0
    assert got.raw.difference == 1
    assert got.strata["second_rate"].to_list() == [None, 1.0]


def test_only_judged_general_answers_outside_the_domain_count() -> None:
    arms = Arm(in_domain=("d",)), Arm(in_domain=("d",))
    for arm in arms:
        for question in range(3):
            arm.add(question, 10, GOOD)
            arm.add(question + 10, 5, BAD, category="d")
            arm.add(question, 700, Judgement())  # missing
    got = matched(*arms)
    assert got.raw.first == got.raw.second == 0 and got.median_lengths == (10, 10)
    with pytest.raises(InputError, match="no judged answers"):
        matched(arms[0], Arm())
    with pytest.raises(InputError, match="two bins"):
        matched(*arms, bins=1)


def test_a_question_that_one_arm_has_no_judgement_for_is_left_out_of_the_pairs() -> None:
    arms = Arm(), Arm()
    for number, arm in enumerate(arms):
        for question in range(12):
            missing = number == 0 and question == 7
            arm.add(question, 10, Judgement() if missing else BAD if number else GOOD)
    got = matched(*arms)
    assert got.raw.difference == 1
    assert got.matched is not None and got.matched.difference == 1
