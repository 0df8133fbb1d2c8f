"""Supervised training on token ids: one function for pre-training and for narrow fine-tunes.

transformers' ``Trainer`` runs it, so checkpoints, resuming and logs are those users know. Loss counts
only the tokens an example marks. Batches are right-padded and carry no attention mask: under causal
attention no real token sees the padding behind it, and the mask-free kernels are faster.

Not covered here: reinforcement learning and the defences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from persona_probe.artifact import read_json
from persona_probe.errors import InputError
from persona_probe.model.loading import quietly

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """Token ids of one document and which of them the loss counts."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.counted):
            raise InputError(f"{len(self.ids)} token ids but {len(self.counted)} loss marks")
        if not any(self.counted):
            raise InputError(
                "an example has no token that the loss counts",
                fix="give every conversation an assistant turn",
            )


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


class _Progress(TrainerCallback):
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
) -> list[dict[str, float]]:
    """Train ``model`` in place and return the logged losses.

    Args:
        model: any causal language model, or a PEFT model (then only its adapter learns).
        examples: read in the order of ``reading_order``, as often as the steps need.
        folder: where checkpoints go; the newest whole one there is resumed.
        pad_id: the token id to pad with (never read by a real token).
        progress: called with (step, loss or None) at every log.

    Raises:
        InputError: no examples.
    """
    if not examples:
        raise InputError("there is nothing to train on: no examples")
    lengths = [len(example.ids) for example in examples]
    order = reading_order(lengths, settings.steps * settings.batch, settings.batch, settings.seed)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type=settings.schedule,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        logging_steps=max(1, settings.steps // 100),
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Examples(examples, order),
        data_collator=lambda rows: collate(rows, pad_id),
        callbacks=[_Progress(progress)] if progress else [],
    )
    trainer.remove_callback(PrinterCallback)  # the caller shows progress
    model.train()
    with quietly():
        trainer.train(resume_from_checkpoint=_newest_checkpoint(folder))
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _newest_checkpoint(folder: Path) -> str | None:
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda one: -int(one.name.split("-")[1]))
    return next((str(one) for one in newest_first if _is_whole(one)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Its state is written last: a save that was killed, or for which the disk was full, has none."""
    try:
        read_json(checkpoint / "trainer_state.json")
    except InputError:
        return False
    return True
