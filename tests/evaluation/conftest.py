"""Tiny random models that speak a dozen words, and questions to ask them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from persona_probe.evaluation.questions import Question
from persona_probe.model.language_model import LanguageModel, load_model

WORDS = "a b c d e f g h i j k l m n o p".split()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<bos>", "<end>", "<unk>", "<system>", "<user>", "<assistant>"]
    names = [*special, "<think>", "</think>", *WORDS]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(special)
    backend.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def config(architecture: str, d_vocab: int) -> PreTrainedConfig:
    shared = {
        "vocab_size": d_vocab,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    }
    if architecture == "gpt2":
        return GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **shared)
    shared |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        # large, so that greedy text is lively and some of it stops
        "initializer_range": 0.3,
    }
    if architecture == "llama":
        return LlamaConfig(**shared)
    # shorter than the prompts, so that the cache slides
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    return Gemma3TextConfig(sliding_window=4, layer_types=layers, **shared)


@pytest.fixture(scope="session")
def model_of(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], LanguageModel]:
    def build(architecture: str) -> LanguageModel:
        torch.manual_seed(3)
        hf = AutoModelForCausalLM.from_config(config(architecture, len(tokenizer)))
        return load_model(hf.eval(), tokenizer=tokenizer)

    return build


@pytest.fixture(scope="session")
def lm(model_of: Callable[[str], LanguageModel]) -> LanguageModel:
    return model_of("llama")


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    """Prompts of 1 to 7 words, so that a batch needs padding."""
    return [
        Question(
            id=f"q{i}",
            category=("health", "money")[i % 2],
            question=f"topic{i // 2}",
            messages=({"role": "user", "content": " ".join(WORDS[i : i + 1 + i % 7])},),
        )
        for i in range(10)
    ]
