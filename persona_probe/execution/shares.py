"""Which tasks this process does, when several share a job: `--shard 2/8`, or what the launcher says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from persona_probe.errors import InputError

_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""torchrun's variables, then Slurm's."""


class UnfinishedError(InputError):
    """This process's share is done, and others have shards to do."""

    @classmethod
    def of(cls, left: int, shards: int) -> UnfinishedError:
        """`left` of all `shards` are not there yet."""
        return cls(
            f"{left} of {shards} shards are left to other processes, the last of which puts all together",
            fix="if none did, a shard failed there: run this once more without a share",
        )


@dataclass(frozen=True)
class Share:
    """Every `of`-th task from number `index` (counted from 0) on."""

    index: int = 0
    of: int = 1

    def __contains__(self, number: int) -> bool:
        return number % self.of == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def read_share(text: str | None, environment: Mapping[str, str] | None = None) -> Share:
    """Read `--shard`: `i/n` with i from 0 to n - 1, `auto` for what torchrun or Slurm set, None for all.

    Raises `InputError` for anything else, and for `auto` outside a launcher.
    """
    if text is None:
        return Share()
    if text == "auto":
        given = os.environ if environment is None else environment
        for rank, size in _LAUNCHERS:
            if rank in given and size in given:
                return read_share(f"{given[rank]}/{given[size]}")
        raise InputError(
            "--shard auto found neither RANK and WORLD_SIZE nor SLURM_PROCID and SLURM_NTASKS",
            fix="start it with torchrun or srun, or name the share: --shard 0/4",
        )
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise InputError(
            f"--shard is i/n with i from 0 to n - 1, or auto; got {text!r}", fix="such as --shard 0/4"
        )
    return Share(int(match[1]), int(match[2]))
