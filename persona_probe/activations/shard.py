"""One shard of captured activations: a run of conversations, in order, in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_probe.activations.stream import Chunk
from persona_probe.artifact import atomic_file, digest_file
from persona_probe.errors import InputError

_PLAIN = ("document", "position", "token", "kept", "norm")


@dataclass(frozen=True, eq=False)
class Shard:
    """The counted tokens of some conversations, ordered by conversation and position."""

    first: int
    """The first of its conversations."""
    document: Int[Tensor, " token"]
    """Index of the conversation each token is of."""
    position: Int[Tensor, " token"]
    """Index of the token in its conversation."""
    token: Int[Tensor, " token"]
    """Its id."""
    activations: dict[tuple[int, str], Float[Tensor, "token d_model"]]
    """By index of the model and hook name."""
    kept: Int[Tensor, " conversation"]
    """Tokens of each conversation that are here."""
    norm: Float64[Tensor, "model site conversation"]
    """Mean norm of a conversation's activations; NaN where it has no token here."""

    def __len__(self) -> int:
        return len(self.document)

    def chunk(self) -> Chunk:
        """The same as `stream` yields it, in fp32 (or wider); sinks are gone and not counted here."""
        wide = {key: x if x.dtype == torch.float64 else x.float() for key, x in self.activations.items()}
        return Chunk(self.document, self.position, wide, sinks=0)


def write_shard(path: Path, shard: Shard) -> tuple[int, str]:
    """Write a shard, whole or not at all. Returns its size in bytes and its digest."""
    tensors = {name: getattr(shard, name) for name in _PLAIN}
    tensors |= {f"{model}/{site}": x.contiguous() for (model, site), x in shard.activations.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={"first": str(shard.first)})
        return temporary.stat().st_size, digest_file(temporary)


def read_shard(path: Path) -> Shard:
    """The shard in a file; its tensors are mapped from the disk, and read when they are used.

    Raises `InputError` for a file that is no shard.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors: Mapping[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}
            first = int(file.metadata()["first"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a shard: {error}") from error
    named = {name.partition("/"): x for name, x in tensors.items() if "/" in name}
    return Shard(
        first,
        activations={(int(model), site): x for (model, _, site), x in named.items()},
        **{name: tensors[name] for name in _PLAIN},
    )
