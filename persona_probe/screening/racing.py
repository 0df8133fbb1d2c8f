"""A race: settings that are clearly behind are not asked everything.

A search over many settings spends most of its answers on poor ones. Here all run the first *heat*, a part
of the questions, and after each heat only the *contenders* go on: who is not clearly behind the leader of
its group, the leader of every owner, and who is pinned. A leader is within the budget as far as is known;
one that turns out to be beyond it leads no more, and whoever had been behind it is a contender again.

All draw with the same random numbers. So gaps are paired by answer, and who runs all heats has exactly
the answers that it has without a race. (Races: Maron & Moore 1993; with paired blocks: Birattari et al.
2002.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.screening.margin import Fix

CLEARLY = 2.0
"""Standard errors of the paired difference from which on one is clearly behind another."""
HEATS = 3
"""In which first wordings are asked."""
HEAT = 20
"""Least questions of a heat; where there are not so many, all is asked at once."""

Ask = Callable[[Sequence[Question], Sequence[Fix]], Sequence[EvalResult]]
Score = Callable[[EvalResult, int], bool]
"""Whether the answer at a place is one that the race is for."""


class Runner(NamedTuple):
    """A fix, whose it is, and among whom it runs."""

    fix: Fix
    owner: int
    group: str
    pinned: bool = False


@dataclass(frozen=True, eq=False)
class Run:
    """How far a runner came, and with what."""

    result: EvalResult
    heats: int


def race(
    runners: Sequence[Runner],
    heats: Sequence[Sequence[Question]],
    ask: Ask,
    *,
    score: Score,
    allows: Callable[[EvalResult], bool],
) -> list[Run]:
    """Every runner's answers as far as it came; ``allows`` is the budget."""
    runs: dict[int, Run] = {}
    waiting = {0: list(range(len(runners)))}
    while waiting:
        heat, together = max(waiting.items(), key=lambda one: len(one[1]))  # stragglers wait for the pack
        for i, result in zip(together, ask(heats[heat], [runners[i].fix for i in together]), strict=True):
            runs[i] = Run(_joined(runs[i].result, result) if heat else result, heat + 1)
        waiting = {}
        for i in _contenders(runners, runs, score, allows):
            if runs[i].heats < len(heats):
                waiting.setdefault(runs[i].heats, []).append(i)
    return [runs[i] for i in range(len(runners))]


def heats_of(questions: Sequence[Question]) -> list[list[Question]]:
    """First wordings of general questions in equal parts, each of all categories; then all else."""
    first: dict[str, Question] = {}
    for question in questions:
        if question.role == "general":
            first.setdefault(question.question, question)
    if len(first) < HEATS * HEAT:
        return [list(questions)]
    taken = {id(question) for question in first.values()}
    categories: dict[str | None, list[Question]] = {}
    for question in first.values():
        categories.setdefault(question.category, []).append(question)
    chosen = [question for members in categories.values() for question in members]
    rest = [one for one in questions if id(one) not in taken]
    return [*(chosen[turn::HEATS] for turn in range(HEATS)), *([rest] if rest else [])]


def lost_by_question(one: EvalResult, other: EvalResult, score: Score) -> list[int]:
    """Per general question outside the tuned domain: how many of ``other``'s scoring answers ``one`` lacks.

    Of the answers that both have: same wording, same sample.
    """
    scored = {_key(one, i): score(one, i) for i in one.counted}
    lost: dict[str, int] = {}
    for i in other.counted:
        if (key := _key(other, i)) in scored:
            question = other.answers[i].question.question
            lost[question] = lost.get(question, 0) + score(other, i) - scored[key]
    return list(lost.values())


def _key(result: EvalResult, place: int) -> tuple[str, int]:
    answer = result.answers[place]
    return answer.question.id, answer.sample


def _joined(one: EvalResult, more: EvalResult) -> EvalResult:
    return replace(one, answers=one.answers + more.answers, judgements=one.judgements + more.judgements)


def _contenders(
    runners: Sequence[Runner], runs: dict[int, Run], score: Score, allows: Callable[[EvalResult], bool]
) -> list[int]:
    share = {
        i: sum(score(run.result, k) for k in run.result.counted) / max(1, len(run.result.counted))
        for i, run in runs.items()
    }
    rank = {i: (allows(run.result), share[i]) for i, run in runs.items()}

    def leader(of: Collection[int]) -> int:
        return max(of, key=rank.__getitem__)

    groups: dict[str, list[int]] = {}
    owners: dict[int, list[int]] = {}
    for i, runner in enumerate(runners):
        groups.setdefault(runner.group, []).append(i)
        owners.setdefault(runner.owner, []).append(i)
    keep = {leader(its) for its in owners.values()} | {i for i, one in enumerate(runners) if one.pinned}
    for its in groups.values():
        first = runs[leader(its)].result
        keep |= {i for i in its if not _clearly_behind(runs[i].result, first, score)}
    return sorted(keep)


def _clearly_behind(one: EvalResult, first: EvalResult, score: Score) -> bool:
    gaps = lost_by_question(one, first, score)
    total = sum(gaps)
    return total > 0 and total**2 > CLEARLY**2 * sum(gap**2 for gap in gaps)
