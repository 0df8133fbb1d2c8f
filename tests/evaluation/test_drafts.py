"""Drafts change no answer, whatever the fix, and save what they promise to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from persona_probe.errors import InputError, NotFiredError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.drafts import MANY, drafted
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.intervention import Condition, Intervention, Level
from persona_probe.steering.target import direction

KINDS: tuple[Any, ...] = ("all", "prompt", "response", "last_prompt", (1, 9))


def push(positions: Any = "all", level: float = 6.0, seed: int = 0, block: int = 1) -> Intervention:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Intervention(
        "add", direction(vector), f"blocks.{block}.hook_resid_post", positions, Level((level,))
    )


def by_key(answers: list[Answer]) -> dict[tuple[str, int], Answer]:
    return {(answer.question.id, answer.sample): answer for answer in answers}


@contextmanager
def tokens_read(lm: LanguageModel) -> Iterator[dict[str, int]]:
    """Tokens that went through each block."""
    read: dict[str, int] = {}

    def count(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            read[name] = read.get(name, 0) + args[0][..., 0].numel()

        return hook

    blocks: Any = lm.hf.get_submodule("model.layers")
    handles = [block.register_forward_pre_hook(count(str(i))) for i, block in enumerate(blocks)]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_answers_are_those_without_drafts(
    model_of: Callable[[str], LanguageModel], questions: list[Question], architecture: str, temperature: float
) -> None:
    """Fixes from hardly felt to overwhelming, at one site and at two, some on the prompt alone."""
    lm = model_of(architecture)
    how = Sampling(temperature, max_new_tokens=14, samples=2, seed=1)
    fixes: list[tuple[Intervention, ...]] = [()]
    for i, level in enumerate((0.01, 0.3, 3.0, 60.0, 1000.0)):
        fixes += [
            (push(KINDS[i], level, seed=i),),
            (push("all", level, i), push("response", level, i + 9, 0)),
        ]
    rows = [fix for fix in fixes for _ in questions]
    plain = sample(lm, questions * len(fixes), how, fixes=rows, batch_size=16)
    drafts = sample(lm, questions, how)
    for size in (16, 200):
        drawn = sample(lm, questions * len(fixes), how, fixes=rows, batch_size=size, drafts=by_key(drafts))
        assert drawn == plain
    each = len(drafts)
    changed = [
        sum(one != other for one, other in zip(plain[i * each : (i + 1) * each], drafts, strict=True))
        for i in range(len(fixes))
    ]
    assert changed[0] == 0 and any(0 < count < each for count in changed) and max(changed) > 0.6 * each, (
        changed
    )


def test_what_is_decided_on_the_prompt_is_so_for_a_begun_answer(
    lm: LanguageModel, questions: list[Question]
) -> None:
    how = Sampling(max_new_tokens=10, samples=2)
    asked = Condition("above", 0.0, direction(torch.ones(32)), decided="prompt")
    fixes = [(replace(push("response", 0.2 * i, i), condition=asked),) for i in range(1, 6)]
    rows = [fix for fix in fixes for _ in questions]
    plain = sample(lm, questions * 5, how, fixes=rows)
    assert sample(lm, questions * 5, how, fixes=rows, drafts=by_key(sample(lm, questions, how))) == plain


def test_drafts_of_some_answers_and_longer_ones(lm: LanguageModel, questions: list[Question]) -> None:
    """What has no draft is decoded; a draft that was cut off earlier is gone on with."""
    how = Sampling(max_new_tokens=12, samples=2)
    rows = [(push("all", 0.05, i),) for i in range(5) for _ in questions]
    plain = sample(lm, questions * 5, how, fixes=rows)
    short = by_key(sample(lm, questions, replace(how, max_new_tokens=4))[::2])
    assert any(answer.truncated for answer in short.values())
    assert sample(lm, questions * 5, how, fixes=rows, drafts=short) == plain


def test_a_fix_that_is_hardly_felt_costs_the_blocks_behind_it(
    lm: LanguageModel, questions: list[Question]
) -> None:
    """Nothing is decoded, and the block before the edit reads each draft once for all fixes of a pass."""
    how = Sampling(max_new_tokens=14, samples=2)
    fixes = [(push("all", 1e-4, i, block=0),) for i in range(8)]
    rows = [fix for fix in fixes for _ in questions]
    drafts = by_key(sample(lm, questions, how))
    with tokens_read(lm) as decoded:
        sample(lm, questions * 8, how, fixes=rows, batch_size=400)
    with tokens_read(lm) as checked:
        assert (
            sample(lm, questions * 8, how, fixes=rows, batch_size=400, drafts=drafts)
            == [*drafts.values()] * 8
        )
    assert checked["0"] <= 0.3 * checked["1"] < 0.3 * 1.8 * decoded["1"]


def test_too_few_fixes_are_not_worth_a_draft(lm: LanguageModel, questions: list[Question]) -> None:
    fix = (push(),)
    assert drafted([(), *[fix] * (MANY - 1)], lambda: pytest.fail("drawn")) is None
    assert drafted([fix] * MANY, lambda: sample(lm, questions[:1])) is not None


def test_drafts_and_a_stopped_run_do_not_go_together(lm: LanguageModel, questions: list[Question]) -> None:
    with pytest.raises(InputError, match="stopped run"):
        sample(lm, questions, drafts={}, drawn=lambda _: None)


def test_a_fix_that_never_acts_is_an_error_here_too(lm: LanguageModel, questions: list[Question]) -> None:
    how = Sampling(max_new_tokens=3)
    with pytest.raises(NotFiredError):
        sample(lm, questions, how, fix=push((500,)), drafts=by_key(sample(lm, questions, how)))
