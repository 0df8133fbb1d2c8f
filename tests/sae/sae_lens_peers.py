"""sae-lens dictionaries with random weights, as peers to compare with."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from persona_probe.sae.load import Dictionary, from_sae_lens

D_MODEL, D_SAE, SITE = 12, 40, "blocks.1.hook_resid_post"

KINDS: dict[str, tuple[type[SAE[Any]], type[Any], dict[str, Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
    "topk by norm": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
}
READABLE = ("standard", "jumprelu", "topk", "topk by norm", "gated")


def peer(kind: str, seed: int = 0, site: str | None = SITE, **options: Any) -> SAE[Any]:
    """A random inference SAE: every weight matters, decoder rows have different norms."""
    cls, config, extra = KINDS[kind]
    settings = {"d_in": D_MODEL, "d_sae": D_SAE, **extra, **options}
    sae = cls(config(metadata=SAEMetadata(hook_name=site, model_name="tiny"), **settings))
    randomise(sae, seed)
    return sae


def randomise(sae: SAE[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn.abs() if name == "threshold" else drawn)
    sae.W_dec.data *= torch.rand(sae.cfg.d_sae, 1, generator=generator) + 0.2


def batchtopk(seed: int = 0) -> BatchTopKTrainingSAE:
    """A random training SAE with a threshold, decoder norms folded in only when saved."""
    metadata = SAEMetadata(hook_name=SITE)
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=5, metadata=metadata))
    randomise(sae, seed)
    sae.topk_threshold.fill_(1.5)
    return sae


def dictionary(kind: str, seed: int = 0) -> Dictionary:
    return from_sae_lens(peer(kind, seed))


def inputs(n: int = 50, seed: int = 1, width: int = D_MODEL) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 2
