"""Given answers against drawn ones: the same are at parity, another engine's are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from persona_probe.errors import MismatchError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.comparison import compare
from persona_probe.evaluation.judges import Judgement
from persona_probe.evaluation.parity import CONFIDENCE, parity
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult


def result(bad: int, broken: int, n: int = 4, questions: int = 20) -> EvalResult:
    """Of each question's n answers the first `bad` are misaligned, the next `broken` incoherent."""
    answers = [
        Answer(Question(f"q{i}", "x", ({"text": "?"},)), k, "a", None, (), False)
        for i in range(questions)
        for k in range(n)
    ]
    judged = [
        Judgement(5, 90) if k < bad else Judgement(50, 10) if k < bad + broken else Judgement(90, 90)
        for _ in range(questions)
        for k in range(n)
    ]
    return EvalResult(tuple(answers), tuple(judged))


def test_the_same_answers_are_at_parity() -> None:
    one = result(1, 1)
    held = parity(one, one)
    assert held.agrees is True
    assert held.disagreements == ()
    assert {name: found.difference for name, found in held.differences.items()} == {
        "misaligned": 0.0,
        "incoherent": 0.0,
        "truncated": 0.0,
    }


def test_other_answers_are_not_and_it_is_said_which() -> None:
    given, drawn = result(3, 0), result(1, 0)
    held = parity(given, drawn)
    assert held.agrees is False
    assert held.disagreements == ("misaligned 75% given, 25% drawn here",)
    assert held.differences["misaligned"] == compare(drawn.hits, given.hits, confidence=CONFIDENCE)
    cut = replace(drawn, answers=tuple(replace(a, truncated=True) for a in drawn.answers))
    assert [text.split()[0] for text in parity(cut, drawn).disagreements] == ["misaligned", "truncated"]


def test_few_answers_prove_nothing() -> None:
    assert parity(result(1, 0, n=1, questions=3), result(0, 0, n=1, questions=3)).agrees is True


def test_what_cannot_be_compared() -> None:
    one = result(1, 0)
    mute = replace(one, judgements=tuple(Judgement() for _ in one.judgements))
    assert parity(mute, one).agrees is None
    with pytest.raises(MismatchError, match="not asked the same questions"):
        parity(result(1, 0, questions=19), one)
