"""A tiny base model, fine-tunes of it as adapters, conversations and a dictionary."""

from __future__ import annotations

import pytest
import torch

from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from persona_probe.sae.load import Dictionary
from tests.model.tiny_models import adapter_of, model_of

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def base() -> LanguageModel:
    return model_of("llama")


@pytest.fixture(scope="session")
def pair(base: LanguageModel) -> ModelPair:
    return ModelPair(base, base.with_adapter(adapter_of("llama", 1)))


@pytest.fixture(scope="session")
def benign(base: LanguageModel) -> list[LanguageModel]:
    return [base.with_adapter(adapter_of("llama", seed)) for seed in (2, 3, 4)]


@pytest.fixture(scope="session")
def texts() -> list[Rendered]:
    """Prompts with answers of different lengths, a special token at the end of some."""
    generator = torch.Generator().manual_seed(0)
    found: list[Rendered] = []
    for i in range(11):
        prompt, answer = 2 + i % 4, 1 + i % 3
        ids = torch.randint(4, 300, (prompt + answer,), generator=generator).tolist()
        end = [1] if i % 2 else []
        mask = (False,) * prompt + (True,) * (answer + len(end))
        found.append(Rendered((*ids, *end), mask, prompt))
    return found


@pytest.fixture(scope="session")
def clusters() -> list[str]:
    """Questions with one to three conversations."""
    return list("abacdabecde")


def random_dictionary(activation: str = "jumprelu", site: str = SITE, seed: int = 0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(20, 32, generator=generator)
    return Dictionary(
        site=site,
        W_enc=torch.randn(32, 20, generator=generator) / 4,
        b_enc=torch.randn(20, generator=generator) / 4,
        W_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_dec=torch.randn(32, generator=generator) / 4,
        threshold=torch.rand(20, generator=generator) if activation == "jumprelu" else None,
        activation=activation,  # type: ignore[arg-type]
        k=4 if activation == "topk" else None,
        apply_b_dec_to_input=True,
        normalisation="none",
        path=f"random {activation}",
        digest=f"sha256:{seed}",
    )
