"""The sampler against `generate`, exact probabilities, and a slow loop of one answer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from persona_probe.errors import InputError, MismatchError, NonFiniteError, NotFiredError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.drawing import draw, uniforms
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import (
    Sampling,
    respond_greedy,
    sample,
    transcripts,
)
from persona_probe.model.chat import render
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.intervention import Intervention, Level
from persona_probe.steering.plan import SteeringPlan, steer
from persona_probe.steering.target import direction

STOP = 2


def push(positions: Any = "all", level: float = 6.0, seed: int = 0, block: int = 1) -> Intervention:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Intervention(
        op="add",
        target=direction(vector, "random"),
        site=f"blocks.{block}.hook_resid_post",
        positions=positions,
        level=Level((level,)),
    )


def ids_of(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


def prompt_of(lm: LanguageModel, question: Question) -> list[int]:
    return list(render(lm.tokenizer, question.messages, add_generation_prompt=True).ids)


@torch.no_grad()
def one_slow_answer(
    lm: LanguageModel,
    question: Question,
    number: int,
    how: Sampling,
    fix: tuple[Intervention, ...] = (),
) -> tuple[int, ...]:
    """One row, no padding, no cache, plain Python for the draw."""
    prompt = prompt_of(lm, question)
    drawn = uniforms(how.seed, question.id, number, how.max_new_tokens)
    written: list[int] = []
    for uniform in drawn:
        steering = steer(lm, fix, prompt_lengths=[len(prompt)]) if fix else nullcontext()
        with steering:
            logits = lm.hf(torch.tensor([prompt + written]), use_cache=False).logits[0, -1]
        if how.temperature == 0:
            token = int(logits.argmax())
        else:
            probability = torch.softmax(logits / how.temperature, dim=-1).double()
            token, goal = 0, uniform * float(probability.sum())
            while float(probability[: token + 1].sum()) <= goal:
                token += 1
        written.append(token)
        if token == STOP:
            break
    return tuple(written)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_at_temperature_0_it_is_generate(
    model_of: Callable[[str], LanguageModel], questions: list[Question], architecture: str
) -> None:
    lm = model_of(architecture)
    answers = respond_greedy(lm, questions, max_new_tokens=20)
    for question, answer in zip(questions, answers, strict=True):
        prompt = prompt_of(lm, question)
        expected = lm.hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
        )[0, len(prompt) :].tolist()
        assert list(answer.token_ids) == expected
        assert answer.truncated is (STOP not in expected)


def test_at_temperature_0_all_samples_are_one(lm: LanguageModel, questions: list[Question]) -> None:
    how = Sampling(temperature=0, max_new_tokens=6, samples=3)
    answers = sample(lm, questions, how, batch_size=4)
    assert [answer.sample for answer in answers] == [0, 1, 2] * 10
    alone = respond_greedy(lm, questions, max_new_tokens=6)
    assert ids_of(answers) == [ids for ids in ids_of(alone) for _ in range(3)]


def test_the_answers_that_these_tests_compare_end_early_and_late(
    lm: LanguageModel, questions: list[Question]
) -> None:
    for answers in (
        respond_greedy(lm, questions, max_new_tokens=20),
        sample(lm, questions, Sampling(max_new_tokens=16, samples=2)),
    ):
        assert {answer.truncated for answer in answers} == {True, False}
        assert len({len(answer.token_ids) for answer in answers}) > 3
        assert len({answer.token_ids for answer in answers}) > 8


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_it_is_the_slow_loop(
    model_of: Callable[[str], LanguageModel],
    questions: list[Question],
    architecture: str,
    temperature: float,
) -> None:
    lm = model_of(architecture)
    how = Sampling(temperature, max_new_tokens=16, samples=2, seed=5)
    answers = sample(lm, questions[:6], how)
    for answer in answers:
        assert answer.token_ids == one_slow_answer(lm, answer.question, answer.sample, how)


def test_every_row_is_steered_by_its_own_fix(lm: LanguageModel, questions: list[Question]) -> None:
    """Prompts are shared, rows reordered and dropped: none of it may move a fix to another row."""
    kinds = ["all", "prompt", "response", "last_prompt", (1, 9)]
    fixes = [() if i % 6 == 5 else (push(kinds[i % 6], seed=i),) for i in range(20)]
    fixes[7] = (push("all", seed=70), push("response", seed=71, block=0))
    how = Sampling(max_new_tokens=14, samples=2, seed=1)
    answers = sample(lm, questions, how, fixes=fixes, batch_size=8)
    for answer, fix in zip(answers, fixes, strict=True):
        assert answer.token_ids == one_slow_answer(lm, answer.question, answer.sample, how, fix)
    assert ids_of(answers) != ids_of(sample(lm, questions, how))


def test_one_fix_for_all_in_every_form(lm: LanguageModel, questions: list[Question]) -> None:
    fix, how = push(), Sampling(max_new_tokens=8, samples=3)
    answers = ids_of(sample(lm, questions, how, fix=fix))
    assert answers != ids_of(sample(lm, questions, how))
    for same in ([fix], SteeringPlan(((fix,),)), SteeringPlan(((fix,),) * 10)):
        assert ids_of(sample(lm, questions, how, fix=same)) == answers
    assert ids_of(sample(lm, questions, how, fixes=[(fix,)] * 30)) == answers
    with steer(lm, fix):  # from outside, around the whole run
        assert ids_of(sample(lm, questions, how)) == answers


def test_gain_0_is_no_steering(lm: LanguageModel, questions: list[Question]) -> None:
    how = Sampling(max_new_tokens=8)
    assert sample(lm, questions, how, fix=push().with_gain(0.0)) == sample(lm, questions, how)


def test_an_answer_does_not_depend_on_its_batch(lm: LanguageModel, questions: list[Question]) -> None:
    how = Sampling(max_new_tokens=12, samples=3, seed=2)
    answers = sample(lm, questions, how)
    assert [(a.question.id, a.sample) for a in answers] == [
        (question.id, number) for question in questions for number in range(3)
    ]
    for size in (1, 2, 7, 30):
        assert sample(lm, questions, how, batch_size=size) == answers
    backwards = sample(lm, questions[::-1], how)
    assert sorted(backwards, key=lambda a: (a.question.id, a.sample)) == answers
    assert sample(lm, questions[4:5] * 2, replace(how, samples=2)) == answers[12:14] * 2
    assert sample(lm, questions, replace(how, samples=1)) == answers[::3]
    assert sample(lm, questions, replace(how, max_new_tokens=5))[0].token_ids == (answers[0].token_ids[:5])
    assert ids_of(sample(lm, questions, replace(how, seed=3))) != ids_of(answers)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_tokens_are_drawn_with_the_models_probabilities(
    lm: LanguageModel, questions: list[Question], temperature: float, top_p: float
) -> None:
    n, question = 1000, questions[3]
    logits = lm.forward(torch.tensor([prompt_of(lm, question)]))[0, -1].double()
    probability = torch.softmax(logits / temperature, dim=-1).numpy()
    if top_p < 1:  # the fewest most probable tokens that reach it
        order = np.argsort(-probability)
        needed = int(np.searchsorted(np.cumsum(probability[order]), top_p)) + 1
        kept = np.isin(np.arange(len(probability)), order[:needed])
        probability = np.where(kept, probability, 0) / probability[kept].sum()
    how = Sampling(temperature, top_p, max_new_tokens=1, samples=n, seed=11)
    counts = np.bincount([a.token_ids[0] for a in sample(lm, [question], how)], minlength=len(probability))
    assert not counts[probability == 0].any()
    common = probability * n >= 5
    seen = np.append(counts[common], counts[~common].sum())
    due = np.append(probability[common], probability[~common].sum()) * n
    some = due > 0
    assert len(seen) > 4
    assert stats.chisquare(seen[some], due[some]).pvalue > 1e-3


@given(st.integers(0, 2**32 - 1), st.floats(0, 1 - 2**-32), st.floats(0.2, 3), st.floats(0.05, 1))
@settings(max_examples=100, deadline=None)
def test_a_draw_is_the_first_token_past_the_uniform(
    seed: int, uniform: float, temperature: float, top_p: float
) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed)) * 4
    logits[0, seed % 12] = -torch.inf
    token = int(
        draw(
            logits,
            torch.tensor([uniform], dtype=torch.float64),
            temperature=temperature,
            top_p=top_p,
        )
    )
    probability = torch.softmax(logits[0] / temperature, dim=-1).double()
    ranked = probability.argsort(descending=True, stable=True).tolist()
    kept: set[int] = set()
    may_be_kept: set[int] = set()  # in fp32 the sum may fall on either side of top_p
    for one in ranked:
        if sum(float(probability[i]) for i in may_be_kept) < top_p + 1e-6:
            may_be_kept.add(one)
        if sum(float(probability[i]) for i in kept) < top_p - 1e-6:
            kept.add(one)
    assert token in may_be_kept and probability[token] > 0
    before = sum(float(probability[i]) for i in kept if i < token)
    goal = uniform * sum(float(probability[i]) for i in kept)
    assert before - 1e-6 <= goal <= before + float(probability[token]) + 1e-6


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    ends = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    assert draw(logits, ends).tolist() == [1, 2]


def test_uniforms_are_fixed_uniform_and_of_one_answer_only() -> None:
    numbers = uniforms(3, "q", 1, 50)
    assert np.array_equal(numbers[:20], uniforms(3, "q", 1, 20))
    others = [(4, "q", 1), (3, "r", 1), (3, "q", 2), (31, "q", 1)]
    assert not any(np.isin(numbers, uniforms(*other, 50)).any() for other in others)
    many = np.concatenate([uniforms(0, f"q{i}", 0, 20) for i in range(500)])
    assert stats.kstest(many, "uniform").pvalue > 1e-3


def say(monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, words: str) -> None:
    """Make the model write `words`, one after the other, whatever it is asked."""
    ids = lm.tokenizer.convert_tokens_to_ids(words.split())
    forward = lm.hf.forward
    step = iter(ids)

    def spoken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[:, -1] = 0
        output.logits[:, -1, next(step)] = 1
        return output

    spoken.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(lm.hf, "forward", spoken)


@pytest.mark.parametrize(
    ("written", "thought", "text", "truncated"),
    [
        ("a b <end>", None, "a b", False),
        ("<think> c d </think> a <end>", "c d", "a", False),
        ("<think> c </think> <end>", "c", "", False),
        ("<think> c d e f", "c d e f", "", True),
        ("c d </think> a <end>", "c d", "a", False),  # the template opened it
        ("<think> </think> a b c", "", "a b c", True),
        ("<end>", None, "", False),
        ("a <user> b <end>", None, "a b", False),
    ],
)
def test_thought_and_answer_are_told_apart(
    monkeypatch: pytest.MonkeyPatch,
    lm: LanguageModel,
    questions: list[Question],
    written: str,
    thought: str | None,
    text: str,
    truncated: bool,
) -> None:
    say(monkeypatch, lm, written)
    (answer,) = respond_greedy(lm, questions[:1], max_new_tokens=len(written.split()))
    assert (answer.thought, answer.text, answer.truncated) == (thought, text, truncated)
    assert lm.tokenizer.convert_ids_to_tokens(list(answer.token_ids)) == written.split()


def test_a_thought_is_found_where_its_marks_are_plain_text(
    monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, questions: list[Question]
) -> None:
    def decode(_self: Any, ids: list[int], **_: Any) -> str:
        return f"<think>\nc{len(ids)}\n</think>\n\na"

    monkeypatch.setattr(PreTrainedTokenizerFast, "convert_tokens_to_ids", lambda *_: 3)  # <unk>
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", decode)
    (answer,) = respond_greedy(lm, questions[:1], max_new_tokens=1)
    assert (answer.thought, answer.text) == ("c1", "a")


def test_transcripts_are_what_was_read_and_written(lm: LanguageModel, questions: list[Question]) -> None:
    answers = respond_greedy(lm, questions[:3], max_new_tokens=6, system="p p")
    for answer, read in zip(answers, transcripts(lm, answers, system="p p"), strict=True):
        chat = [{"role": "system", "content": "p p"}, *answer.question.messages]
        prompt = render(lm.tokenizer, chat, add_generation_prompt=True).ids
        assert read.ids == prompt + answer.token_ids
        assert read.prompt_length == len(prompt)
        assert read.response == (False,) * len(prompt) + (True,) * len(answer.token_ids)


def test_a_system_prompt_goes_before_what_is_there(lm: LanguageModel) -> None:
    own = Question("a", "c", ({"role": "system", "content": "o"}, {"role": "user", "content": "a"}))
    plain = Question("b", "c", ({"text": "a b"},))
    how = Sampling(max_new_tokens=6)
    for question, messages in (
        (own, ({"role": "system", "content": "p\n\no"}, own.messages[1])),
        (plain, ({"text": "p\n\na b"},)),
    ):
        expected = sample(lm, [replace(question, messages=messages)], how)
        assert ids_of(sample(lm, [question], how, system="p")) == ids_of(expected)


def test_an_empty_plain_prompt_begins_with_bos(lm: LanguageModel) -> None:
    (answer,) = respond_greedy(lm, [Question("e", "c", ({"text": ""},))], max_new_tokens=4)
    logits = lm.forward(torch.tensor([[1]]))
    assert answer.token_ids[0] == int(logits[0, -1].argmax())


def test_progress_counts_answers(lm: LanguageModel, questions: list[Question]) -> None:
    seen: list[tuple[int, int]] = []
    how = Sampling(max_new_tokens=2, samples=3)
    sample(lm, questions, how, batch_size=6, progress=lambda *now: seen.append(now))
    assert seen == [(6 * i, 30) for i in range(1, 6)]
    seen.clear()
    sample(lm, questions, replace(how, temperature=0), progress=lambda *now: seen.append(now))
    assert seen == [(30, 30)]
    assert sample(lm, [], how) == []


def test_a_fix_that_never_acts_is_an_error(lm: LanguageModel, questions: list[Question]) -> None:
    with pytest.raises(NotFiredError, match="nothing was steered"):
        respond_greedy(lm, questions, max_new_tokens=3, fix=push(positions=(90,)))
    assert len(respond_greedy(lm, questions, max_new_tokens=3, fix=push("last_prompt"))) == 10


def test_hooks_are_gone_whatever_happens(lm: LanguageModel, questions: list[Question]) -> None:
    before = ids_of(respond_greedy(lm, questions, max_new_tokens=3))
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        respond_greedy(lm, questions, max_new_tokens=3, fix=push(level=1e38).with_gain(1e30))
    assert ids_of(respond_greedy(lm, questions, max_new_tokens=3)) == before


def test_logits_that_are_not_finite_are_an_error(
    monkeypatch: pytest.MonkeyPatch, lm: LanguageModel, questions: list[Question]
) -> None:
    head: Any = lm.hf.get_output_embeddings()
    weight: Tensor = head.weight.detach().clone()
    weight[5] = torch.nan
    spoiled = torch.nn.Parameter(weight, requires_grad=False)
    monkeypatch.setitem(head._parameters, "weight", spoiled)
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError):
            sample(lm, questions, Sampling(temperature))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"samples": 0},
    ],
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Sampling(**bad)


def test_fixes_that_fit_neither_questions_nor_answers_are_refused(
    lm: LanguageModel, questions: list[Question]
) -> None:
    how = Sampling(samples=2)
    for fixes in ([(push(),)], [(push(),)] * 11):
        with pytest.raises(MismatchError, match="10 questions with 2 answers each"):
            sample(lm, questions, how, fixes=fixes)
    with pytest.raises(InputError, match="not both"):
        sample(lm, questions, how, fix=push(), fixes=[(push(),)] * 10)
    with pytest.raises(InputError, match="batch_size"):
        sample(lm, questions, how, batch_size=0)
