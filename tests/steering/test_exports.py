"""A fix baked into weights is the fix with hooks, wherever weights can carry it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
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

from persona_probe.errors import InputError
from persona_probe.model import Checkpoint, LanguageModel, load_model
from persona_probe.steering import Condition, Intervention, Level, latents, matched_random, steer
from persona_probe.steering.carriers import projected_out
from persona_probe.steering.exports import bake
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, VOCAB, make_dictionary, make_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D_MODEL, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "mistral, windowed": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
    "mistral, wide window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=D_MODEL,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    ),
}


def model(family: str) -> LanguageModel:
    torch.manual_seed(0)
    hf = FAMILIES[family]().eval()
    for name, parameter in hf.named_parameters():
        if name.endswith("bias"):  # as if trained: a bias of 0 would hide what happens to it
            torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel(Checkpoint(f"memory:{family}"), hf, make_tokenizer())


def vector(seed: int = 1) -> torch.Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))


def add(site: str, **fields: Any) -> Intervention:
    return Intervention("add", direction(vector()), site, level=Level((2.0,)), gain=1.5, **fields)


def edit(op: Any, target: Any = None, site: str = "blocks.0.hook_resid_post", **fields: Any) -> Intervention:
    return Intervention(op, target or direction(vector()), site, **fields)


SHIFTS = [f"blocks.{b}.hook_{k}" for b, k in ((0, "resid_post"), (1, "resid_pre"), (1, "resid_mid"))]
LINEAR = {
    "project_out": edit(
        "project_out", direction(torch.stack([vector(), vector(2)])), "blocks.0.hook_mlp_out"
    ),
    "over-corrected": edit("project_out", site="blocks.1.hook_attn_out", gain=2.0),
    "scaled": edit("scale", site="blocks.1.hook_mlp_out", level=Level((-0.5,))),
    "embedding": edit("ablate", site="blocks.0.hook_resid_pre"),
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_the_checkpoint_is_the_model_with_hooks(family: str, tmp_path: Path) -> None:
    lm = model(family)
    ids = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(3))
    plain = lm.forward(ids)
    fixes: dict[str, list[Any]] = {name: [edit] for name, edit in LINEAR.items()}
    fixes["everything"] = list(projected_out(lm, direction(vector())))
    if family != "qwen3":
        clamp = Intervention("clamp", direction(vector(4)), "blocks.0.hook_mlp_out", level=Level((0.7,)))
        fixes |= {site: [add(site)] for site in SHIFTS}
        fixes["together"] = [clamp, *(add(site) for site in SHIFTS[:2]), LINEAR["over-corrected"]]
    else:
        fixes["mid"] = [add("blocks.1.hook_resid_mid")]
    for number, (name, fix) in enumerate(fixes.items()):
        baked = bake(lm, fix, tmp_path / str(number))
        loaded: Any = AutoModelForCausalLM.from_pretrained(baked.path)
        with steer(lm, fix):
            want = lm.forward(ids)
        with torch.no_grad():
            got = loaded(ids).logits
        assert torch.allclose(got, want, atol=2e-4), name
        assert not torch.allclose(got, plain, atol=1e-2), name
    assert torch.equal(lm.forward(ids), plain)  # the model itself is as it was


def test_nothing_of_the_direction_is_left_in_the_stream(tmp_path: Path) -> None:
    lm = model("llama")
    unit = direction(vector()).unit[0]
    loaded = load_model(bake(lm, projected_out(lm, direction(vector())), tmp_path / "out").path)
    with torch.no_grad():
        states = loaded.hf(torch.tensor([[4, 5, 6]]), output_hidden_states=True).hidden_states
    assert all(float((state @ unit).abs().max()) < 1e-5 for state in states[:-1])


def test_a_qwen_is_written_as_a_llama_only_where_it_must_be(tmp_path: Path) -> None:
    lm = model("qwen2")
    assert bake(lm, LINEAR["scaled"], tmp_path / "a").architecture == "Qwen2ForCausalLM"
    assert bake(lm, add("blocks.0.hook_resid_post"), tmp_path / "b").architecture == "LlamaForCausalLM"


def test_a_window_is_kept_or_never_comes_into_effect(tmp_path: Path) -> None:
    ids = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))
    narrow, wide = model("mistral, windowed"), model("mistral, wide window")
    for lm, fix, wanted in (
        (narrow, LINEAR["scaled"], "MistralForCausalLM"),
        (wide, add(SHIFTS[0]), "LlamaForCausalLM"),
    ):
        baked = bake(lm, fix, tmp_path / wanted, texts=ids)  # compares with the hooks itself
        assert baked.architecture == wanted
        with steer(lm, fix):
            assert torch.allclose(load_model(baked.path).forward(ids), lm.forward(ids), atol=2e-4)


@pytest.mark.parametrize(
    ("family", "edit", "says"),
    [
        ("llama", edit("cap", level=Level((1.0,))), "a cap is not a bias"),
        ("llama", edit("floor", level=Level((1.0,))), "a floor is not"),
        ("llama", edit("ablate", latents(make_dictionary(), [3]), "blocks.0.hook_mlp_out"), "not linear"),
        ("llama", add(SHIFTS[0], positions="response"), "every token"),
        ("llama", add(SHIFTS[0], condition=Condition("active")), "condition depends"),
        ("llama", edit("project_out"), "passes blocks.0.hook_resid_post by"),
        ("llama", matched_random(add(SHIFTS[0]), torch.Generator().manual_seed(0)), "random control"),
        ("llama", add(SHIFTS[0]).with_gain(0.0), "no edit"),
        ("qwen3", add(SHIFTS[0]), "'qwen3' the MLP's output layer can have no bias"),
        ("gemma2", add(SHIFTS[0]), "'gemma2'"),
        ("mistral, windowed", add(SHIFTS[0]), "sliding-window attention cannot be written as a Llama"),
    ],
)
def test_what_weights_cannot_carry_is_refused_by_name(
    family: str, edit: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        bake(model(family), edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_latent_added_needs_no_encoder(tmp_path: Path) -> None:
    """Its decoder row is a shift like any other."""
    lm = model("gpt2")
    fix = Intervention("add", latents(make_dictionary(), [3, 5]), SHIFTS[0], level=Level((2.0, -1.0)))
    assert bake(lm, fix, tmp_path / "out").max_difference < 1e-4
    with pytest.raises(InputError, match="exists"):
        bake(lm, fix, tmp_path / "out")
    bake(lm, fix, tmp_path / "out", overwrite=True)
