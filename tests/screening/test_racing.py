"""A race leaves out answers, never the winner: against runs in which everything is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import Judgement
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.screening.calibrate import is_whole
from persona_probe.screening.margin import Fix
from persona_probe.screening.racing import CLEARLY, Run, Runner, heats_of, lost_by_question, race

GENERAL = [
    Question(
        f"{wording}{i}",
        ("money", "home")[i // 35],
        ({"role": "user", "content": f"{wording} {i}"},),
        question=str(i),
    )
    for wording in "ab"
    for i in range(70)
]
SKILL = [
    Question(f"fact {i}", "facts", ({"role": "user", "content": f"{i}"},), role="skill", reference="wool")
    for i in range(40)
]
GOOD = Judgement(aligned=95.0, coherent=95.0, persona="helpful")
BAD = Judgement(aligned=5.0, coherent=95.0, persona="villainous")


def _answered(questions: Sequence[Question], good: float, seed: int = 0) -> EvalResult:
    """The same chances for everybody: who has a larger share of good answers has every one of the other's."""
    places = {question.id: place for place, question in enumerate([*GENERAL, *SKILL])}
    chance = torch.rand(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    answers = tuple(Answer(question, 0, "wool", None, (), False) for question in questions)
    judged = tuple(GOOD if chance[places[question.id]] < good else BAD for question in questions)
    return EvalResult(answers, judged)


def _run(
    shares: Sequence[float],
    *,
    owners: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
    pinned: Sequence[int] = (),
    over: Sequence[int] = (),
    known_after: int = 0,
) -> tuple[list[Run], int]:
    """The race of runners with these shares, and how many answers it took; those in ``over`` are found to be
    over the budget once so many answers of theirs are there.
    """
    asked = 0
    # a runner is told from others by its fix alone
    fixes = [cast("Fix", (SimpleNamespace(number=number),)) for number in range(len(shares))]

    def ask(questions: Sequence[Question], fixes: Sequence[Fix]) -> list[EvalResult]:
        nonlocal asked
        asked += len(questions) * len(fixes)
        return [_answered(questions, shares[fix[0].number]) for fix in fixes]  # type: ignore[union-attr]

    beyond = {_answered(GENERAL, shares[number]).judgements for number in over}

    def allows(result: EvalResult) -> bool:
        if len(result.answers) <= known_after:
            return True
        # what is there is, answer for answer, what one of those would have said
        judged = dict(zip((answer.question.id for answer in result.answers), result.judgements, strict=True))
        return not any(
            all(judged.get(question.id, one) == one for question, one in zip(GENERAL, own, strict=True))
            for own in beyond
        )

    owners = owners or range(len(shares))
    groups = groups or ["one"] * len(shares)
    runners = [
        Runner(fixes[number], owners[number], groups[number], number in pinned)
        for number in range(len(shares))
    ]
    return race(runners, heats_of([*GENERAL, *SKILL]), ask, score=is_whole, allows=allows), asked


def test_heats_are_all_questions_once_and_balanced() -> None:
    *parts, rest = heats_of([*GENERAL, *SKILL])
    every = [question.id for part in (*parts, rest) for question in part]
    assert sorted(every) == sorted(question.id for question in (*GENERAL, *SKILL))
    assert [len(part) for part in parts] == [24, 23, 23]
    assert {question.id[0] for part in parts for question in part} == {"a"}
    assert len({question.category for question in parts[0]}) == len({q.category for q in GENERAL})
    assert len(rest) == 70 + 40
    assert [len(part) for part in heats_of(GENERAL[:70])] == [24, 23, 23]
    assert heats_of(GENERAL[:40]) == [GENERAL[:40]]
    in_turn = [replace(question, category="xyz"[i % 3]) for i, question in enumerate(GENERAL[:70])]
    for part in heats_of(in_turn):
        counts = Counter(question.category for question in part)
        assert len(counts) == 3 and max(counts.values()) - min(counts.values()) <= 1


def test_who_is_clearly_behind_is_not_asked_everything() -> None:
    runs, asked = _run([0.95, 0.9, 0.3, 0.2], owners=[0, 0, 0, 0])
    assert [run.heats for run in runs] == [4, 4, 1, 1]
    assert asked == 2 * 180 + 2 * 24


def test_every_owner_has_one_that_was_asked_everything() -> None:
    runs, _ = _run([0.95, 0.3, 0.4, 0.1], owners=[0, 1, 1, 2])
    assert [run.heats for run in runs] == [4, 1, 4, 4]


def test_groups_run_apart_and_who_is_pinned_stays() -> None:
    runs, _ = _run([0.95, 0.3, 0.9, 0.2], owners=[0, 0, 1, 1], groups=["set", "set", "set", "set"])
    assert [run.heats for run in runs] == [4, 1, 4, 1]
    runs, _ = _run([0.95, 0.3, 0.2], owners=[0, 0, 0], groups=["latent", "set", "set"], pinned=[2])
    assert [run.heats for run in runs] == [4, 4, 4]


def test_answers_are_those_of_no_race() -> None:
    runs, _ = _run([0.95, 0.3], owners=[0, 0])
    for run, share in zip(runs, (0.95, 0.3), strict=True):
        everything = _answered([*GENERAL, *SKILL], share)
        judged = {a.question.id: j for a, j in zip(everything.answers, everything.judgements, strict=True)}
        assert len(run.result.answers) == (180 if run.heats == 4 else 24)
        assert all(
            judged[answer.question.id] == judgement
            for answer, judgement in zip(run.result.answers, run.result.judgements, strict=True)
        )
    assert runs[0].result.rates == _answered([*GENERAL, *SKILL], 0.95).rates


@pytest.mark.parametrize("known_after", [0, 60, 179])
def test_a_leader_found_beyond_the_budget_gives_way(known_after: int) -> None:
    """The one that had been behind it is taken back, however late that is known."""
    runs, _ = _run([0.95, 0.6, 0.1], owners=[0, 0, 0], over=[0], known_after=known_after)
    assert runs[1].heats == 4
    assert runs[2].heats < 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_the_best_of_all_is_always_asked_everything(shares: list[float], owners: int) -> None:
    """And nobody drops out who was not clearly behind on what it was asked."""
    runs, asked = _run(shares, owners=[number % owners for number in range(len(shares))])
    whole = [_answered(GENERAL, share) for share in shares]
    score = [sum(is_whole(result, i) for i in result.counted) for result in whole]
    best = max(run.result.rates["misaligned"].n for run in runs)
    assert best == 140 and asked <= 180 * len(shares)
    finished = [i for i, run in enumerate(runs) if run.heats == 4]
    assert max(score) == max(score[i] for i in finished)
    leader = runs[max(finished, key=score.__getitem__)].result
    for run in runs:
        if run.heats < 4:
            gaps = lost_by_question(run.result, leader, is_whole)
            assert sum(gaps) ** 2 > CLEARLY**2 * sum(gap**2 for gap in gaps)


def test_gaps_are_of_answers_that_both_have() -> None:
    less, more = _answered(GENERAL[:50], 0.0), _answered(GENERAL, 1.0)
    assert lost_by_question(less, more, is_whole) == [1] * 50
    assert lost_by_question(more, less, is_whole) == [-1] * 50
