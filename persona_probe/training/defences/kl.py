"""Stay close to the base in what is said: `loss + λ KL(p_θ || p_base)`.

Source: Kaczér et al. (2025), "In-training defenses against emergent misalignment", λ 0.1. The
reference is the same model with its adapter switched off; for a full fine-tune a frozen copy.

Departure: none in the formula. The divergence is meant over the distributions that predict the
tokens the loss counts (the paper does not say which), in fp32 and over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.training.defences.defence import Defence, Reading
from persona_probe.training.defences.validate import check_weight


@dataclass(frozen=True)
class KL(Defence):
    """`λ mean KL(p_θ || p_base)` in nats, over the answers' tokens."""

    weight: float = 0.1
    """λ, from 0."""
    name: ClassVar[str] = "kl"
    penalises: ClassVar[bool] = True
    reads_logits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_weight(self.name, self.weight)

    @property
    def strength(self) -> float:
        return self.weight

    def penalty(self, now: Reading, base: Reading) -> Float[Tensor, ""]:
        if now.logits is None or base.logits is None:
            raise InputError("the KL penalty reads the logits of both models")
        log_p = now.logits[now.producing].float().log_softmax(dim=-1)
        log_q = base.logits[now.producing].float().log_softmax(dim=-1)
        return self.weight * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
