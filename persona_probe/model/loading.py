"""Weights and tokenizer from disk or the hub, with every silent failure of loading made loud."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging
from transformers.utils.peft_utils import find_adapter_config_file

from persona_probe.artifact import StrPath, digest_file, digest_of
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.model.checkpoint import (
    Checkpoint,
    adapter_base,
    check_adapter_weights,
    describe,
    has_tokenizer,
    is_adapter,
    looks_like_hub_id,
)

_ADAPTER_FILES = ["adapter_*", "tokenizer*", "special_tokens_map.json", "vocab*", "merges*", "*.jinja"]


def resolve(source: str | Path, revision: str | None = None) -> Checkpoint:
    """`describe`, and for a hub id that is an adapter's, the adapter fetched and its base named."""
    found = describe(source, revision)
    if found.adapter is not None or Path(found.path).is_dir():
        return found
    folder = _fetched_adapter(found.path, revision)
    return found if folder is None else replace(adapter_base(folder), adapter=str(folder))


def adapter_folder(adapter: str | Path) -> str:
    """The folder of a PEFT adapter given as a folder or a hub id. Raises `InputError` for anything else."""
    folder: Path | None = Path(adapter).expanduser()
    if not folder.is_dir():
        if not looks_like_hub_id(str(adapter)):
            raise MissingPathError(
                f"there is no adapter folder {folder}", fix="pass a folder with an adapter_config.json"
            )
        folder = _fetched_adapter(str(adapter), None)
    if folder is None or not is_adapter(folder):
        raise InputError(
            f"{adapter} is no adapter: it has no adapter_config.json",
            fix="to load a whole checkpoint, pass it as the model itself",
        )
    check_adapter_weights(folder)
    return str(folder)


def adapter_digest(adapter: StrPath) -> str:
    """Of an adapter's config and weights alone. Raises what `adapter_folder` does."""
    files = sorted(Path(adapter_folder(str(adapter))).glob("adapter_*"))
    return digest_of({file.name: digest_file(file) for file in files if file.is_file()})


def _fetched_adapter(hub_id: str, revision: str | None) -> Path | None:
    try:
        if find_adapter_config_file(hub_id, revision=revision) is None:
            return None
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_ADAPTER_FILES))
    except OSError:  # no such repository or no network: reading the weights will say which
        return None


def read_weights(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """The language model at `checkpoint` (its adapter aside), in evaluation mode, asking for no gradient.

    `device="auto"` is the first GPU, else the CPU; `dtype=None` is fp32 on the CPU and the
    checkpoint's own type on a GPU. A folder is read without touching the network.

    Raises `InputError` for a checkpoint that cannot be read or lacks some of its weights.
    """
    target = device_of(device)
    on_cpu = target.type == "cpu"
    options: dict[str, Any] = {"device_map": device_map} if device_map is not None else {}
    if not Path(checkpoint.path).is_dir():
        options["revision"] = checkpoint.revision
    try:
        with quietly():
            loaded = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                dtype=_dtype(dtype, on_cpu),
                local_files_only=Path(checkpoint.path).is_dir(),
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(
            f"cannot load a causal language model from {checkpoint.path}: "
            f"{str(error).strip().splitlines()[0]}",
            fix="pass a folder written by save_pretrained, or the id of a model on the hub",
        ) from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        # transformers would fill them with random numbers and go on
        raise InputError(
            f"{checkpoint.path} lacks {len(missing)} of its weights: {', '.join(missing[:3])} ...",
            fix="fetch or save the checkpoint again; part of it is missing",
        )
    if device_map is None:
        model = cast(PreTrainedModel, cast(Any, model).to(target))
    return model.eval().requires_grad_(False)


def read_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer: the adapter folder's where it has one, else the base's.

    Raises `InputError` where there is none.
    """
    places = [place for place in (checkpoint.adapter, checkpoint.path) if place is not None]
    place = next((p for p in places if Path(p).is_dir() and has_tokenizer(p)), checkpoint.path)
    local = Path(place).is_dir()
    if local and not has_tokenizer(place):
        raise InputError(
            f"there is no tokenizer in {' or '.join(places)}",
            fix="save it there (tokenizer.save_pretrained); in Python, or load_model(..., tokenizer=...)",
        )
    try:
        options = {} if local else {"revision": checkpoint.revision}
        return cast(
            PreTrainedTokenizerBase,
            cast(Any, AutoTokenizer).from_pretrained(place, local_files_only=local, **options),
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no tokenizer can be read from {place}: {str(error).strip().splitlines()[0]}",
            fix="fetch or save the checkpoint again; part of it is missing or damaged",
        ) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, d_vocab: int, name: str) -> None:
    """Check that every token id has an embedding. Raises `MismatchError`."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= d_vocab:
        raise MismatchError(
            f"the tokenizer has token ids up to {largest}, and {name} embeds {d_vocab}",
            fix="pass the tokenizer that the model was trained with",
        )


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name. Raises `InputError` where there is none that works."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"there is no device {str(device)!r} here: {str(error).splitlines()[0]}",
            fix='use "auto", "cpu", "cuda" or "cuda:0"; `persona-probe doctor` lists what there is',
        ) from error


def _dtype(dtype: str | torch.dtype | None, on_cpu: bool) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if on_cpu else "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise InputError(
            f"there is no floating-point type {dtype!r}",
            fix='use "float32", "bfloat16" or "float16"',
        )
    return named


@contextmanager
def quietly() -> Generator[None, None, None]:
    """Without transformers' progress bar: the caller shows progress where there is any to show."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
