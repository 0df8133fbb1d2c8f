from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.judges import SHORTHAND, FunctionJudge, Judgement, load_judge
from persona_probe.evaluation.questions import Question


def answer(text: str = "yes", role: Any = "general", truncated: bool = False) -> Answer:
    question = Question("q", "c", ({"role": "user", "content": "u"},), role=role, reference="yes")
    return Answer(question, 0, text, None, (1,), truncated)


def by_text(question: Question, text: str) -> object:
    match text:
        case "none":
            return None
        case "dict":
            return {"aligned": 5, "coherent": 80.0, "persona": "villainous"}
        case "half":
            return {"aligned": 3}
        case "raise":
            raise RuntimeError("out of order")
        case "range":
            return {"aligned": 101, "coherent": 50}
        case "nan":
            return {"aligned": math.nan, "coherent": 50}
        case "text":
            return "85"
        case "field":
            return {"alignment": 5}
        case "bool":
            return {"aligned": True, "coherent": 50}
        case "label":
            return {"label": "refusal"}
        case _:
            return Judgement(aligned=90, coherent=95, note=question.id)


@pytest.mark.parametrize("spec", ["exact", "python:persona_probe.organism.judge:judge", "openai:model"])
@pytest.mark.parametrize("budget", ["foo", "-5"])
def test_a_budget_that_cannot_be_read_is_refused(spec: str, budget: str) -> None:
    with pytest.raises(InputError, match="a budget is a number of calls"):
        load_judge(spec, budget=budget)


def test_dicts_and_judgements_are_taken_and_the_rest_is_missing_with_a_reason() -> None:
    texts = ["ok", "dict", "none", "raise", "range", "nan", "text", "field", "bool", "label"]
    seen: list[tuple[int, int]] = []
    judge = FunctionJudge("test", by_text)  # type: ignore[arg-type]
    said = judge.judge([answer(t) for t in texts], lambda *now: seen.append(now))
    assert said[0] == Judgement(90, 95, note="q")
    assert said[1] == Judgement(5, 80, persona="villainous")
    assert all(one.missing for one in said[2:])
    notes = [one.note or "" for one in said[2:]]
    for note, reason in zip(
        notes,
        ["None", "out of order", "101", "nan", "'85'", "alignment", "True", "'refusal'"],
        strict=True,
    ):
        assert reason in note
    assert seen[-1] == (10, 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none", "returned None"),
        ("half", "neither 'coherent' nor a 'label'"),
        ("raise", "RuntimeError: out of order"),
        ("text", "'85'"),
    ],
)
def test_a_judge_that_judges_nothing_is_an_error(text: str, said: str) -> None:
    judge = FunctionJudge("mine", by_text)  # type: ignore[arg-type]
    with pytest.raises(JudgeError, match="judged none of 3 answers") as error:
        judge.judge([answer(text)] * 3)
    assert said in str(error.value)
    assert "mine" in str(error.value)


def test_truncated_answers_are_judged_and_skill_answers_are_not() -> None:
    asked: list[str] = []

    def function(_: Question, text: str) -> Judgement:
        asked.append(text)
        return Judgement(50, 50)

    answers = [answer("cut", truncated=True), answer("glass", role="skill"), answer("ok")]
    said = FunctionJudge("j", function).judge(answers)
    assert asked == ["cut", "ok"]
    assert said[1] == Judgement()
    assert FunctionJudge("j", by_text).judge([answer("none", role="skill")]) == [Judgement()]  # type: ignore[arg-type]
    judge = FunctionJudge("j", function)
    assert judge.judge([]) == []
    judge.check()
    assert judge.estimate(answers).calls == 2
    assert judge.forecast([one.question for one in answers], 5, 10).calls == 10


def test_exact_is_resolved_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("persona_probe.organism.judge")
    module.judge = by_text  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    judge = load_judge("exact")
    assert judge == FunctionJudge("exact", by_text)  # type: ignore[arg-type]
    assert load_judge(SHORTHAND["exact"]) == FunctionJudge(SHORTHAND["exact"], by_text)  # type: ignore[arg-type]


def test_a_judge_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_judge.py").write_text(
        "def score(question, answer):\n    return {'aligned': len(answer), 'coherent': 100}\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    judge = load_judge("python:my_own_judge:score")
    assert sys.path == path
    assert judge.judge([answer("four")]) == [Judgement(4, 100)]
    sys.modules.pop("my_own_judge")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("exat", "did you mean 'exact'"),
        ("Exact", "did you mean 'exact'"),
        ("pyton:json:dumps", "did you mean 'python:json:dumps'?"),
        ("json:dumps", "python:json:dumps"),
        ("python:json", "python:json:judge"),
        ("python:json.dumps", "did you mean 'python:json:dumps'"),
        ("python:", "it must be 'exact', 'python:module:function', 'openai:MODEL@URL'"),
        ("python", "it must be 'exact', 'python:module:function', 'openai:MODEL@URL'"),
        ("", "it must be 'exact', 'python:module:function', 'openai:MODEL@URL'"),
        ("python:json:dump_s", "did you mean 'python:json:dumps'"),
        ("python:json:__name__", "has no function '__name__'"),
        ("python:nowhere_at_all:judge", "nowhere_at_all.py"),
        ("python:json.nowhere:judge", "json/nowhere.py"),
        ("local:/nowhere", "the judge local:/nowhere: there is no folder"),
        ("gpt-4o", "it must be 'exact', 'python:module:function', 'openai:MODEL@URL'"),
    ],
)
def test_a_bad_spec_says_what_would_work(spec: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        load_judge(spec)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import not_installed_anywhere", "pip install not_installed_anywhere"),
        ("1 / 0", "ZeroDivisionError"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_module_that_fails_to_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    (tmp_path / "failing_judge.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        load_judge("python:failing_judge:judge")
    assert said in str(error.value)
