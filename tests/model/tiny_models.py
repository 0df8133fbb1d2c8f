"""Tiny random models of the supported families and a tokenizer for them, built here."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from persona_probe.model import LanguageModel, Rendered, load_model

BOS, EOS, PAD, TURN = "<|bos|>", "<|end|>", "<|pad|>", "<|turn|>"

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=8),
    "gemma2": Gemma2Config(**_SHAPE, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**_SHAPE, head_dim=8, sliding_window=6),
    "gpt2": GPT2Config(
        vocab_size=320,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
}
"""One configuration per family; sliding windows are shorter than the test texts."""


def tiny_hf(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model whose blocks, norms and biases all matter (nothing is left at 0 or 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(template: str | None = PLAIN_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across spaces' sides, special tokens and a chat template."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS, PAD, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["user assistant system the a hello there how are you I am well thank you"] * 3
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN],
        chat_template=template,
    )


_FOLDER = Path(tempfile.mkdtemp())
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


@functools.cache
def checkpoint_of(family: str) -> Path:
    """A checkpoint folder of that family, written once per test run and not to be written to."""
    return save_checkpoint(_FOLDER / family, family)


@functools.cache
def adapter_of(family: str, seed: int = 0) -> Path:
    """A LoRA adapter folder on `checkpoint_of(family)`, likewise."""
    return save_adapter(_FOLDER / f"{family}-lora-{seed}", checkpoint_of(family), seed)


@functools.cache
def model_of(family: str) -> LanguageModel:
    """`checkpoint_of(family)`, loaded back from the disk."""
    return load_model(checkpoint_of(family))


def prompts_of_many_lengths() -> list[Rendered]:
    """Prompts of 1 to 20 tokens, longer than the sliding windows."""
    ids = torch.randint(4, 300, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    return [Rendered(tuple(ids[:n]), (False,) * n, n) for n in (7, 1, 20, 12)]


def save_checkpoint(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A checkpoint folder, as `save_pretrained` writes it."""
    tiny_hf(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int = 0, **options: Any) -> Path:
    """A LoRA adapter folder on `base`, with random weights in both factors."""
    targets = ["c_attn", "c_fc", "c_proj"]
    hf = AutoModelForCausalLM.from_pretrained(base)
    if hf.config.model_type != "gpt2":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "fan_in_fan_out": hf.config.model_type == "gpt2",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            model = get_peft_model(hf, LoraConfig(**{**settings, **options}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
