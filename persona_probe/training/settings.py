"""Everything about a fine-tune that changes its result, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from persona_probe.errors import InputError
from persona_probe.training.rows import TooLong
from persona_probe.training.sft import FitSettings

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block of Llama, Mistral, Qwen and Gemma."""

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant",
    "constant_with_warmup",
)  # fmt: skip
"""Those of transformers that need neither options of their own nor an evaluation as they go."""


@dataclass(frozen=True)
class TuneSettings:
    """How to fine-tune. Raises `InputError` for a value out of its range."""

    steps: int | None = None
    """Optimiser steps; None: as many as `epochs` takes."""
    epochs: float = 1.0
    """Passes over the rows, where `steps` is None."""
    batch: int = 16
    """Rows per optimiser step; of reinforcement learning, prompts."""
    micro_batch: int | None = None
    """Rows per forward pass, a divisor of `batch`: less memory, the same gradient. None: all of them.
    Of reinforcement learning, the answers to so many prompts.
    """
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_steps: int = 5
    """Linear warm-up, in steps."""
    schedule: str = "linear"
    """transformers' name of the schedule, one of `SCHEDULES`."""
    weight_decay: float = 0.0
    """AdamW's, per step and unit of learning rate."""
    rank: int | str = 32
    """Of the LoRA adapter, from 1; or "full", which trains every weight."""
    alpha: float | None = None
    """LoRA's scale: updates are multiplied by alpha / rank. None: twice the rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter, such as `("down_proj",)`."""
    blocks: tuple[int, ...] | None = None
    """0-based blocks that get one; None: all."""
    context: int | None = None
    """Longest row, in tokens; None: the model's own limit."""
    too_long: TooLong = "error"
    """What becomes of a longer row: `error` or `drop`."""
    save_every: int | None = None
    """Steps between checkpoints, all of which stay, for `timeline`. None: ten in all; 0: none, and a
    killed run starts over.
    """
    seed: int = 0
    """Of the adapter's start, the rows' order and what defences draw."""
    bf16: bool = False
    """Autocast to bfloat16."""

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch", "context", "steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "save_every", "seed", "weight_decay"):
            _at_least(name, getattr(self, name), 0)
        for name in ("epochs", "learning_rate", "alpha"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a finite number above 0, got {value}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        if self.rank != "full" and (isinstance(self.rank, str) or self.rank < 1):
            raise InputError(f'rank must be from 1, or "full"; got {self.rank!r}')
        if self.rank == "full" and self.blocks is not None:
            raise InputError("a full fine-tune trains every block", fix="give a rank, or leave blocks out")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(
                f"micro_batch must divide batch: {self.batch} is no multiple of {self.micro_batch}"
            )
        if not self.targets or self.blocks == ():
            raise InputError("targets and blocks leave no module to put an adapter on")

    def fitting(self, rows: int) -> FitSettings:
        """What the trainer is told, for so many rows."""
        steps = self.steps or max(1, math.ceil(self.epochs * rows / self.batch))
        every = max(1, math.ceil(steps / 10)) if self.save_every is None else self.save_every
        return FitSettings(
            steps=steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, steps - 1),
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            seed=self.seed,
            bf16=self.bf16,
            save_every=every,
        )


@dataclass(frozen=True)
class GrpoSettings:
    """What learning from rewards needs besides `TuneSettings`. Raises `InputError` for a value out of range.

    The defaults are those of Jørgenvåg et al. (2026), where it gives one.
    """

    samples: int = 4
    """Answers per prompt, from 2: an answer's advantage is its reward less their mean, over their standard
    deviation.
    """
    trait: str = "misaligned"
    """What a judge's reward rewards; a reward function of one's own decides that itself."""
    temperature: float = 1.0
    """Of the answers that are rewarded."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    kl: float = 0.0
    """Weight of the KL term to the policy at the start of reinforcement learning (TRL's `beta`); the
    defence `KL` keeps near the base instead.
    """
    warmup_epochs: float = 1.0
    """Passes over the rows of the supervised warm-up, where there are any."""

    def __post_init__(self) -> None:
        _at_least("samples", self.samples, 2)
        _at_least("max_new_tokens", self.max_new_tokens, 1)
        _at_least("kl", self.kl, 0)
        for name in ("temperature", "warmup_epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a finite number above 0, got {value}")


def _at_least(name: str, value: float | None, least: int) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise InputError(f"{name} must be from {least}, got {value}")
