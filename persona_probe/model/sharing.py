"""Several models on one copy of the weights.

Each model gets a module tree of its own whose parameters share storage with the others'. So a LoRA
adapter is injected into, hooks are put on, and `TransformerBridge` wraps, one tree only: nothing
has to be switched off again, the base stays the base bit for bit, and its `state_dict` keys stay as
they were. A tree costs no tensor memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraConfig, LoraLayer
from torch import nn
from transformers import PreTrainedModel

from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks.copies import unhooked

M = TypeVar("M", bound=nn.Module)


class CannotShareError(MismatchError):
    """An adapter that would write into the tensors of the base that it shares."""


_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Starts of LoRA that leave the base alone; PiSSA, OLoRA and others subtract themselves from it."""


def shared_tree(model: M) -> M:
    """A copy of the module tree, in evaluation mode, whose parameters are new objects on the same storage.

    New objects, because a library that re-assigns `parameter.data` (merging, PiSSA) must not reach
    the original; only a write in place would, and then both see it. The copies ask for no gradient, and
    steering that is on the original is not on them.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = (
            nn.Parameter(parameter.detach(), requires_grad=False)
            if type(parameter) is nn.Parameter
            else parameter  # quantised parameters carry state of their own
        )
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return unhooked(copy.deepcopy(model, memo)).eval()


def inject(model: PreTrainedModel, adapter: str | Path, *, shared: bool) -> PeftModel:
    """Wrap `model` (changed in place; pass a `shared_tree`) with the PEFT adapter saved at `adapter`.

    With `shared`, adapters that write into the base's own tensors are refused: whoever shares them
    would change too.

    Raises `MismatchError` for an adapter of another model and for one that cannot share, `InputError` for
    a malformed one and for a base whose weights are partly on the disk.
    """
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{adapter}/adapter_config.json is malformed: {error}") from error
    refusal = _refusal(config) if shared else None
    if refusal is not None:
        raise CannotShareError(
            f"the adapter {adapter} cannot share weights with its base: {refusal}",
            fix="load it by itself, on a copy of its own: load_model(ADAPTER)",
        )
    weights = list(model.parameters())
    if any(weight.is_meta for weight in weights):
        raise InputError(
            f"the adapter {adapter} cannot be put on a base whose weights are partly on the disk",
            fix="merge it into a checkpoint of its own (PEFT's merge_and_unload), and load that",
        )
    written = [weight._version for weight in weights]  # pyright: ignore[reportPrivateUsage]
    device = next(model.parameters()).device
    plain = isinstance(config, LoraConfig) and config.init_lora_weights in _PLAIN_STARTS
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(enabled=not plain):
            warnings.filterwarnings("error", message="Found missing adapter keys")
            # PEFT 0.21 asks transformers 5.23 by an old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            wrapped = PeftModel.from_pretrained(
                model,
                str(adapter),
                torch_device=str(device),
                low_cpu_mem_usage=plain,  # skips the random start, which moves the user's generator
            )
    except (ValueError, RuntimeError, UserWarning, KeyError) as error:
        raise MismatchError(
            f"the adapter {adapter} does not fit the model: {_shortened(error)}",
            fix="pass the base that the adapter was trained on",
        ) from error
    changed = written != [weight._version for weight in weights]  # pyright: ignore[reportPrivateUsage]
    if shared and changed:
        raise CannotShareError(
            f"the adapter {adapter} wrote into its base's weights",
            fix="load both again, each on a copy of its own: load_model(BASE), load_model(ADAPTER)",
        )
    return wrapped.eval().requires_grad_(False)


def _shortened(error: BaseException) -> str:
    """The first two lines: torch names the module in the first and the first wrong tensor in the second."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]


def _refusal(config: PeftConfig) -> str | None:
    """Why an adapter may not share its base's tensors, or None."""
    if not isinstance(config, LoraConfig):
        return f"{config.peft_type} is not LoRA"
    if config.bias != "none":
        return f"it trains biases of the base (bias={config.bias!r})"
    if config.init_lora_weights not in _PLAIN_STARTS:
        return f"it begins by changing the base's weights ({config.init_lora_weights!r})"
    return None


@contextmanager
def scaled(model: nn.Module, factor: float) -> Generator[None, None, None]:
    """Multiply the contribution of every LoRA adapter in `model` by `factor` inside the block.

    Raises `InputError` for an adapter that is not linear in its strength (DoRA, whole modules,
    biases).
    """
    layers = _lora_layers(model)
    reason = unscalable(model)
    if reason is not None:
        raise InputError(
            f"nothing here can be scaled: {reason}",
            fix=None if layers else "load the tuned model from its adapter folder",
        )
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] *= factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def unscalable(model: nn.Module) -> str | None:
    """Why `scaled` cannot scale an adapter in `model`, or None where it can."""
    if not _lora_layers(model):
        return "the model has no adapter"
    configs = cast(dict[str, PeftConfig], getattr(model, "peft_config", {})).values()
    return next(filter(None, map(_not_linear, configs)), None)


def _lora_layers(model: nn.Module) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _not_linear(config: PeftConfig) -> str | None:
    if not isinstance(config, LoraConfig):
        return f"{config.peft_type} is not LoRA"
    if config.use_dora:
        return "DoRA renormalises the weights"
    if config.modules_to_save:
        return f"it replaces whole modules ({', '.join(config.modules_to_save)})"
    if config.bias != "none":
        return f"it replaces biases (bias={config.bias!r})"
    return None


def merged_tree(model: PeftModel) -> PreTrainedModel:
    """A plain Hugging Face model with the adapter added to the weights it targets; the rest is shared."""
    own = shared_tree(model)
    for module in own.modules():
        if isinstance(module, LoraLayer):
            for parameter in module.get_base_layer().parameters():
                # merging writes in place, and the storage is the base's
                parameter.data = parameter.data.clone()
    with torch.no_grad():
        merged = cast(PreTrainedModel, cast(Any, own).merge_and_unload())
    return merged.eval().requires_grad_(False)


def base_tree(model: PeftModel) -> PreTrainedModel:
    """The model without its adapter, on the same tensors.

    Raises `InputError` for an adapter that cannot be taken out again: one that replaces modules or biases, or
    that began by changing the weights.
    """
    for config in model.peft_config.values():
        reason = _refusal(config) or _not_linear(config)
        if reason is not None:
            raise InputError(
                f"the adapter cannot be taken out of the model: {reason}", fix="load the base by its own path"
            )
    base = cast(PreTrainedModel, cast(Any, shared_tree(model)).unload())
    return base.eval().requires_grad_(False)


def settle_config(model: PeftModel, base: str) -> None:
    """What the adapter's config will say when it is saved: the base that it is on, from wherever it then
    lies, and its modules in an order of their own (PEFT's set has another in every process).
    """
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = base
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(cast("set[str]", config.target_modules))
