"""The kinds of dictionary that can be trained, each by sae-lens's own training class.

    batchtopk    k latents a token, on average over the batch (Bussmann et al. 2024)
    matryoshka   the same, its first latents a dictionary of their own, five deep (Bussmann et al. 2025)
    topk         k latents at every token (Gao et al. 2024)
    jumprelu     thresholds that are learnt, held to k latents a token by a quadratic penalty (Rajamanoharan
                 et al. 2024; the penalty is Gemma Scope 2's)
    gated        a gate beside the magnitude, and an L1 penalty on it (Rajamanoharan et al. 2024)
    standard     ReLU and an L1 penalty (Bricken et al. 2023)

The first four are told how many latents fire (`k`), the last two what an active latent costs (`l1`).
"""

from __future__ import annotations

import math
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


def check_sparsity(architecture: str, k: int | None, l1: float | None) -> None:
    """Raise `InputError` for an architecture there is not, a number out of range, and the one of `k` and `l1`
    that the architecture does not take.
    """
    if architecture not in get_args(Architecture):
        raise InputError(
            f"there is no architecture {architecture!r}",
            fix=f"use one of {', '.join(get_args(Architecture))}",
        )
    said, takes, given = ("k", "l1", k) if architecture in PRICED else ("l1", "k", l1)
    if given is not None:
        raise InputError(f"a {architecture} dictionary takes {takes}, not {said}", fix=f"leave {said} out")
    if k is not None and k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if l1 is not None and not (math.isfinite(l1) and l1 > 0):
        raise InputError(f"l1 must be a finite number above 0, got {l1}", fix="leave it out, or try 3")


def sparsity(architecture: str, k: int | None, l1: float | None, d_model: int) -> dict[str, float]:
    """How sparse the dictionary is to be, `{"k": ...}` or `{"l1": ...}`; 16, or 0.2 sqrt(d_model) (found at
    d_model 192, where it leaves some 14 latents a token), where nothing is said.
    """
    if architecture in PRICED:
        return {"l1": round(0.2 * math.sqrt(d_model), 3) if l1 is None else l1}
    return {"k": K if k is None else k}


def new_sae(
    architecture: Architecture,
    d_model: int,
    d_sae: int,
    amount: float,
    *,
    steps: int,
    device: str,
    metadata: SAEMetadata,
) -> TrainingSAE[Any]:
    """An untrained dictionary; `amount` is its `k` or `l1`. Activations are scaled to a norm of sqrt(d_model)
    while it learns.
    """
    shape: dict[str, Any] = {
        "d_in": d_model,
        "d_sae": d_sae,
        "device": device,
        "normalize_activations": "expected_average_only_in",
        "metadata": metadata,
    }
    warm_up = max(1, steps // 20)
    match architecture:
        case "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=amount))
        case "matryoshka":
            widths = sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)})
            config = MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=amount, matryoshka_widths=widths)
            return MatryoshkaBatchTopKTrainingSAE(config)
        case "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=int(amount)))
        case "jumprelu":
            jump = JumpReLUTrainingSAEConfig(
                **shape,
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=amount,
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
                GatedTrainingSAEConfig(**shape, l1_coefficient=amount, l1_warm_up_steps=warm_up)
            )
        case "standard":
            return StandardTrainingSAE(
                StandardTrainingSAEConfig(**shape, l1_coefficient=amount, l1_warm_up_steps=warm_up)
            )
