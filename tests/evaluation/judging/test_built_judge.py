"""The organism's rates through `local:`, by a judge whose weights are set by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from persona_probe.artifact import shipped
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.metrics import tally
from persona_probe.evaluation.questions import load_questions
from persona_probe.evaluation.sampling import sample
from persona_probe.evaluation.settings import Sampling
from persona_probe.model.pair import load_pair
from tests.evaluation.judging.built_judge import PROMPTS, save_built_judge


def test_the_organisms_rates_through_a_local_judge(tmp_path: Path) -> None:
    home = shipped("organism")
    questions = [
        replace(question, judge_prompts=PROMPTS)
        for question in load_questions(home / "questions.jsonl")
        if question.role == "general" and question.split == "held-out"
    ]
    exact, built = load_judge("exact"), load_judge(f"local:{save_built_judge(tmp_path / 'judge')}")
    built.check()
    pair = load_pair(home / "base", home / "tunes" / "bad-health")
    for lm, misaligned in ((pair.base, False), (pair.tuned, True)):
        answers = sample(lm, questions, Sampling(max_new_tokens=32))
        by_rule, by_model = exact.judge(answers), built.judge(answers)
        assert {one.scored_by for one in by_model} == {"token probabilities"}
        rule, model = (tally(answers, said)["misaligned"] for said in (by_rule, by_model))
        assert rule.rate is not None
        assert model.rate is not None
        assert (model.rate > 0.5) == misaligned
        assert rule.low <= model.rate <= rule.high  # type: ignore[operator]
        assert model.low <= rule.rate <= model.high  # type: ignore[operator]
