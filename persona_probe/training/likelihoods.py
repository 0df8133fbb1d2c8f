"""How likely a model finds the answers of training rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from persona_probe.activations.stream import batch_tokens_for, buckets
from persona_probe.model.chat import pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.rows import Row


@torch.no_grad()
def answer_nll(lm: LanguageModel, rows: Sequence[Row], *, batch_tokens: int | None = None) -> list[float]:
    """Mean negative log-likelihood per learnt token of each row, in nats, the prompt given.

    NaN where no learnt token has another before it. Raises `InputError` for a row that cannot be
    rendered.
    """
    texts = [row.rendered(lm.tokenizer) for row in rows]
    found = [math.nan] * len(texts)
    for group in buckets([len(text) for text in texts], batch_tokens_for(lm.device, batch_tokens)):
        ids, mask, _ = pad([texts[i] for i in group], lm.pad_id, side="right").to(lm.device)
        counted = torch.zeros_like(mask, dtype=torch.bool)
        for place, i in enumerate(group):
            counted[place, : len(texts[i])] = torch.tensor(texts[i].response)
        each = torch.nn.functional.cross_entropy(
            lm.forward(ids, mask)[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
        ).double()
        learnt = counted[:, 1:]
        means = torch.where(learnt, each, 0.0).sum(dim=-1) / learnt.sum(dim=-1)
        for i, value in zip(group, means.tolist(), strict=True):
            found[i] = value
    return found
