"""What shapes an answer's distribution, against transformers' own filters; what cannot be done is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from persona_probe.errors import InputError
from persona_probe.evaluation.answers import opens_thought, split_thought
from persona_probe.evaluation.drawing import draw
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, prompt_of, sample, transcripts
from persona_probe.evaluation.settings import applied
from persona_probe.model.language_model import LanguageModel


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 2), st.integers(1, 14), st.floats(0.1, 0.95))
@settings(max_examples=60, deadline=None)
def test_the_filters_leave_the_tokens_that_transformers_leaves(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 3
    grid = torch.linspace(0, 1 - 1e-9, 4001, dtype=torch.float64)
    drawn = draw(
        logits.expand(len(grid), -1), grid, temperature=temperature, top_k=top_k, top_p=top_p
    ).bincount(minlength=12)
    ids: Any = None
    left = TemperatureLogitsWarper(temperature)(ids, logits)
    left = TopKLogitsWarper(top_k)(ids, left) if top_k < 12 else left
    probability = torch.softmax(TopPLogitsWarper(top_p)(ids, left), dim=-1)[0]
    assert np.allclose(drawn / len(grid), probability, atol=1e-3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}, None),
        ({"temperature": 0.6, "top_k": 0}, {"temperature": 0.6}),
        ({"do_sample": False, "top_p": 0.5}, {"temperature": 0.0}),
        ({"repetition_penalty": 1.0, "num_beams": 1, "min_p": 0.0}, {}),
    ],
)
def test_a_generation_config_applies_as_the_file_has_it(
    said: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    given = Sampling(max_new_tokens=5, generation_config=True)
    changed = {"temperature": 0.6, "top_p": 0.9, "top_k": 20} if expected is None else expected
    assert applied(given, GenerationConfig(**said), "m") == replace(given, **changed)
    unasked = replace(given, generation_config=False)
    assert applied(unasked, GenerationConfig(**said), "m") == unasked


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 1.05},
        {"min_p": 0.1},
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": [7]},
        {"typical_p": 0.9},
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(said: dict[str, Any]) -> None:
    name = next(iter(said))
    with pytest.raises(InputError, match=name):
        applied(Sampling(generation_config=True), GenerationConfig(**said), "m")


def test_a_models_own_config_is_read_in_sampling(
    model_of: Callable[[str], LanguageModel], questions: list[Question]
) -> None:
    lm = model_of("llama")
    how = Sampling(max_new_tokens=6, samples=2)
    free = sample(lm, questions, how)
    lm.hf.generation_config = GenerationConfig(top_k=2, temperature=0.5, eos_token_id=2)
    assert sample(lm, questions, how) == free
    own = sample(lm, questions, replace(how, generation_config=True))
    assert own == sample(lm, questions, replace(how, top_k=2, temperature=0.5)) != free
    lm.hf.generation_config.repetition_penalty = 1.1
    with pytest.raises(InputError, match=r"repetition_penalty=1\.1"):
        sample(lm, questions, replace(how, generation_config=True))


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"temperature": -1}, {"top_p": 0}, {"samples": 0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


ASKED = Question("q", "x", ({"role": "user", "content": "a b"},))
THINKING = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think> </think> {% endif %}"
)


def test_thinking_is_told_to_the_template_or_refused(
    model_of: Callable[[str], LanguageModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    lm = model_of("llama")
    for wanted in (True, False):
        with pytest.raises(InputError, match="knows no enable_thinking"):
            sample(lm, [ASKED], Sampling(enable_thinking=wanted))
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template + THINKING
    try:
        plain = prompt_of(tokenizer, ASKED).ids
        shut = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert prompt_of(tokenizer, ASKED, None, Sampling(enable_thinking=True)).ids == plain
        how = Sampling(enable_thinking=False, max_new_tokens=3)
        assert prompt_of(tokenizer, ASKED, None, how).ids == (*plain, *shut)
        answers = sample(lm, [ASKED], how)
        assert transcripts(lm, answers, sampling=how)[0].ids == (*plain, *shut, *answers[0].token_ids)
        assert not opens_thought(tokenizer, (*plain, *shut))
        assert opens_thought(tokenizer, (*plain, shut[0]))
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("text", "thinking", "thought", "said"),
    [
        ("a b", False, None, "a b"),
        ("<think>a</think> b", False, "a", "b"),
        ("a</think>b", False, "a", "b"),
        ("a</think>b", True, "a", "b"),
        ("<think>a", False, "a", ""),
        ("a b", True, "a b", ""),
        ("<think>a", True, "a", ""),
        ("", True, "", ""),
        ("<think></think>b", False, "", "b"),
    ],
)
def test_a_thought_is_split_off(text: str, thinking: bool, thought: str | None, said: str) -> None:
    assert split_thought(text, thinking=thinking) == (thought, said)
