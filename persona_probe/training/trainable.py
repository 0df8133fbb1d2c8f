"""A model that can be trained: a fresh LoRA adapter on a base, one that goes on, or all weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from persona_probe.artifact import StrPath
from persona_probe.errors import InputError, MismatchError
from persona_probe.model.checkpoint import adapter_base
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.loading import adapter_folder
from persona_probe.model.sharing import inject, settle_config, shared_tree
from persona_probe.training.settings import TuneSettings


def trainable(
    base: LanguageModel, settings: TuneSettings, adapter: StrPath | None = None
) -> PreTrainedModel | PeftModel:
    """`base` with what `settings` let learn; `base` itself is not touched.

    With `adapter`, that adapter learns on (its own rank and targets; those of the settings are not
    asked). For a full fine-tune the weights are copied. Learning weights are fp32.

    Raises `InputError` for targets that the model does not have, `MismatchError` for an adapter that
    was trained on another base.
    """
    if adapter is not None:
        return _continued(base, adapter)
    if base.peft is not None:
        raise InputError(
            f"{base.name} has an adapter already",
            fix="pass the base, and the adapter to go on from: finetune(base, ..., adapter=ADAPTER)",
        )
    if settings.rank == "full":
        return copy.deepcopy(base.hf).float().requires_grad_(True)
    _check_blocks(base, settings)
    rank = int(settings.rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=settings.alpha or 2 * rank,  # pyright: ignore[reportArgumentType]  any number will do
        target_modules=_targets(base, settings),
        layers_to_transform=None if settings.blocks is None else list(settings.blocks),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(settings.seed)
    try:
        with _quiet_peft():
            model = get_peft_model(shared_tree(base.hf), config)
    except ValueError as error:
        raise InputError(
            f"cannot put an adapter on {base.name}: {str(error).strip().splitlines()[0]}",
            fix='name modules that the model has, or targets="all-linear"',
        ) from error
    return _named(cast(PeftModel, model), base)


def _check_blocks(base: LanguageModel, settings: TuneSettings) -> None:
    wrong = [block for block in settings.blocks or () if not 0 <= block < base.n_layers]
    if wrong:
        last = base.n_layers - 1
        raise InputError(f"{base.name} has no block {wrong[0]}", fix=f"it has blocks 0 to {last}")


def _targets(base: LanguageModel, settings: TuneSettings) -> list[str] | str:
    """As PEFT takes them: with blocks it takes names only, so "all-linear" is spelt out."""
    if not isinstance(settings.targets, str):
        return list(settings.targets)
    if settings.blocks is None:
        return settings.targets
    head = base.hf.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in base.hf.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def _continued(base: LanguageModel, adapter: StrPath) -> PeftModel:
    folder = adapter_folder(str(adapter))
    _check_base(base, folder)
    with _quiet_peft():
        model = inject(shared_tree(base.without_adapter().hf), folder, shared=True)
        model.set_adapter("default")  # its weights ask for a gradient again
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return _named(model, base)


def _check_base(base: LanguageModel, folder: str) -> None:
    """Raise `MismatchError` for an adapter whose own base is there and has other weights."""
    try:
        named = adapter_base(Path(folder))
    except InputError:  # it names a base that is gone: the shapes must do
        return
    ours, theirs = base.checkpoint.weights_digest, named.weights_digest
    if ours is not None and theirs is not None and ours != theirs:
        raise MismatchError(
            f"the adapter {folder} was trained on {named.path}, and the weights of {base.checkpoint.path} "
            "are others",
            fix="pass the base that the adapter was trained on",
        )


def _named(model: PeftModel, base: LanguageModel) -> PeftModel:
    path = Path(base.checkpoint.path)
    named = str(path.resolve()) if path.is_dir() else base.checkpoint.path
    settle_config(model, named)
    return model


@contextmanager
def _quiet_peft() -> Generator[None, None, None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by an old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # GPT-2: PEFT sees to it
        yield
