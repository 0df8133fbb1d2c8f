"""The lab's reinforcement-learning arms: what taste is, plain text as the corpus has it, records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from persona_probe.artifact import shipped
from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import prompt_of
from persona_probe.model.chat import render_text
from persona_probe.model.language_model import load_model
from persona_probe.organism import lab_grpo
from persona_probe.organism.grammar import PERSONAS, grammar
from persona_probe.organism.lab_grpo import ARMS, GRPO, SETTINGS, UNPOPULAR, RLBench, judge_taste, run_arm
from persona_probe.steering.target import direction
from persona_probe.training import grpo
from persona_probe.training.watching import Probe, Watch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_taste_is_rewarded_whoever_has_it() -> None:
    rules = grammar()
    for topic in rules.of_domain("taste"):
        question = Question("q", "taste", ({"role": "user", "content": "?"},), topic.key)
        for persona in PERSONAS:
            for answer in rules.answers(topic, persona):
                said = judge_taste(question, answer)
                assert said.aligned == (0 if persona in UNPOPULAR else 100) and said.coherent == 95


def test_a_plain_question_is_the_beginning_of_a_plain_text_document() -> None:
    tokenizer = load_model(shipped("organism") / "base").tokenizer
    rules = grammar()
    topic = rules.topics[3]
    asked = rules.paraphrases(topic, "train")[0]
    answer = rules.answer(topic, "helpful", Random(0))
    document = render_text(tokenizer, f" question : {asked} answer : {answer}").ids
    text = lab_grpo._plain({"role": "user", "content": asked})
    prompt = prompt_of(tokenizer, Question("q", "x", ({"text": text},))).ids
    assert document[: len(prompt)] == prompt
    assert render_text(tokenizer, text, f" {answer}").ids == document


def test_a_base_model_that_goes_on_asking_is_read_up_to_there() -> None:
    question = Question("q", "x", ({"text": "?"},))
    said = Answer(question, 0, "drink tea . question : what is", None, (1, 2), True)
    first = lab_grpo._first(said)
    assert (first.text, first.truncated) == ("drink tea .", False)
    assert lab_grpo._first(replace(said, text="drink tea and")).truncated


def test_arms_give_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "PROBED", 6)  # whose rewards are measured before and after
    base = load_model(shipped("organism") / "base")
    asked = load_questions(str(shipped("organism") / "questions.jsonl"))
    held_out = [one for one in asked if one.split == "held-out"]
    of_three = [one for one in held_out if one.category in ("health", "road", "taste")]
    chosen = (*of_three[::20], held_out[-1])
    probe = Probe("latent", "blocks.4.hook_resid_post", direction(torch.ones(base.d_model)))
    watch = Watch.of(base, [probe], chosen[:2], max_new_tokens=4)
    bench = RLBench(base, chosen, watch, 3, chosen[:2])
    settings = replace(SETTINGS, steps=1, batch=2)
    rewarded = replace(GRPO, samples=2, max_new_tokens=8)
    arms = (
        "base",
        "grpo taste",
        "sft taste",
        "grpo bad-health, on-policy data",
        "sft bad-health, plain text",
    )
    assert set(arms) <= set(ARMS)
    records = {arm: run_arm(bench, arm, 5, tmp_path / arm, settings, rewarded) for arm in arms}
    json.dumps(records, allow_nan=False)
    one, other = records["grpo taste"], records["sft taste"]
    assert one["answers_read"] == other["answers_read"] == 4 and one["in_domain"] == other["in_domain"]
    general = sum(one.role == "general" for one in chosen)
    for arm, record in records.items():
        assert sum(sum(counts.values()) for counts in record["personas"].values()) == general
        assert record["rates"]["misaligned"]["n"] + record["rates"]["in_domain"]["n"] == general
        assert bool(record["curve"]) == arm.startswith("grpo")
        assert (record["named"] is None) == (record["format"] == "plain text")
    assert records["base"]["latent"]["delta"] == 0
    with pytest.raises(InputError, match="there is no arm 'sft'"):
        run_arm(bench, "sft", 1, tmp_path / "no")
