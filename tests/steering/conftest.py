"""Tiny random models and dictionaries, and a drawer of random interventions."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from persona_probe.model import Checkpoint, LanguageModel
from persona_probe.sae.load import Dictionary
from persona_probe.steering import Condition, Intervention, Level, Target, latents
from persona_probe.steering.target import direction
from tests.steering.reference import CLOSES, OPENS

D_MODEL, D_SAE, VOCAB = 16, 24, 40
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, OPENS)}
    vocab |= {"<think>": OPENS, "</think>": CLOSES}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2"
    )


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LanguageModel(Checkpoint("memory:llama"), LlamaForCausalLM(config).eval(), make_tokenizer())


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=3, n_head=4, n_positions=64,
        initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return LanguageModel(Checkpoint("memory:gpt2"), GPT2LMHeadModel(config).eval(), make_tokenizer())


def make_dictionary(activation: str = "jumprelu", seed: int = 0, centred: bool = True) -> Dictionary:
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D_SAE, D_MODEL, generator=g)
    return Dictionary(
        site=SITES[1],
        W_enc=torch.randn(D_MODEL, D_SAE, generator=g) / 2,
        b_enc=torch.randn(D_SAE, generator=g) / 4,
        W_dec=decoder / decoder.norm(dim=-1, keepdim=True) * 1.3,
        b_dec=torch.randn(D_MODEL, generator=g) / 4,
        threshold=torch.rand(D_SAE, generator=g) / 2 if activation == "jumprelu" else None,
        activation=activation,  # type: ignore[arg-type]
        k=5 if activation == "topk" else None,
        apply_b_dec_to_input=centred,
        normalisation="none",
        path="memory",
        digest=f"sha256:{seed}",
    )


@pytest.fixture(scope="session", params=["relu", "jumprelu", "topk"])
def dictionary(request: pytest.FixtureRequest) -> Dictionary:
    return make_dictionary(request.param)


def random_intervention(draw: random.Random, dictionary: Dictionary, **fixed: Any) -> Intervention:
    """Any operation on any target, anywhere; `fixed` fields are as given."""
    op = fixed.pop("op", None) or draw.choice(
        ["add", "scale", "clamp", "ablate", "mean_ablate", "project_out", "cap", "floor"]
    )
    read = "projection" if op == "project_out" else draw.choice(["encoder", "projection"])
    n = draw.randint(1, 3)
    ids = draw.sample(range(dictionary.d_sae), n)
    target: Target = latents(dictionary, ids)
    if read == "projection" and draw.random() < 0.5:
        target = direction(dictionary.W_dec[ids] * 2)
    level = None
    if op not in ("ablate", "project_out"):
        values = tuple(draw.uniform(-1.5, 1.5) for _ in range(draw.choice([1, n])))
        unit = {"mean_ablate": "base_mean", "scale": "absolute"}.get(op) or draw.choice(
            ["absolute", "residual_rms", "max_activation", "base_mean"]
        )
        level = Level(values, unit, 1.0 if unit == "absolute" else draw.uniform(0.5, 2))  # type: ignore[arg-type]
    later = fixed.get("positions", "response") in ("response", "last_prompt")
    condition = random_condition(draw, dictionary, ["token", "prompt"] if later else ["token"])
    if op == "project_out" and n > 1 and condition.of is None:
        condition = Condition()
    places: list[Any] = ["response", "last_prompt"]
    if fixed.pop("thoughts", False):
        places += ["think", "answer"]
    if condition.decided == "token":
        places += ["all", "all", "prompt", (0,), (1, 3), (0, 2, 5, 7), (-1,), (-2, 0)]
    positions = draw.choice(places)
    fields: dict[str, Any] = {
        "op": op, "target": target, "site": draw.choice(SITES), "positions": positions,
        "level": level, "gain": draw.choice([0.5, 1.0, 2.0]), "read": read, "condition": condition,
    }  # fmt: skip
    return Intervention(**(fields | fixed))


def random_condition(draw: random.Random, dictionary: Dictionary, decided: list[Any]) -> Condition:
    """Any condition, on the edited latents themselves or on another."""
    kind: Any = draw.choice(["always", "always", "active", "above"])
    if kind == "always":
        return Condition()
    latent = latents(dictionary, [draw.randrange(dictionary.d_sae)])
    of = draw.choice([None, latent, direction(latent.decoder[0])])
    return Condition(kind, draw.uniform(-1, 1), of, decided=draw.choice(decided))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types as a user has them, unchecked: what is passed wrongly must meet our own message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def draw() -> random.Random:
    return random.Random(7)


@pytest.fixture
def prompts() -> Callable[[int], list[list[int]]]:
    """n prompts of 1 to 7 tokens, one-token ones among them."""

    def make(n: int) -> list[list[int]]:
        draw = random.Random(3)
        return [[draw.randrange(2, VOCAB) for _ in range(1 + i % 7)] for i in range(n)]

    return make


def padded(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Token ids, mask and position ids of rows of different lengths."""
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    pairs = zip(fill, rows, ones, strict=True)
    both = [(f + r, f + o) if side == "left" else (r + f, o + f) for f, r, o in pairs]
    mask = torch.tensor([m for _, m in both])
    return {
        "input_ids": torch.tensor([ids for ids, _ in both]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def loud(**fields: Any) -> Intervention:
    """An edit that changes every token it touches, much."""
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    return Intervention("add", direction(vector), SITES[1], level=Level((3.0,)), **fields)


def logits(lm: LanguageModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return lm.hf(**batch, **options).logits
