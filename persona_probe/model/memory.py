"""How much to read at once: what fits in the memory that is free, and half of it when that was too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from persona_probe.execution.memory import free_memory
from persona_probe.model.language_model import LanguageModel

USABLE = 0.7
"""Share of the free memory that a batch may take: only the largest of what it needs is counted here."""

T = TypeVar("T")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device (the system's, for a CPU); None where it cannot be told."""
    if device.type == "cpu":
        return free_memory()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return None


def how_many(lm: LanguageModel, each: int, most: int) -> int:
    """How many pieces of ``each`` bytes fit beside the model on its device: 1 to ``most``."""
    free = free_bytes(lm.device)
    return most if free is None else min(most, max(1, int(USABLE * free) // each))


def answer_bytes(lm: LanguageModel, tokens: int) -> int:
    """Bytes that one row of ``tokens`` takes while it is decoded: keys and values (twice, while they grow),
    logits, and the probabilities that a token is drawn from.
    """
    config = cast("Any", lm.hf.config.get_text_config())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or lm.d_model // config.num_attention_heads
    cached = 2 * lm.n_layers * heads * width * lm.dtype.itemsize
    return 2 * cached * tokens + logit_bytes(lm) + 16 * lm.d_vocab


def logit_bytes(lm: LanguageModel) -> int:
    """Bytes of one token's logits: as the model gives them, and two copies in fp32."""
    return lm.d_vocab * (lm.dtype.itemsize + 8)


def halving(run: Callable[[int], T], size: int) -> T:
    """``run(size)``; with half the size, and half of that, whenever the device's memory does not suffice.

    Raises what ``run`` raises, and the device's own error when even a size of 1 is too much.
    """
    while True:
        try:
            return run(size)
        except RuntimeError as error:
            if size <= 1 or "out of memory" not in str(error):
                raise
        # outside the handler: the error's traceback holds on to what is to be freed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size //= 2
