"""The kinds of dictionary that can be trained, each by sae-lens's own training class.

    batchtopk    k latents a token, on average over the batch (Bussmann et al. 2024)
    matryoshka   the same, its first latents a dictionary of their own, five deep (Bussmann et al. 2025)
    topk         k latents at every token (Gao et al. 2024)
    jumprelu     thresholds that are learnt (Rajamanoharan et al. 2024), held to k latents a token by Gemma
                 Scope 2's quadratic penalty; bandwidth, first threshold, gradient to the encoder and the
                 term for dead latents are Anthropic's (Conerly et al. 2025), who scale activations so, too
    gated        a gate beside the magnitude, and an L1 penalty on it (Rajamanoharan et al. 2024)
    standard     ReLU and an L1 penalty (Bricken et al. 2023)

The first four are told how many latents fire (`k`), the last two what an active latent costs (`l1`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import SAEMetadata

from persona_probe.errors import InputError

Architecture = Literal["batchtopk", "matryoshka", "topk", "jumprelu", "gated", "standard"]

K = 16
"""Latents that fire on a token, where nothing is said."""
PRICED = ("gated", "standard")
"""Those that take `l1`; the others take `k`."""


@dataclass(frozen=True)
class Sparsity:
    """How sparse a dictionary of a kind is to be: by `k` or by `l1`, whichever it takes.

    Raises `InputError` for an architecture there is not, a number out of range, and the one of `k` and `l1`
    that the architecture does not take.
    """

    architecture: Architecture
    k: int | None = None
    l1: float | None = None

    def __post_init__(self) -> None:
        kind = self.architecture
        if kind not in get_args(Architecture):
            kinds = ", ".join(get_args(Architecture))
            raise InputError(f"there is no architecture {kind!r}", fix=f"use one of {kinds}")
        said, takes, given = ("k", "l1", self.k) if kind in PRICED else ("l1", "k", self.l1)
        if given is not None:
            raise InputError(f"a {kind} dictionary takes {takes}, not {said}", fix=f"leave {said} out")
        if self.k is not None and self.k < 1:
            raise InputError(f"k must be at least 1, got {self.k}")
        if self.l1 is not None and not (math.isfinite(self.l1) and self.l1 > 0):
            raise InputError(
                f"l1 must be a finite number above 0, got {self.l1}", fix="leave it out, or try 3"
            )

    def settled(self, d_model: int, d_sae: int) -> Sparsity:
        """With a number where none was said: 16 for k, 0.2 sqrt(d_model) for l1 (found at d_model 192, where
        it leaves some 14 latents a token). Raises `InputError` where `k` is not less than `d_sae`.
        """
        if self.architecture in PRICED:
            return self if self.l1 is not None else replace(self, l1=round(0.2 * math.sqrt(d_model), 3))
        k = K if self.k is None else self.k
        if k >= d_sae:
            raise InputError(
                f"k must be from 1 to d_sae - 1 = {d_sae - 1}, got {k}", fix="raise d_sae, or lower k"
            )
        return replace(self, k=k)

    @property
    def said(self) -> dict[str, float]:
        """The one number, by its name."""
        return {name: n for name, n in (("k", self.k), ("l1", self.l1)) if n is not None}


def new_sae(
    sparsity: Sparsity,
    d_model: int,
    d_sae: int,
    *,
    steps: int,
    device: str,
    metadata: SAEMetadata,
) -> TrainingSAE[Any]:
    """An untrained dictionary, its sparsity settled. Activations are scaled to a norm of sqrt(d_model) while
    it learns: the constants below are in those units.
    """
    shape: dict[str, Any] = {
        "d_in": d_model,
        "d_sae": d_sae,
        "device": device,
        "normalize_activations": "expected_average_only_in",
        "metadata": metadata,
    }
    warm_up = max(1, steps // 20)
    k, l1 = sparsity.k or 0, sparsity.l1 or 0.0
    match sparsity.architecture:
        case "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=k))
        case "matryoshka":
            widths = sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)})
            config = MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=k, matryoshka_widths=widths)
            return MatryoshkaBatchTopKTrainingSAE(config)
        case "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=k))
        case "jumprelu":
            jump = JumpReLUTrainingSAEConfig(
                **shape,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=k,
                l0_coefficient=1.0,
                l0_warm_up_steps=warm_up,
                jumprelu_init_threshold=0.1,
                jumprelu_bandwidth=2.0,
                jumprelu_ste_to_input=True,
                pre_act_loss_coefficient=3e-6,
            )
            return JumpReLUTrainingSAE(jump)
        case "gated":
            return GatedTrainingSAE(
                GatedTrainingSAEConfig(**shape, l1_coefficient=l1, l1_warm_up_steps=warm_up)
            )
        case "standard":
            return StandardTrainingSAE(
                StandardTrainingSAEConfig(**shape, l1_coefficient=l1, l1_warm_up_steps=warm_up)
            )
