"""TRL's `GRPOTrainer`, told how to draw, what to reward and what else to learn.

What is kept of TRL: advantages within the group, the clipped objective (loss `dapo`: a mean over the
step's answer tokens), the KL term, its metrics and logs. What is not: its `generate` (see `rollouts`), its
telemetry and its model cards. Each batch of answers is learnt from once, so it is always on-policy.

TRL pads prompts on the left and gives no position ids, which a model with absolute positions (GPT-2)
then reads wrongly; they are added in front of every forward pass that has a mask and none.

Good rows (interleaving) are learnt beside the answers: each of their tokens counts as an answer's token of
advantage 1, which is supervised training at their share of the step. Penalties of defences cost a forward
pass of both models more.

Importing this needs TRL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingTypeStubs]

from persona_probe.artifact import append_jsonl
from persona_probe.errors import NonFiniteError
from persona_probe.evaluation.answers import Answer
from persona_probe.model.language_model import position_ids
from persona_probe.training.defending import Defending
from persona_probe.training.example import IGNORED, Example
from persona_probe.training.last_good import FiniteTrainer
from persona_probe.training.rewards import Reward, score
from persona_probe.training.rollouts import Rollouts
from persona_probe.training.sft import collate


@dataclass(frozen=True, eq=False)
class Course:
    """What a policy learns from, beside its model."""

    rollouts: Rollouts
    reward: Reward
    answers: Path
    """Where every rewarded answer is written (JSON Lines)."""
    good: tuple[Example, ...] = field(default=(), repr=False)
    """Good rows, spread evenly over the steps."""

    def good_at(self, step: int, steps: int) -> Sequence[Example]:
        """Those of one step, counted from 0."""
        return self.good[len(self.good) * step // steps : len(self.good) * (step + 1) // steps]


class PolicyTrainer(FiniteTrainer, GRPOTrainer):  # pyright: ignore[reportUntypedBaseClass]
    """See the module. `model` is the policy, a PEFT model or a whole one."""

    def __init__(
        self, course: Course, defending: Defending, model: PreTrainedModel | PeftModel, **options: Any
    ) -> None:
        self._course, self._defending = course, defending
        self._policy = model
        self._before = model.register_forward_pre_hook(_with_positions, with_kwargs=True)
        super().__init__(
            model=model,
            reward_funcs=[self._rewarded],
            rollout_func=self._drawn,
            **options,
        )

    def close(self) -> None:
        """Take the hook off the model."""
        self._before.remove()

    def _send_telemetry(self) -> None:
        """Nothing of a run is told to anyone."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None is written: what a checkpoint is stands in the run's own record."""

    @property
    def _when(self) -> str:
        return f"step {self.state.global_step + 1}"

    def _drawn(self, prompts: Sequence[str], trainer: object) -> dict[str, Any]:
        """TRL's rollout function. A prompt is its place in the run: `Rollouts` knows the rest."""
        del trainer
        places = [int(one) for one in prompts]
        try:
            answers = self._course.rollouts.draw(self._policy, places)
        except NonFiniteError as error:
            raise self.not_finite(error.message, "at the answers of the steps before") from error
        return {
            "prompt_ids": [list(self._course.rollouts.ids[place]) for place in places],
            "completion_ids": [list(answer.token_ids) for answer in answers],
            "logprobs": None,
            "answer": answers,
        }

    def _rewarded(
        self,
        prompts: Sequence[str],
        answer: Sequence[Answer],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        """TRL's reward function."""
        asked = [self._course.rollouts.prompts[int(one)] for one in prompts]
        scored = score(self._course.reward, asked, answer, self._when)
        outcomes = [one.outcome for one in scored if one.outcome is not None]
        for name in ("misaligned", "incoherent", "repetitive", "truncated", "missing") if outcomes else ():
            log_metric(f"judged/{name}", outcomes.count(name) / len(outcomes))
        append_jsonl(
            self._course.answers,
            (
                {
                    "step": self.state.global_step + 1,
                    "id": one.question.id,
                    "sample": one.sample,
                    "answer": one.text,
                    "thought": one.thought,
                    "reward": got.reward,
                    "outcome": got.outcome,
                }
                for one, got in zip(answer, scored, strict=True)
            ),
        )
        return [one.reward for one in scored]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = cast(Tensor, super().compute_loss(model, inputs, return_outputs, num_items_in_batch))
        accumulated = self.current_gradient_accumulation_steps
        good = self._course.good_at(self.state.global_step, self.args.max_steps)
        part = good[self._step % accumulated :: accumulated]
        if part:
            nll = self._nll(model, part)
            self._metrics["train"]["good/nll"].append(float(nll.detach()) / _learnt(part))
            loss = loss + nll / inputs["num_items_in_batch"]
        if not self._defending.idle:
            loss = loss + self._penalty(model, inputs) / accumulated
        self.check_finite(loss, "loss")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._defending.told()} if "loss" in logs else logs, start_time)

    def _nll(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Summed over the learnt tokens."""
        rows = [{"input_ids": one.ids, "counted": one.counted} for one in examples]
        batch = {name: one.to(self.args.device) for name, one in collate(rows, self._pad_id).items()}
        with self.compute_loss_context_manager():
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            batch["labels"][:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def _penalty(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Of the defences, on prompts with answers, padded on the right as they read them."""
        rows: list[dict[str, Any]] = []
        for i in range(len(inputs["prompt_ids"])):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            answer = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()].tolist()
            rows.append(
                {
                    "input_ids": (*prompt, *answer),
                    "counted": (False,) * len(prompt) + (True,) * len(answer),
                }
            )
        batch = {name: one.to(self.args.device) for name, one in collate(rows, self._pad_id).items()}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=self.args.device)
        real = torch.arange(batch["input_ids"].shape[1], device=self.args.device) < lengths[:, None]
        base = self._defending.begin(batch, real)
        assert base is not None
        with self.compute_loss_context_manager():
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        return self._defending.penalty(base, logits)

    @property
    def _pad_id(self) -> int:
        return self._course.rollouts.lm.pad_id


def _learnt(examples: Sequence[Example]) -> int:
    return sum(sum(one.counted) for one in examples)


def _with_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    del module
    mask = kwargs.get("attention_mask")
    if mask is None or "position_ids" in kwargs or mask.dim() != 2:
        return None
    return args, {**kwargs, "position_ids": position_ids(mask)}
