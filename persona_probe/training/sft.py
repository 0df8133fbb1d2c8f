"""Supervised training on token ids: one function for pre-training and for narrow fine-tunes.

transformers' ``Trainer`` runs it, so checkpoints, resuming and logs are those users know. Loss counts
only the tokens an example marks. Batches are right-padded and carry no attention mask: under causal
attention no real token sees the padding behind it, and the mask-free kernels are faster.

A loss or a gradient that is not finite stops the run before any weight has moved. Defences that
touch the steps themselves (see `training.defences`) come in through `fit`; without one, every bit is
what it was without that machinery.

Not TRL's ``SFTTrainer``: it would tokenise and collate by its own rules, and what it adds (packing,
templates, loss on answers) is done here by `persona_probe.model.chat`, the same code that renders
what is evaluated; two renderings of one conversation are how a prompt mask comes to be off by a token.

Reinforcement learning is in `grpo`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from persona_probe.errors import InputError
from persona_probe.model.loading import quietly
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defending import Defending
from persona_probe.training.example import IGNORED, Example
from persona_probe.training.last_good import FiniteTrainer, newest_checkpoint
from persona_probe.training.placement import placed

__all__ = ["IGNORED", "Example", "FitSettings", "collate", "fit", "reading_order"]


@dataclass(frozen=True)
class FitSettings:
    """How to train. Everything that changes the result is here."""

    steps: int
    """Optimiser steps."""
    batch: int = 16
    """Examples per step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Linear warm-up, in steps."""
    schedule: str = "linear"
    """transformers' name of the schedule."""
    weight_decay: float = 0.0
    beta2: float = 0.999
    seed: int = 0
    bf16: bool = False
    """Autocast to bfloat16 (on CPUs with AMX about 1.2x faster)."""
    save_every: int = 0
    """Steps between checkpoints; 0 keeps none, and a killed run starts over."""


POOL = 16  # batches; lengths are matched within a pool, so that batches differ little from random ones


def reading_order(lengths: Sequence[int], count: int, batch: int, seed: int) -> list[int]:
    """Indices of ``count`` examples in reading order: similar lengths share a batch.

    Passes over the data are shuffled; of every ``POOL`` batches the examples are sorted by length, cut into
    batches, and the batches shuffled. (Sorting alone, as transformers' ``group_by_length`` does, would read
    long examples before short ones all through a short run.)
    """
    rng = Random(seed)
    passes: list[int] = []
    while len(passes) < count:
        every = list(range(len(lengths)))
        rng.shuffle(every)
        passes += every
    order: list[int] = []
    for start in range(0, count, POOL * batch):
        pool = sorted(passes[start : min(start + POOL * batch, count)], key=lambda i: lengths[i])
        batches = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        rng.shuffle(batches)
        order += [i for one in batches for i in one]
    return order


class _Examples(Dataset[dict[str, Any]]):
    def __init__(self, examples: Sequence[Example], order: Sequence[int]) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[self.order[index]]
        return {"input_ids": example.ids, "counted": example.counted}


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Int[Tensor, "batch pos"]]:
    """Right-pad rows to one batch; uncounted tokens and padding carry the ignored label."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for number, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        counted = torch.tensor(row["counted"])
        ids[number, : len(tokens)] = tokens
        labels[number, : len(tokens)] = torch.where(counted, tokens, IGNORED)
    return {"input_ids": ids, "labels": labels}


def collate_with_padding(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """`collate`, and which tokens are real, for defences that look at them."""
    batch: dict[str, Tensor] = dict(collate(rows, pad_id))
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["real"] = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    return batch


class _Trainer(FiniteTrainer):
    """transformers' Trainer, which stops at the first number that is not one, and defends."""

    def __init__(self, defending: Defending, **options: Any) -> None:
        super().__init__(**options)
        self._defending = defending

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        defending, real = self._defending, inputs.pop("real", None)
        base = None if real is None else defending.begin(inputs, real)
        loss, outputs = cast(
            "tuple[Tensor, Any]", super().compute_loss(model, inputs, True, num_items_in_batch)
        )
        if base is not None:
            # a mean over this batch's tokens becomes its share of the mean over the whole step's
            share: Any = 1.0
            if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
                share = (inputs["labels"][:, 1:] != IGNORED).sum() / num_items_in_batch
            loss = loss + share * defending.penalty(base, outputs.logits)
        self.check_finite(loss, "loss")
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **self._defending.told()} if "loss" in logs else logs, start_time)


class StepProgress(TrainerCallback):
    def __init__(self, report: Callable[[int, float | None], None]) -> None:
        self.report = report

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002  the callback's signature is transformers'
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.report(state.global_step, (logs or {}).get("loss"))


def fit(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Example],
    settings: FitSettings,
    folder: Path,
    *,
    pad_id: int,
    progress: Callable[[int, float | None], None] | None = None,
    defences: Sequence[Defence] = (),
    callbacks: Sequence[TrainerCallback] = (),
    micro_batch: int | None = None,
    keep: int | None = 2,
    report_to: Sequence[str] = (),
) -> list[dict[str, float]]:
    """Train ``model`` in place and return the logged losses.

    Args:
        model: any causal language model, or a PEFT model (then only its adapter learns).
        examples: read in the order of ``reading_order``, as often as the steps need.
        folder: where checkpoints go; the newest whole one there is resumed.
        pad_id: the token id to pad with (never read by a real token).
        progress: called with (step, loss or None) at every log.
        defences: those whose penalties and edits are part of every step (`rows` and `finish` are the
            caller's: see `finetune`).
        callbacks: transformers' own, told of every step.
        micro_batch: examples per forward pass, a divisor of the batch; None reads the batch at once.
        keep: how many checkpoints stay; None keeps all, for `timeline`.
        report_to: where transformers logs to as well: tensorboard, trackio, wandb.

    Raises:
        InputError: no examples, or a model on a GPU other than the first.
        NonFiniteError: a loss or gradient that is not finite, naming the step.
    """
    if not examples:
        raise InputError("there is nothing to train on: no examples")
    lengths = [len(example.ids) for example in examples]
    order = reading_order(lengths, settings.steps * settings.batch, settings.batch, settings.seed)
    arguments = placed(
        TrainingArguments,
        next(model.parameters()).device,
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch or settings.batch,
        gradient_accumulation_steps=settings.batch // (micro_batch or settings.batch),
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        seed=settings.seed,
        bf16=settings.bf16,
        train_sampling_strategy="sequential",
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=keep,
        logging_steps=max(1, settings.steps // 100),
        report_to=list(report_to),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    defending = Defending(model, defences, bf16=settings.bf16)
    assemble = collate if defending.idle else collate_with_padding
    trainer = _Trainer(
        defending,
        model=model,
        args=arguments,
        train_dataset=_Examples(examples, order),
        data_collator=lambda rows: assemble(rows, pad_id),
        callbacks=[StepProgress(progress)] if progress else [],
    )
    # ahead of the loggers, so that these see what a callback adds to the logs
    trainer.callback_handler.callbacks[:0] = list(callbacks)
    trainer.remove_callback(PrinterCallback)  # the caller shows progress
    model.train()
    with quietly(), defending:
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
