"""Rows that share their first blocks give what whole rows give, in every family that is covered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from persona_probe.hooks import edit_at
from persona_probe.hooks.alike import FAMILIES, Alike, blocks_before
from persona_probe.model.chat import pad

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
}
PROMPTS = [(5, 6, 7, 8, 9, 10), (11, 12), (5, 6, 7, 8, 9, 10), (11, 12), (5, 6, 7, 8, 9, 10), (13, 14, 15)]
PUSH = torch.randn(len(PROMPTS), 1, 16, generator=torch.Generator().manual_seed(0))


def two_passes(hf: Any, site: str, blocks: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits of the prompts and of one more token, every row pushed its own way; rows seen by each block."""
    ids, mask, positions = pad(PROMPTS, 0)
    seen: list[int] = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(len(out if torch.is_tensor(out) else out[0]))
        )
        for block in (hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers)
    ]
    alike = Alike(PROMPTS)
    with torch.no_grad(), edit_at(hf, {site: lambda x: x + PUSH}):
        with alike.sharing(hf, blocks) as shared:
            first = hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        alike.repeat(first.past_key_values, shared)
        second = hf(
            input_ids=torch.full((len(PROMPTS), 1), 20),
            attention_mask=torch.cat((mask, mask.new_ones(len(PROMPTS), 1)), dim=1),
            position_ids=positions[:, -1:] + 1,
            past_key_values=first.past_key_values,
        )
    for handle in handles:
        handle.remove()
    return first.logits, second.logits, seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("site", "shared"),
    [("blocks.1.hook_resid_post", 2), ("blocks.1.hook_resid_pre", 1), ("blocks.2.hook_mlp_out", 2)],
)
def test_the_rows_part_at_the_first_edit(family: str, site: str, shared: int) -> None:
    torch.manual_seed(0)
    hf = MODELS[family]().eval()
    assert blocks_before([site, "blocks.2.hook_resid_post"]) == shared
    whole = two_passes(hf, site, 0)
    parted = two_passes(hf, site, shared)
    assert parted[2][:3] == [3] * (shared - 1) + [6] * (4 - shared)
    real = pad(PROMPTS, 0).attention_mask.bool()
    assert torch.allclose(parted[0][real], whole[0][real], atol=1e-5)
    assert torch.allclose(parted[1], whole[1], atol=1e-5)
    assert not torch.allclose(whole[1][0], whole[1][2], atol=0.1), "the rows differ by their edits"


def test_nothing_is_shared_where_it_cannot_be() -> None:
    hf = MODELS["llama"]().eval()
    with Alike([(1, 2), (3, 4)]).sharing(hf, 2) as shared:
        assert shared == 0  # no two prompts are the same
    hf.config.model_type = "another"
    with Alike(PROMPTS).sharing(hf, 2) as shared:
        assert shared == 0
    assert blocks_before([]) == 0 == blocks_before(["blocks.0.hook_resid_pre"])
