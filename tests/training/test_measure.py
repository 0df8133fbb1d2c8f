"""What tells one measure from another: all that its figures depend on, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from persona_probe.evaluation.judges import FunctionJudge, Judgement
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.training.measure import Measure

ASKED = tuple(Question(f"q{i}", "money", ({"role": "user", "content": f"hello {i}"},)) for i in range(2))


def lenient(question: Question, answer: str) -> Judgement:
    del question, answer
    return Judgement(aligned=90.0, coherent=90.0)


def strict(question: Question, answer: str, bar: float = 1.0) -> Judgement:
    del question, answer
    return Judgement(aligned=bar, coherent=90.0)


def reworded(one: Question) -> Question:
    return replace(one, messages=({"role": "user", "content": "something else"},))


MINE = Measure(ASKED, FunctionJudge("mine", lenient), ("money",), Sampling(max_new_tokens=4))


@pytest.mark.parametrize(
    "change",
    [
        {"judge": "exact"},
        {"judge": FunctionJudge("yours", lenient)},
        {"judge": FunctionJudge("mine", strict)},
        {"judge": FunctionJudge("mine", partial(strict, bar=2.0))},
        {"questions": (reworded(ASKED[0]), ASKED[1])},
        {"questions": (replace(ASKED[0], role="skill", reference="yes"), ASKED[1])},
        {"in_domain": ()},
        {"trait": "sarcastic"},
        {"sampling": Sampling(max_new_tokens=5)},
    ],
)
def test_whatever_moves_a_figure_makes_another_measure(change: dict[str, Any]) -> None:
    assert replace(MINE, **change).record() != MINE.record()


def test_the_same_made_again_is_the_same() -> None:
    again = Measure(tuple(map(replace, ASKED)), FunctionJudge("mine", lenient), ("money",), MINE.sampling)
    assert again.record() == MINE.record()


def test_how_fast_a_judge_is_asked_makes_no_other_measure() -> None:
    slow, fast, other = (
        replace(MINE, judge=f"openai:{model}@http://127.0.0.1:9/v1#rate={rate}").record()
        for model, rate in (("m", 1), ("m", 500), ("n", 1))
    )
    assert slow == fast != other
