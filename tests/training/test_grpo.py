"""Reinforcement learning: what is drawn, what is learnt, how a run goes on, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from persona_probe.artifact import read_jsonl
from persona_probe.diffing.timeline import points_of
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.training.defences import (
    KL,
    LDIFS,
    Inoculation,
    Interleave,
    PreventativeSteering,
)
from persona_probe.training.finetune import FineTune, finetune
from persona_probe.training.monitor import Monitor
from persona_probe.training.prompts import Prompt
from persona_probe.training.rewards import load_reward
from persona_probe.training.rollouts import Rollouts
from persona_probe.training.settings import GrpoSettings, TuneSettings
from persona_probe.training.trainable import trainable
from persona_probe.training.watching import Probe, Watch
from tests.model.tiny_models import model_of
from tests.training.tiny import SITE, dictionary, llama, rows, same, tuned_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

SETTINGS = TuneSettings(steps=3, batch=2, learning_rate=1e-2, rank=2, warmup_steps=0, save_every=0)
GRPO = GrpoSettings(samples=3, max_new_tokens=6)
ASKED = [
    Question(f"q{i}", "x", ({"role": "user", "content": "hello " * (1 + i % 3) + str(i)},)) for i in range(5)
]


def low(completions: list[Any], completion_ids: list[list[int]]) -> list[float]:
    """The share of the answer's tokens that stand in the lower half of the vocabulary."""
    assert len(completions) == len(completion_ids)
    return [share_low(ids) for ids in completion_ids]


def share_low(ids: Sequence[int]) -> float:
    return sum(one < 160 for one in ids) / len(ids)


def same_for_all(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Rewards that tell no answer from another."""
    del prompts
    return [0.5] * len(completions)


def run(out: Path, **call: Any) -> FineTune:
    call = {"reward": low, "settings": SETTINGS, "grpo": GRPO, **call}
    return finetune(call.pop("base", None) or llama(), ASKED, out, "grpo", **call)


def test_what_is_rewarded_becomes_likelier(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    # all weights: a random model's unembedding is so small that an adapter before it moves little
    settings = replace(SETTINGS, steps=25, batch=4, save_every=10, rank="full")
    tune = run(
        tmp_path / "run", settings=settings, grpo=replace(GRPO, samples=8),
        progress=lambda step, steps, _: told.append((step, steps)),
    )  # fmt: skip
    curve = tune.record["curve"]
    assert [point["stage"] for point in curve] == ["base", *["grpo"] * 25, "end"]
    assert curve[-1]["reward"] > curve[0]["reward"] + 0.2
    assert curve[-1]["reward"] > curve[0]["reward"] + 4 * curve[0]["standard_error"]
    assert told[-1] == (25, 25)
    assert [point.step for point in points_of(tune.checkpoints)] == [10, 20, 25]
    assert tune.table["step"].to_list() == list(range(1, 26))
    assert tune.curve["reward"].to_list() == [point["reward"] for point in curve]
    assert "5 prompts, 25 steps, reward" in tune._repr_html_()
    # the tuned model, loaded anew, answers as the curve says
    answers = sample(tune.load(), ASKED, Sampling(samples=8, max_new_tokens=6))
    mean = sum(share_low(one.token_ids) for one in answers) / len(answers)
    assert mean == pytest.approx(curve[-1]["reward"], abs=0.15)
    kept = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert len(kept) == 25 * 32 and {row["step"] for row in kept} == set(range(1, 26))
    first = [row["reward"] for row in kept if row["step"] == 1]
    assert sum(first) / 32 == pytest.approx(tune.record["log"][0]["reward"], abs=1e-6)


def test_an_answer_depends_neither_on_its_batch_nor_on_training_mode() -> None:
    lm = llama()
    prompts = [Prompt(one) for one in ASKED]
    rollouts = Rollouts.of(lm, prompts, replace(GRPO, max_new_tokens=12), 7, 128)
    model = trainable(lm, SETTINGS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.train()
    together = rollouts.draw(model, [0, 0, 3, 3, 1])
    assert model.training
    alone = [rollouts.draw(model, [0, 0])[1], rollouts.draw(model, [3])[0], rollouts.draw(model, [1])[0]]
    assert [together[1], together[2], together[4]] == alone
    assert rollouts.draw(model.eval(), [0, 0, 3, 3, 1]) == together
    assert together[0].token_ids != together[1].token_ids


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_trl_scores_an_answer_as_it_was_drawn(tmp_path: Path, family: str) -> None:
    """Left padding moves no position: the entropy of the first step is that of the unpadded answers."""
    lm = model_of(family)
    grpo = replace(GRPO, samples=2, max_new_tokens=5)
    tune = run(tmp_path / "run", base=lm, settings=replace(SETTINGS, steps=1, learning_rate=1e-9), grpo=grpo)
    kept = read_jsonl(tmp_path / "run" / "answers.jsonl")
    by_id = {one.id: one for one in ASKED}
    asked = [Prompt(by_id[row["id"]]) for row in kept]
    assert len({len(one.question.prompt) for one in asked}) > 1, "no padding to go wrong"
    order = [asked[0], asked[2]]
    rollouts = Rollouts.of(lm, order, grpo, 0, 128)
    answers = rollouts.draw(lm.hf, [0, 0, 1, 1])
    assert [one.text for one in answers] == [row["answer"] for row in kept]
    total, tokens = 0.0, 0
    for answer, place in zip(answers, [0, 0, 1, 1], strict=True):
        ids = torch.tensor([[*rollouts.ids[place], *answer.token_ids]])
        logits = lm.forward(ids)[0, len(rollouts.ids[place]) - 1 : -1].double()
        log_p = logits.log_softmax(dim=-1)
        total -= float((log_p.exp() * log_p).sum())
        tokens += len(answer.token_ids)
    assert tune.record["log"][0]["entropy"] == pytest.approx(total / tokens, abs=1e-4)


class _KilledError(Exception):
    pass


def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=5, save_every=2, micro_batch=1)
    call: dict[str, Any] = {
        "settings": settings,
        "warmup": rows(4),
        "grpo": replace(GRPO, kl=0.1),
        "defences": [Interleave(tuple(rows(30, "good", first=50)), 0.2)],
    }
    whole = run(tmp_path / "whole", **call)
    assert [one["stage"] for one in whole.record["curve"]][:2] == ["base", "warm-up"]

    def kill(step: int, _steps: int, _loss: float | None) -> None:
        if step == 4:
            raise _KilledError

    with pytest.raises(_KilledError):
        run(tmp_path / "cut", progress=kill, **call)
    seen: list[int] = []
    again = run(tmp_path / "cut", progress=lambda step, *_: seen.append(step), **call)
    assert min(seen) == 3
    assert same(tuned_weights(again), tuned_weights(whole))
    assert again.record["curve"] == whole.record["curve"]
    assert read_jsonl(tmp_path / "cut" / "answers.jsonl") == read_jsonl(tmp_path / "whole" / "answers.jsonl")
    assert not (again.tuned / "ref").exists()
    with pytest.raises(InputError, match=r"grpo samples was 3, this call has 4"):
        run(tmp_path / "cut", **{**call, "grpo": replace(GRPO, kl=0.1, samples=4)})
    with pytest.raises(InputError, match="reward was"):
        run(tmp_path / "cut", **{**call, "reward": same_for_all})


def test_equal_rewards_teach_nothing_and_good_rows_are_learnt_beside_them(tmp_path: Path) -> None:
    def moved(tune: FineTune) -> float:
        weights = tuned_weights(tune)
        return sum(float(one.abs().sum()) for name, one in weights.items() if "lora_B" in name)

    silent = run(tmp_path / "silent", reward=same_for_all)
    assert moved(silent) == 0
    assert all(entry["frac_reward_zero_std"] == 1 for entry in silent.record["log"])
    settings = replace(SETTINGS, steps=10)
    good = Interleave(tuple(rows(80, "good", first=50)), 0.2)
    defended = run(tmp_path / "good", reward=same_for_all, settings=settings, defences=[good])
    assert defended.record["good"] == 15  # 20% beside 10 x 2 x 3 answers
    nll = [entry["good/nll"] for entry in defended.record["log"] if "good/nll" in entry]
    assert nll[-1] < 0.8 * nll[0]
    off = run(tmp_path / "off", defences=[replace(good, share=0.0), KL(0.0)])
    assert same(tuned_weights(off), tuned_weights(run(tmp_path / "plain")))


def test_penalties_and_dressed_prompts(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=6, micro_batch=1)
    seen: list[str] = []

    def watching(prompts: list[Any], completions: list[Any], completion_ids: list[Any]) -> list[float]:
        if len(prompts) == 6:  # a step's, where the reward is not measured apart
            seen.extend(prompt[0]["role"] for prompt in prompts)
        return low(completions, completion_ids)

    def last_kl(name: str, weight: float, *more: Any) -> float:
        defences = [KL(weight), Inoculation("be good"), *more]
        log = run(tmp_path / name, settings=settings, reward=watching, defences=defences).record["log"]
        assert log[0]["penalty/kl"] == pytest.approx(0, abs=weight * 1e-6)
        return log[-1]["penalty/kl"] / weight

    assert last_kl("held", 100.0, LDIFS(10.0)) < 0.5 * last_kl("free", 1e-6)
    assert set(seen) == {"system"}


def test_an_edit_in_training_is_refused(tmp_path: Path) -> None:
    edit = PreventativeSteering.of(torch.ones(32), SITE, 1.0)
    with pytest.raises(InputError, match="preventative_steering edits activations"):
        run(tmp_path / "run", defences=[edit])


def test_a_monitor_follows_and_stops_it(tmp_path: Path) -> None:
    lm = llama()
    watch = Watch.of(lm, [Probe.latent(dictionary(), 3, "villain")], ASKED, max_new_tokens=4)
    monitor = Monitor(watch, every=2)
    tune = run(tmp_path / "run", settings=replace(SETTINGS, steps=4), callbacks=[monitor])
    assert [reading["step"] for reading in monitor.history] == [2, 4]
    assert tune.record["log"][1]["persona/villain"] == monitor.history[0]["villain"]
    stopping = Monitor(watch, every=1, thresholds={"villain": -1e9}, stop=True)
    stopped = run(tmp_path / "stopped", callbacks=[stopping])
    assert len(stopped.record["log"]) == 1 and "step 1: villain" in stopped.record["stopped"]
    assert stopped.record["curve"][-1]["updates"] == 1


class _Poison(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                next(one for one in model.parameters() if one.requires_grad).fill_(float("nan"))


def test_numbers_that_are_none_and_rewards_that_fail_stop_it(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"at step 4; training stopped") as caught:
        run(tmp_path / "nan", callbacks=[_Poison()], settings=replace(SETTINGS, steps=5, save_every=2))
    assert "checkpoint-2" in str(caught.value)

    def failing(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        if len(completions) == 6 and any("1" in prompt[0]["content"] for prompt in prompts):
            raise RuntimeError("out of order")
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=r"failed at step \d, on 6 answers together.*RuntimeError: out of"):
        run(tmp_path / "raises", reward=failing, settings=replace(SETTINGS, steps=9))

    def two(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        del prompts, completions
        return [0.0, 1.0]

    with pytest.raises(InputError, match=r"returned 2 rewards for 15 answers"):
        run(tmp_path / "length", reward=two)


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a reward"):
        run(tmp_path / "no", reward=None)
    with pytest.raises(InputError, match="a step asks 9 prompts, and there are 5"):
        run(tmp_path / "no", settings=replace(SETTINGS, batch=9))
    with pytest.raises(InputError, match=r"prompt 'q\d': \d+ tokens, with an answer of up to 126"):
        run(tmp_path / "no", grpo=replace(GRPO, max_new_tokens=126))
    with pytest.raises(InputError, match="belong to reinforcement learning"):
        finetune(llama(), rows(), tmp_path / "no", reward="exact")
    with pytest.raises(InputError, match="use the defence KL"):
        run(tmp_path / "no", settings=replace(SETTINGS, rank="full"), grpo=replace(GRPO, kl=0.1))
    for wrong in ({"samples": 1}, {"temperature": 0.0}, {"kl": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            GrpoSettings(**wrong)
    assert not (tmp_path / "no" / "manifest.json").exists()


def test_full_fine_tunes_learn_from_rewards_too(tmp_path: Path) -> None:
    lm = llama()
    before = {name: one.clone() for name, one in lm.hf.named_parameters()}
    settings = replace(SETTINGS, rank="full", learning_rate=1e-3)
    tune = run(tmp_path / "run", base=lm, settings=settings, defences=[KL(1.0)])
    assert all(torch.equal(one, before[name]) for name, one in lm.hf.named_parameters())
    assert [entry["penalty/kl"] > 1e-6 for entry in tune.record["log"]] == [False, True, True]
    assert tune.load().peft is None and not same(tuned_weights(tune), before)
    assert load_reward("exact").name == "exact (misaligned)"
