"""What a hook name means: `blocks.3.hook_resid_post` is the output of the fourth decoder block.

Names are TransformerLens's, 0-based. For one block, with x the residual stream:

    hook_resid_pre   x on entry                    hook_attn_out   what attention adds to x
    hook_resid_mid   x after attention was added   hook_mlp_out    what the MLP adds to x
    hook_resid_post  x on leaving

so resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out. "What is added" is meant
literally: on Gemma 2 and 3 it is the sublayer's output after its post-norm. The family table below
is tested against `TransformerBridge`; any other architecture is looked up in TransformerLens's
adapters, which name the modules, and a site that an adapter cannot place (the middle of a parallel
block) is refused.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from persona_probe.errors import InputError, UnknownSiteError

KINDS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_resid_post",
)
"""The kinds of site, in the order in which a forward pass reaches them."""

_NAME = re.compile(r"blocks\.(\d+)\.(\w+)")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the residual stream; sites sort in the order a forward pass reaches them."""

    block: int
    """0-based number of the decoder block."""
    depth: int
    """Index into `KINDS`."""

    @property
    def kind(self) -> str:
        """The last part of the name, such as `hook_resid_post`."""
        return KINDS[self.depth]

    @property
    def name(self) -> str:
        """The whole TransformerLens name."""
        return f"blocks.{self.block}.{self.kind}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps the tensors; paths are relative to a block, None where there is none."""

    blocks: str
    """Path of the list of blocks in the causal language model."""
    attn_out: str | None
    """Module whose output is added to the residual stream by attention."""
    mlp_out: str | None
    """Module whose output is added to the residual stream by the MLP."""
    attn_norm: str | None
    """Module whose input is resid_pre (read again there, so that edits made before it are seen): the norm
    before attention, or attention itself."""
    mlp_norm: str | None
    """Module whose input is resid_mid."""


_PRE_NORM = Layout("model.layers", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_SANDWICH_NORM = Layout(
    "model.layers",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "input_layernorm",
    "pre_feedforward_layernorm",
)
_LAYOUTS = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "gemma2": _SANDWICH_NORM,
    "gemma3_text": _SANDWICH_NORM,
    "gpt2": Layout("transformer.h", "attn", "mlp", "ln_1", "ln_2"),
}


def resid_post(block: int) -> str:
    """The name of the residual stream on leaving a block: `resid_post(3)` is `"blocks.3.hook_resid_post"`."""
    return f"blocks.{block}.hook_resid_post"


def parse_site(name: str) -> Site:
    """Read a hook name, without asking whether a model has it.

    Raises `UnknownSiteError`, with the nearest names, for anything but `blocks.<number>.<one of
    KINDS>`.
    """
    match = _NAME.fullmatch(name)
    if match and match[2] in KINDS:
        return Site(int(match[1]), KINDS.index(match[2]))
    block = re.search(r"\d+", name)
    candidates = [f"blocks.{block[0] if block else 0}.{kind}" for kind in KINDS]
    raise _unknown(name, candidates, "the form is blocks.<block>.<hook>")


def site_names(hf_model: nn.Module) -> tuple[str, ...]:
    """Every hook name that the model has, in the order in which a forward pass reaches them."""
    kinds = [depth for depth in range(len(KINDS)) if _has(layout_of(hf_model), depth)]
    return tuple(Site(block, depth).name for block in range(len(blocks_of(hf_model))) for depth in kinds)


def check_site(hf_model: nn.Module, name: str) -> Site:
    """Read a hook name and check that the model has it.

    Raises `UnknownSiteError`, with the nearest names that the model does have.
    """
    site = parse_site(name)
    count = len(blocks_of(hf_model))
    if site.block >= count:
        nearest = Site(count - 1, site.depth).name
        raise _unknown(name, [nearest], f"the model has blocks 0 to {count - 1}")
    if not _has(layout_of(hf_model), site.depth):
        family = cast(Any, hf_model).config.model_type
        raise _unknown(
            name,
            [n for n in site_names(hf_model) if parse_site(n).block == site.block],
            f"in a {family!r} block no single tensor is {site.kind}",
        )
    return site


def blocks_of(hf_model: nn.Module) -> nn.ModuleList:
    """The model's decoder blocks, in order."""
    return cast(nn.ModuleList, causal_lm(hf_model).get_submodule(layout_of(hf_model).blocks))


def causal_lm(hf_model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, out of its PEFT wrapper if it has one."""
    get_base_model = getattr(hf_model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else hf_model  # type: ignore[return-value]


def layout_of(hf_model: nn.Module) -> Layout:
    """The layout of the model's blocks: from the table of tested families, else TransformerLens's adapter.

    Raises `InputError` for an architecture that neither knows.
    """
    model = causal_lm(hf_model)
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family is None:
        raise InputError(
            f"expected a Hugging Face causal language model, got {type(hf_model).__name__}",
            fix="pass the model that AutoModelForCausalLM.from_pretrained returns",
        )
    if family in _LAYOUTS:
        return _LAYOUTS[family]
    _LAYOUTS[family] = layout = _adapter_layout(model)
    return layout


def _adapter_layout(model: nn.Module) -> Layout:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

    config: Any = model.config
    architecture = type(model).__name__
    try:
        bridge_config = build_bridge_config_from_hf(config, architecture, "model", model.dtype)  # type: ignore[arg-type]
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
        block: Any = adapter.component_mapping["blocks"]  # type: ignore[index]
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{architecture} is not among the architectures that TransformerLens maps: {error}",
            fix="use a decoder-only model of a supported family",
        ) from error
    aliases: dict[str, Any] = block.hook_aliases
    if aliases.get("hook_resid_pre") != "hook_in" or aliases.get("hook_resid_post") != "hook_out":
        raise InputError(f"{architecture} has no plain residual stream to put hooks on")

    def module(alias: str, suffix: str) -> str | None:
        """The Hugging Face path that an alias such as `ln1_post.hook_out` points to."""
        path, _, hook = str(aliases.get(alias, "")).rpartition(".")
        if hook != suffix or path not in block.submodules:
            return None
        return block.submodules[path].name

    attn_out, mlp_norm = module("hook_attn_out", "hook_out"), module("hook_resid_mid", "hook_in")
    reader = block.submodules.get("ln1")
    if reader is not None and reader.name == attn_out:  # OLMo 2: the norm stands behind attention
        reader = block.submodules.get("attn")
    return Layout(
        blocks=block.name,
        attn_out=attn_out,
        mlp_out=module("hook_mlp_out", "hook_out"),
        attn_norm=reader.name if reader is not None and mlp_norm is not None else None,
        mlp_norm=mlp_norm,
    )


def _has(layout: Layout, depth: int) -> bool:
    needed = {
        "hook_attn_out": [layout.attn_out],
        "hook_resid_mid": [layout.attn_out, layout.attn_norm, layout.mlp_norm],
        "hook_mlp_out": [layout.mlp_out],
    }
    return all(path is not None for path in needed.get(KINDS[depth], []))


def _unknown(name: str, candidates: list[str], why: str) -> UnknownSiteError:
    nearest = difflib.get_close_matches(name, candidates, n=3, cutoff=0.0)
    return UnknownSiteError(f"there is no hook {name!r}: {why}", fix=f"nearest names: {', '.join(nearest)}")
