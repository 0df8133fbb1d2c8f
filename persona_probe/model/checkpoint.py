"""Which files a model comes from: a full checkpoint or a PEFT adapter, told apart by what is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from persona_probe.artifact import digest_file, digest_folder, digest_of, read_json
from persona_probe.artifact.records import nearest
from persona_probe.errors import InputError, MissingPathError

IN_MEMORY = "memory:"
"""How the path of a model begins that was handed over in memory."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's weights come from."""

    path: str
    """Folder or hub id of the full weights; `memory:<class>` for a model that was handed over in memory."""
    revision: str | None = None
    """Revision on the hub, None for a folder."""
    adapter: str | None = None
    """Folder or hub id of a PEFT adapter on top."""
    tensors: Callable[[], str] | None = field(default=None, compare=False, repr=False)
    """A digest of what a model in memory holds now, its adapter included; None for any other."""

    @property
    def digest(self) -> str:
        """`"sha256:..."` of the files, computed when first asked for; of the names where there are none.
        Of a model in memory, which may be trained on, that of its tensors each time.
        """
        return self._of_files if self.tensors is None else self.tensors()

    @cached_property
    def _of_files(self) -> str:
        parts = [self.path, self.adapter]
        if not any(part is not None and Path(part).is_dir() for part in parts):
            return digest_of([self.path, self.revision, self.adapter])
        return digest_of([self.revision, *(_digest(part) for part in parts)])

    @cached_property
    def weights_digest(self) -> str | None:
        """Of the full weights' files, adapters and all else aside; None where they lie in no folder."""
        files = sorted(
            file for pattern in _WEIGHT_FILES for file in Path(self.path).glob(pattern) if file.is_file()
        )
        return digest_of({file.name: digest_file(file) for file in files}) if files else None

    @property
    def name(self) -> str:
        """A short name for people: the last part of the path, of the adapter where there is one."""
        path = Path(self.adapter or self.path)
        if path.parent.name == "snapshots":  # the hub's cache: models--org--name/snapshots/<commit>
            return path.parent.parent.name.rpartition("--")[2]
        return path.name

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.adapter} on {self.path}"


def _digest(part: str | None) -> str | None:
    return digest_folder(part) if part is not None and Path(part).is_dir() else part


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(path) / "adapter_config.json").is_file()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(path) / name).is_file() for name in _TOKENIZER)


def describe(source: str | Path, revision: str | None = None) -> Checkpoint:
    """What lies at `source`: a checkpoint folder, an adapter folder (with its base), or else a hub id.

    Touches no network. Raises `MissingPathError` for a folder that is not there and `InputError`,
    naming what is missing, for one that is empty or holds no whole checkpoint.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if not looks_like_hub_id(str(source)):
            raise MissingPathError(f"there is no folder {path}", fix=nearest(path))
        return Checkpoint(str(source), revision)
    if not path.is_dir():
        raise InputError(
            f"{path} is a file, and a checkpoint is a folder", fix=f"pass the folder {path.parent}"
        )
    if not any(path.iterdir()):
        raise InputError(f"the folder {path} is empty", fix="pass a folder written by save_pretrained")
    if is_adapter(path):
        check_adapter_weights(path)
        base = adapter_base(path)
        return Checkpoint(base.path, base.revision or revision, str(path))
    _check_full(path)
    return Checkpoint(str(path))


def adapter_base(adapter: Path) -> Checkpoint:
    """The checkpoint that an adapter was trained on, as its `adapter_config.json` names it.

    A relative name is looked for beside the adapter first, then from the working directory; a name
    that is no folder is taken for a hub id. Raises `InputError` where none fits.
    """
    settings = read_json(adapter / "adapter_config.json")
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(
            f"{adapter}/adapter_config.json does not say which model it was trained on",
            fix="name the base: load_model(BASE, adapter=ADAPTER), or --base BASE",
        )
    for place in (adapter / named, Path(named).expanduser()):
        if place.is_dir():
            found = describe(place.resolve() if place == adapter / named else place)
            if found.adapter is not None:
                raise InputError(f"the base of the adapter {adapter} is itself an adapter: {place}")
            return found
    if not looks_like_hub_id(named):
        raise MissingPathError(
            f"the adapter {adapter} was trained on {named!r}, and there is no such folder",
            fix="name the base yourself: load_model(BASE, adapter=ADAPTER), or --base BASE",
        )
    revision = settings.get("revision")
    return Checkpoint(named, revision if isinstance(revision, str) else None)


def check_adapter_weights(path: Path) -> None:
    """Raise `InputError` for an adapter folder without weights."""
    if not any((path / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise InputError(
            f"{path} has an adapter_config.json and no weights ({' or '.join(_ADAPTER_WEIGHTS)})",
            fix="save the adapter again with save_pretrained",
        )


def _check_full(path: Path) -> None:
    inner = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
    inner += sorted(child.name for child in path.iterdir() if is_adapter(child))
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(child.name for child in path.iterdir())[:6])
        raise InputError(
            f"{path} is no checkpoint: expected config.json or adapter_config.json, found {found}",
            fix=f"name one of the checkpoints in it: {', '.join(inner[-3:])}"
            if inner
            else "pass a folder written by save_pretrained",
        )
    if not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        raise InputError(
            f"{path} has a config.json and no weights (model.safetensors)",
            fix="fetch or save the checkpoint again; part of it is missing",
        )


def looks_like_hub_id(name: str) -> bool:
    """Whether a name that is no folder can be a repository on the hub."""
    return _HUB_ID.fullmatch(name) is not None and not name.startswith(".")
