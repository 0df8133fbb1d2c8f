"""What there is to do, and the files that say it is done.

A task's key is a digest of everything that decides its result: the configuration, the models, the
documents. The result is one file of that name, written whole or not at all, with its own digest in
front. A run therefore skips exactly what was done before with the same configuration, by whichever
process, and sees a file that was cut short or changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.artifact import StrPath, atomic_file, read_json, write_json

_DIGEST = hashlib.sha256().digest_size

Worker = Callable[[Any], bytes]
"""Computes the result of one task from its payload. Raises `InputError` for a document that cannot be
read, which fails that task alone.
"""


@dataclass(frozen=True)
class Task:
    """One shard of a job."""

    number: int
    """Results are put together in this order."""
    key: str
    """Of everything that decides the result; the name of its file."""
    payload: Callable[[], Any]
    """Fetches what the worker is given; called when it is the task's turn."""


@dataclass(frozen=True)
class Failure:
    """A task that could not be done, and why."""

    number: int
    why: str
    fix: str | None = None


@dataclass(frozen=True)
class Done:
    """How a run went."""

    computed: int = 0
    found: int = 0
    """Results that an earlier run had left."""
    failures: tuple[Failure, ...] = ()


class Results:
    """A folder of results, one file per key; any number of processes may write to it."""

    def __init__(self, folder: StrPath) -> None:
        self.folder = Path(folder)

    def read(self, key: str) -> bytes | None:
        """The result of a task, or None where there is none (or no whole one: it is done again)."""
        path = self._path(key)
        if not path.is_file():
            return None
        written = path.read_bytes()
        digest, data = written[:_DIGEST], written[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        """Keep a result, whole or not at all."""
        with atomic_file(self._path(key)) as temporary:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
        self._failed(key).unlink(missing_ok=True)

    def fail(self, key: str, failure: Failure) -> None:
        """Let the other processes know that a task has been tried in vain; a later run tries it again."""
        write_json(self._failed(key), {"why": failure.why, "fix": failure.fix})

    def failure(self, key: str, number: int) -> Failure | None:
        """Why a task has no result, where it has been tried in vain."""
        path = self._failed(key)
        return Failure(number, **read_json(path)) if path.is_file() else None

    def __contains__(self, key: str) -> bool:
        return self.read(key) is not None

    def _path(self, key: str) -> Path:
        return self.folder / f"{key.removeprefix('sha256:')}.shard"

    def _failed(self, key: str) -> Path:
        return self._path(key).with_suffix(".failed")
