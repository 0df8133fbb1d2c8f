"""What a capture will read and write, known before it begins: tokens, shards, bytes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persona_probe.activations.masks import TokenMask
from persona_probe.errors import DiskFullError, InputError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel

SHARD_BYTES = 1 << 28
"""A shard holds at most so many bytes of activations (256 MiB), unless one conversation is larger."""


@dataclass(frozen=True, eq=False)
class Survey:
    """The tokens of every conversation, counted without a forward pass."""

    tokens: NDArray[np.int64]
    """Of each conversation."""
    covered: NDArray[np.int64]
    """In the place that the mask names."""
    special: NDArray[np.int64]
    """Of those, left out as special."""
    selected: NDArray[np.int64]
    """What is left to read; sinks show only in the pass itself."""
    bos: int
    digest: str
    """Of all token ids, and of which of them are selected."""


def survey(lm: LanguageModel, conversations: Sequence[Rendered], mask: TokenMask) -> Survey:
    """Count what `mask` selects. Raises `InputError` where it leaves nothing at all."""
    special, bos = lm.special_ids, lm.tokenizer.bos_token_id
    digest = hashlib.sha256()
    rows: list[tuple[int, int, int, int]] = []
    beginnings = 0
    for conversation in conversations:
        its = mask.account(conversation, special, bos)
        rows.append((len(conversation), its.covered, its.special, its.selected))
        beginnings += its.bos
        digest.update(np.asarray([len(conversation), *conversation.ids], dtype="<i4").tobytes())
        digest.update(bytes(its.chosen))
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 4).T
    if not columns.size:
        raise InputError("nothing to read: give at least one conversation")
    if not columns[3].any():
        raise InputError(
            f"the mask {mask.kind!r} leaves no token of any conversation",
            fix="give conversations with an assistant turn, or choose another mask",
        )
    return Survey(*columns, bos=beginnings, digest=f"sha256:{digest.hexdigest()}")


def shard_bounds(selected: NDArray[np.int64], shard_tokens: int) -> list[tuple[int, int]]:
    """Runs of conversations with at most `shard_tokens` selected tokens (or one conversation) each."""
    bounds: list[tuple[int, int]] = []
    start = held = 0
    for i, tokens in enumerate(selected.tolist()):
        if held and held + tokens > shard_tokens:
            bounds.append((start, i))
            start, held = i, 0
        held += tokens
    return [*bounds, (start, len(selected))]


def check_disk(out: Path, needed: int) -> None:
    """Raise `DiskFullError`, before anything is written, where `needed` bytes will not fit."""
    free = free_bytes(out)
    if needed > free:
        raise DiskFullError(
            f"the activations need {_size(needed)}, and {_size(free)} are free at {out}",
            fix="store them as bfloat16, name fewer sites, read fewer documents, or choose another disk",
        )


def free_bytes(out: Path) -> int:
    """What is free on the disk that `out` is, or would be, on."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"
