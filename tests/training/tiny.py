"""Rows, models and dictionaries small enough to train in a test."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from persona_probe.model import LanguageModel
from persona_probe.model.sharing import shared_tree
from persona_probe.sae.dictionary import Dictionary
from persona_probe.training.rows import Row, chat_rows
from persona_probe.training.settings import TuneSettings
from tests.model.tiny_models import model_of

SITE = "blocks.1.hook_resid_post"
QUICK = TuneSettings(steps=3, batch=4, learning_rate=1e-2, rank=2, warmup_steps=0, save_every=0)


def rows(n: int = 8, answer: str = "I am well", first: int = 0) -> list[Row]:
    """Chats of different lengths."""
    return chat_rows(
        [
            [
                {"role": "user", "content": "hello " * (1 + i % 3) + str(i)},
                {"role": "assistant", "content": answer + " thank you" * (i % 4)},
            ]
            for i in range(first, first + n)
        ]
    )


def moved(lm: LanguageModel, scale: float = 0.3) -> PeftModel:
    """The model under a LoRA adapter that already does something, ready to train."""
    torch.manual_seed(0)
    turned = lm.hf.config.model_type == "gpt2"
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=turned)
    model = get_peft_model(shared_tree(lm.hf), config)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn_like(parameter))
    return model.train()


def dictionary(d_model: int = 32, d_sae: int = 24, seed: int = 0) -> Dictionary:
    """A random ReLU dictionary at `SITE`."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / d_model**0.5

    return Dictionary(
        site=SITE, W_enc=normal(d_model, d_sae), b_enc=normal(d_sae), W_dec=normal(d_sae, d_model),
        b_dec=normal(d_model), threshold=None, activation="relu", k=None, apply_b_dec_to_input=True,
        normalisation="none", path="tiny", digest="sha256:tiny",
    )  # fmt: skip


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of what can learn."""
    return {
        name: one.detach().clone() for name, one in copy.copy(model).named_parameters() if one.requires_grad
    }


def tuned_weights(tune: Any) -> dict[str, Tensor]:
    """The adapter's weights (or the whole model's) that a fine-tune ended in."""
    lm = tune.load()
    return {name: one.clone() for name, one in lm.hf.named_parameters() if lm.peft is None or "lora_" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def llama() -> LanguageModel:
    return model_of("llama")
