"""How answers are drawn: every choice explicit, so that it can be recorded and repeated.

A checkpoint's `generation_config.json` applies only when asked for, and then as the *file* has it:
transformers' own defaults behind it (top-k 50 among them) do not. What it asks for and cannot be
honoured is refused by name, never skipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_probe.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Raises `InputError` for a setting outside its range."""

    temperature: int | float = 1.0
    """0: the most probable token each time."""
    top_p: int | float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    max_new_tokens: int = 48
    samples: int = 1
    """Answers per question."""
    seed: int = 0
    top_k: int | None = None
    """Draw from so many of the most probable tokens; None: from all."""
    enable_thinking: bool | None = None
    """Handed to the chat template; None: the template's own default."""
    generation_config: bool = False
    """The checkpoint's `generation_config.json` takes the place of temperature, top-p and top-k."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], not {self.top_p}")
        for name in ("max_new_tokens", "samples", "top_k"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise InputError(f"{name} must be at least 1, not {given}")


_IDLE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": (),
    "constraints": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "stop_strings": (),
}
"""What changes the text of an answer and is not done here, with the values that change nothing."""


def applied(sampling: Sampling, config: Any, name: str) -> Sampling:
    """`sampling` as it is for a model: with `generation_config`, what its `config` (transformers'
    `GenerationConfig`) says.

    Read are `temperature`, `top_p`, `top_k` and `do_sample: false` (temperature 0); what the file
    leaves open stays as it was given. Raises `InputError` naming a setting of the file that is not
    done here.
    """
    if not sampling.generation_config:
        return sampling
    for key, idle in _IDLE.items():
        value = getattr(config, key, None)
        if value is not None and value != [] and value not in idle:
            raise InputError(
                f"the generation_config.json of {name} asks for {key}={value!r}, which is not done here",
                fix="sample with explicit settings instead (without --generation-config), or bring answers "
                "made elsewhere with --samples",
            )
    found = {key: getattr(config, key, None) for key in ("temperature", "top_p", "top_k")}
    if found["top_k"] == 0:  # transformers' word for "all"
        found["top_k"] = None
    if config.do_sample is False:
        found = {"temperature": 0.0}
    return replace(sampling, **{key: value for key, value in found.items() if value is not None})


def template_variables(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the chat template is given beside the messages.

    Raises `InputError` when `enable_thinking` is asked for and the template knows no such thing: it
    would be ignored without a word.
    """
    if sampling.enable_thinking is None:
        return {}
    if "enable_thinking" not in str(tokenizer.chat_template or ""):
        raise InputError(
            "the chat template knows no enable_thinking",
            fix="leave it out: this model thinks, or does not, whatever is asked",
        )
    return {"enable_thinking": sampling.enable_thinking}
