"""Levels and thresholds from data: the amounts of a target on given texts, and where to draw the line.

A threshold at a false-positive rate is an order statistic of the amounts on texts that should *not*
be touched. With n of them it is the ceil((n + 1)(1 - rate))-th smallest, so that a new text of the
same kind exceeds it with probability at most `rate` (split conformal prediction; Vovk et al. 2005).
That holds for units that are drawn alike: prompts. Tokens of one text are not, so that a rate per
token is only as good as the texts are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.errors import InputError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.intervention import Condition, Level, Unit
from persona_probe.steering.target import Read, Target


@dataclass(frozen=True, eq=False)
class Amounts:
    """z of a target on texts, and the scale of the site."""

    values: Float[Tensor, "token latent"]
    document: Int[Tensor, " token"]
    residual_rms: float

    def per_document(self) -> Float[Tensor, "document latent"]:
        """The highest of each text that has a token counted."""
        kept = self.document.unique()
        return torch.stack([self.values[self.document == i].amax(dim=0) for i in kept])

    def scale(self, unit: Unit) -> float | tuple[float, ...]:
        """What one of a level's unit is, in absolute amounts: for `Level.in_unit`."""
        match unit:
            case "absolute":
                return 1.0
            case "residual_rms":
                return self.residual_rms
            case "max_activation":
                return tuple(self.values.amax(dim=0).tolist())
            case "base_mean":
                return tuple(self.values.mean(dim=0).tolist())

    def level(self, *values: float, unit: Unit) -> Level:
        """A level in one of the units, with its scale as measured here."""
        return Level(tuple(values), unit, self.scale(unit))


def amounts_on(
    lm: LanguageModel,
    conversations: Sequence[Rendered],
    target: Target,
    site: str,
    *,
    read: Read | Literal["auto"] = "auto",
    mask: TokenMask | None = None,
    sink_factor: float | None = 10.0,
) -> Amounts:
    """The amounts of `target` at the counted tokens (default: all but special ones), attention sinks
    left out (`sink_factor` as for `activations.stream`).

    Raises what `activations.stream` raises.
    """
    how: Read = ("projection" if target.encoder is None else "encoder") if read == "auto" else read
    values: list[Tensor] = []
    documents: list[Tensor] = []
    squares = 0.0
    for chunk in stream([lm], conversations, [site], mask or TokenMask("all"), sink_factor=sink_factor):
        x = chunk.activations[0, site].detach()
        values.append(target.amounts(x, how).cpu())
        documents.append(chunk.document)
        squares += float(x.double().square().sum())
    found = torch.cat(values)
    rms = math.sqrt(squares / (len(found) * target.d_model))
    return Amounts(found, torch.cat(documents), rms)


@dataclass(frozen=True)
class Threshold:
    """An amount that texts to be left alone exceed at a stated rate."""

    value: float
    rate: float
    """As asked: at most this share of new ones exceeds it."""
    seen: float
    """The share of the texts (or tokens) it was set on that exceed it."""
    n: int
    """How many these were."""
    decided: Literal["token", "prompt"]

    def condition(self, of: Target | None = None, read: Read | Literal["auto"] = "auto") -> Condition:
        """For an intervention; `of` is what was measured, unless that is also what is edited."""
        return Condition("above", self.value, of, "auto" if of is None else read, self.decided)

    def __str__(self) -> str:
        exceeding = f"exceeded by {self.seen:.3g} of {self.n} {self.decided}s"
        return f"{self.value:.4g}: {exceeding} (asked: {self.rate:g})"


def threshold_at(
    rate: float,
    lm: LanguageModel,
    harmless: Sequence[Rendered],
    target: Target,
    site: str,
    *,
    decided: Literal["token", "prompt"] = "prompt",
    read: Read | Literal["auto"] = "auto",
    mask: TokenMask | None = None,
) -> Threshold:
    """The threshold that harmless texts exceed at most at `rate`: per prompt, or per token.

    `harmless` are texts on which nothing should be edited; for prompts their highest amount counts,
    as it does when a condition is decided on the prompt. Raises `InputError` for a rate that so few
    texts cannot show: n prompts can show 1 / (n + 1) at best.
    """
    if not 0 < rate < 1:
        raise InputError(f"a false-positive rate lies between 0 and 1, got {rate}")
    if target.n_latents != 1:
        raise InputError(f"a threshold is of one latent or direction, not {target.n_latents}")
    chosen = mask or TokenMask("prompt" if decided == "prompt" else "all", drop_special=False)
    # an edit acts on sinks and special tokens too, so they count
    found = amounts_on(lm, harmless, target, site, read=read, mask=chosen, sink_factor=None)
    units = found.per_document() if decided == "prompt" else found.values
    return threshold_of(units[:, 0], rate, decided)


def threshold_of(
    amounts: Float[Tensor, " unit"], rate: float, decided: Literal["token", "prompt"] = "prompt"
) -> Threshold:
    """`threshold_at` of amounts that are there already."""
    n = len(amounts)
    place = math.ceil((n + 1) * (1 - rate) - 1e-9)
    if place > n:
        raise InputError(
            f"{n} {decided}s cannot show a false-positive rate of {rate:g}",
            fix=f"give at least {math.ceil(1 / rate) - 1}, or allow a higher rate",
        )
    value = float(amounts.double().sort().values[place - 1])
    return Threshold(value, rate, float((amounts.double() > value).double().mean()), n, decided)
