"""Do the models of a diff fit in memory together? If not, they are read one after the other.

The base is in memory, so what its weights take is measured. A whole checkpoint beside it takes as much
again; an adapter shares the base's weights and takes its own files. What is free is measured as well:
on a GPU what the driver has left, on a CPU what the system has, within a container's limit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from persona_probe.artifact import read_json, write_json
from persona_probe.diffing.passes import Source
from persona_probe.execution.memory import free_memory
from persona_probe.model.checkpoint import is_adapter
from persona_probe.model.language_model import LanguageModel

USABLE = 0.9
"""Of what is free, weights may take so much: the rest is for activations."""


@dataclass(frozen=True)
class Room:
    """What is needed beside the base, and what there is."""

    base: int
    """Bytes of the base's weights, which are loaded."""
    needed: int
    """Bytes of weights that are still to be loaded."""
    free: int | None
    """Bytes on the devices that hold the base; None where the system does not say."""

    @property
    def together(self) -> bool:
        """Whether all models fit at once."""
        return self.free is None or self.needed <= USABLE * self.free


def room_beside(base: LanguageModel, others: Sequence[Source]) -> Room:
    """What `others` (checkpoints, adapters, or models that are loaded already) need beside `base`."""
    weights = {p.data_ptr() or id(p): p for p in base.hf.parameters()}  # on the disk they have no address
    whole = sum(p.numel() * p.element_size() for p in weights.values())
    free = [_free(device) for device in {p.device for p in weights.values() if p.device.type != "meta"}]
    there = None if None in free else sum(bytes or 0 for bytes in free)
    return Room(whole, sum(_bytes(source, whole) for source in others), there)


def settle(file: Path, together: bool, *, fixed: bool = False) -> bool:
    """Write down whether models are read together, or find what a process before wrote: all that share a
    job read alike, and one that is taken up goes on as it began. A choice that is `fixed` prevails.
    """
    mine = file.with_name(f".{file.name}.{uuid4().hex}")
    write_json(mine, {"together": together})
    try:
        if fixed:
            mine.replace(file)
        else:
            os.link(mine, file)
    except FileExistsError:
        return bool(read_json(file)["together"])
    finally:
        mine.unlink(missing_ok=True)
    return together


def _bytes(source: Source, whole: int) -> int:
    if isinstance(source, LanguageModel):
        return 0
    if is_adapter(source):
        return sum(file.stat().st_size for file in Path(source).glob("adapter_model*"))
    return whole


def _free(device: torch.device) -> int | None:
    if device.type == "cpu":
        return free_memory()
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return None
