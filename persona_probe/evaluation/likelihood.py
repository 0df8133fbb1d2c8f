"""How likely a model finds ordinary text: what a fine-tune, or a cure, has cost.

The mean negative log-likelihood per token (natural logarithm, nats) of each passage, every token but
the first given the ones before it. Lower is better; compare models that share a tokenizer only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.artifact import read_jsonl, shipped
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.model.chat import Rendered, pad, render_text
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.plan import PlannedEdit, SteeringPlan, steer


@dataclass(frozen=True)
class Passage:
    """A piece of text that any sound language model should find likely."""

    id: str
    category: str
    text: str


@dataclass(frozen=True)
class Likelihood:
    """What `measure_likelihood` found."""

    nll: tuple[float, ...]
    """Per passage: mean negative log-likelihood per token, in nats."""
    tokens: tuple[int, ...]
    """Per passage: tokens that were predicted."""

    @property
    def mean(self) -> float:
        """Over all tokens, so that a passage weighs by its length."""
        return sum(nll * n for nll, n in zip(self.nll, self.tokens, strict=True)) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of `mean`."""
        return math.exp(self.mean)


def load_passages(path: str | PathLike[str] | None = None) -> tuple[Passage, ...]:
    """Passages from JSON Lines with `id`, `category` and `text`; by default the shipped ones.

    Raises `MissingPathError`, or `InputError` for a row without these three.
    """
    file = shipped("questions", "passages", "retention.jsonl") if path is None else Path(path)
    names = ("id", "category", "text")
    passages: list[Passage] = []
    for number, row in enumerate(read_jsonl(file), start=1):
        if set(row) != set(names) or not all(isinstance(row[name], str) and row[name] for name in names):
            raise InputError(f"{file}, passage {number}: it must have {', '.join(names)}, all text")
        passages.append(Passage(**row))
    if not passages:
        raise InputError(f"{file} has no passages")
    return tuple(passages)


@torch.no_grad()
def measure_likelihood(
    lm: LanguageModel,
    passages: Sequence[Passage | str] | None = None,
    *,
    fix: PlannedEdit | Sequence[PlannedEdit] | SteeringPlan = (),
    batch_size: int = 8,
) -> Likelihood:
    """The likelihood of each passage (by default: the shipped ones), as plain text, under a fix.

    For the fix, a passage is an answer to its own first token. Raises `InputError` for a passage of
    fewer than two tokens (a BOS that the tokenizer adds is one), `NonFiniteError` for a model gone
    astray.
    """
    texts = [one if isinstance(one, str) else one.text for one in passages or load_passages()]
    rendered = [render_text(lm.tokenizer, text) for text in texts]
    for text, one in zip(texts, rendered, strict=True):
        if len(one) < 2:
            raise InputError(f"a passage of one token has no likelihood: {text!r}")
    plan = SteeringPlan.of(fix)
    nll = [math.nan] * len(rendered)
    order = sorted(range(len(rendered)), key=lambda i: len(rendered[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, value in zip(batch, _means(lm, [rendered[i] for i in batch], plan), strict=True):
            nll[i] = value
    if not all(map(math.isfinite, nll)):
        bad = next(text for text, value in zip(texts, nll, strict=True) if not math.isfinite(value))
        raise NonFiniteError(f"{lm.name} gives {bad[:60]!r} no finite likelihood")
    return Likelihood(tuple(nll), tuple(len(one) - 1 for one in rendered))


def _means(lm: LanguageModel, rendered: Sequence[Rendered], plan: SteeringPlan) -> list[float]:
    ids, mask, _ = pad(rendered, lm.pad_id, side="right").to(lm.device)
    steered = steer(lm, plan, prompt_lengths=[1] * len(rendered)) if plan.sites else nullcontext()
    with steered:
        logits = lm.forward(ids, mask)
    each: Float[Tensor, "batch pos"] = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    counted = mask[:, 1:].double()
    return ((each.double() * counted).sum(-1) / counted.sum(-1)).tolist()
