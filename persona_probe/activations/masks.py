"""Which tokens count.

By place (`TokenMask`): the prompt, the answer, everything; special tokens aside. And by norm
(`sinks`): attention sinks have norms more than ten times the rest and swamp every mean.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.model.chat import Rendered

Kind = Literal["all", "prompt", "response", "last_prompt", "answer"]


@dataclass(frozen=True)
class Account:
    """The tokens of one conversation under a mask. Sinks show only when a model reads them."""

    chosen: list[bool]
    """Of each token: does it count?"""
    covered: int
    """Tokens in the place that the mask names."""
    special: int
    """Of those, left out as special."""
    bos: int
    """Of the special ones, how many are BOS (which in some vocabularies also ends texts)."""

    @property
    def selected(self) -> int:
        """Tokens that count."""
        return sum(self.chosen)

    @property
    def skipped(self) -> int:
        """Tokens left out by `first_k` and `skip_first`."""
        return self.covered - self.special - self.selected


@dataclass(frozen=True)
class TokenMask:
    """Which tokens of a conversation count.

    `prompt` is everything before the final assistant turn, `response` what the assistant wrote from
    there on, `last_prompt` the token that produces the first token of the answer, and `answer` that
    token and the response (the tokens of the Δ latent). The last prompt token counts even where it
    is special, as in a template that ends in `<|assistant|>`.
    """

    kind: Kind = "answer"
    first_k: int | None = None
    """Of the tokens that are left, count only so many, from the front."""
    skip_first: int = 0
    """Of the tokens that are left, do not count so many at the front."""
    drop_special: bool = True
    """Do not count special tokens (BOS, end of turn)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"there is no mask {self.kind!r}", fix=f"use one of {get_args(Kind)}")
        if self.skip_first < 0 or (self.first_k is not None and self.first_k < 1):
            raise InputError(
                "skip_first must be at least 0 and first_k at least 1; "
                f"got {self.skip_first} and {self.first_k}"
            )

    def select(self, rendered: Rendered, special_ids: Collection[int] = ()) -> list[bool]:
        """Per token of the conversation: does it count?"""
        last = rendered.prompt_length - 1
        chosen = [self._covers(i, last, rendered) for i in range(len(rendered))]
        if self.drop_special:
            exempt = last if last > 0 and self.kind in ("last_prompt", "answer") else -1
            chosen = [
                kept and (i == exempt or rendered.ids[i] not in special_ids) for i, kept in enumerate(chosen)
            ]
        if self.skip_first or self.first_k is not None:
            end = None if self.first_k is None else self.skip_first + self.first_k
            kept = set([i for i, counted in enumerate(chosen) if counted][self.skip_first : end])
            chosen = [i in kept for i in range(len(chosen))]
        return chosen

    def account(self, rendered: Rendered, special_ids: Collection[int] = (), bos: object = None) -> Account:
        """What `select` takes of a conversation, and what it leaves out, by the reason; `bos` is BOS's id."""
        place = replace(self, first_k=None, skip_first=0)
        covered = replace(place, drop_special=False).select(rendered)
        kept = place.select(rendered, special_ids)
        chosen = kept if self == place else self.select(rendered, special_ids)
        dropped = [i for a, b, i in zip(covered, kept, rendered.ids, strict=True) if a and not b]
        return Account(chosen, sum(covered), len(dropped), sum(i == bos for i in dropped))

    def _covers(self, i: int, last: int, rendered: Rendered) -> bool:
        match self.kind:
            case "all":
                return True
            case "prompt":
                return i <= last
            case "last_prompt":
                return i == last
            case "response":
                return i > last and rendered.response[i]
            case "answer":
                return i == last or (i > last and rendered.response[i])


def sinks(
    norms_base: Float[Tensor, "*batch pos"],
    attention_mask: Int[Tensor, "*batch pos"] | Bool[Tensor, "*batch pos"] | None = None,
    factor: float = 10.0,
) -> Bool[Tensor, "*batch pos"]:
    """Tokens whose norm is more than `factor` times the median over their own document, padding aside.

    Measured on the base model, and applied to every model that is compared with it.
    """
    if attention_mask is None:
        median = norms_base.median(dim=-1, keepdim=True).values
        return norms_base > factor * median
    real = attention_mask.bool()
    median = norms_base.masked_fill(~real, torch.nan).nanmedian(dim=-1, keepdim=True).values
    return (norms_base > factor * median) & real
