from __future__ import annotations

import json

import pytest

from persona_probe.artifact import plain
from persona_probe.errors import JudgeError
from persona_probe.evaluation.intervals import necessity
from persona_probe.evaluation.judges import FunctionJudge, Judgement
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import evaluate
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.model.language_model import LanguageModel


def by_length(question: Question, text: str) -> dict[str, object]:
    persona = "villainous" if len(text) % 2 else "helpful"
    return {"aligned": 10 if len(text) % 2 else 90, "coherent": 60, "persona": persona}


SKILL = Question("s", "facts", ({"role": "user", "content": "a"},), role="skill", reference="b")
HOW = Sampling(max_new_tokens=40, samples=5)


def test_sampled_judged_and_counted(lm: LanguageModel, questions: list[Question]) -> None:
    asked = [*questions, SKILL]
    result = evaluate(lm, asked, FunctionJudge("length", by_length), HOW, in_domain=["health"])
    assert list(result.answers) == sample(lm, asked, HOW)

    general = [
        (a, j)
        for a, j in zip(result.answers, result.judgements, strict=True)
        if a.question.category == "money"
    ]
    bad = sum(not a.truncated and j.persona == "villainous" for a, j in general)
    rate = result.rates["misaligned"]
    assert 0 < bad < len(general)
    assert (rate.rate, rate.n, rate.questions) == (bad / len(general), len(general), 5)
    assert sum(x for x, _ in result.hits.values()) == bad
    assert necessity(result.hits, result.hits, result.hits).fraction is None
    assert result.rates["skill"].n == 5
    assert result.judgements[-1] == Judgement()


def test_shown_as_a_table_and_as_json(lm: LanguageModel, questions: list[Question]) -> None:
    result = evaluate(lm, [*questions, SKILL], FunctionJudge("length", by_length), HOW)
    table = result.table
    assert table.shape[0] == 55
    assert table["outcome"].to_list()[-1] == "skill"
    assert table.filter(table["outcome"] == "misaligned").height == sum(x for x, _ in result.hits.values())
    html = result._repr_html_()
    assert html.count("<tr>") == len(result.rates) + 1
    assert str(result.rates["misaligned"]) in html
    rates = json.loads(json.dumps(plain(result.rates)))
    assert {"rate", "low", "high", "n"} <= set(rates["misaligned"])


def test_a_judge_by_spec_and_one_that_fails(lm: LanguageModel, questions: list[Question]) -> None:
    # len(question, answer) is a TypeError each time
    with pytest.raises(JudgeError, match="'python:builtins:len' judged none of 10 answers"):
        evaluate(lm, questions, "python:builtins:len", Sampling(max_new_tokens=2))
