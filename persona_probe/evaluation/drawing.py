"""Drawing tokens with numbers that belong to the answer, not to the run.

Each token is found by inverting the cumulative distribution at a uniform number fixed by (seed,
question id, sample, place in the answer) alone.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@functools.lru_cache(maxsize=1 << 14)  # an audit draws the same answers in dozens of arms
def uniforms(seed: int, question_id: str, sample: int, n: int) -> Float[np.ndarray, " n"]:
    """The n numbers in [0, 1) that draw the answer: Philox, keyed by a hash of the first three
    arguments.
    """
    key = hashlib.blake2b(f"{seed}\0{question_id}\0{sample}".encode(), digest_size=16).digest()
    drawn = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(n)
    drawn = np.minimum(drawn, 1 - 2.0**-32)  # so that no rounding can push it up to 1
    drawn.setflags(write=False)
    return drawn


def draw(
    logits: Float[Tensor, "row d_vocab"],
    uniform: Float[Tensor, " row"],
    *,
    temperature: int | float = 1.0,
    top_p: int | float = 1.0,
    top_k: int | None = None,
) -> Int[Tensor, " row"]:
    """The token at which the cumulative probability, in the order of the token ids, passes
    `uniform`.

    The filters work in transformers' order: temperature, top-k, then top-p of what that left. Where
    logits tie at the k-th place, all of them stay.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probability = torch.softmax(logits, dim=-1)
    if top_p < 1:
        ordered, ids = probability.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
        kept = torch.where(before < top_p, ordered, 0.0)
        probability = torch.zeros_like(probability).scatter_(-1, ids, kept)
    cumulative = probability.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
