"""`judge.jsonl`: every raw reply, as it came, and thereby the cache.

A call is known by a digest of everything that decides its reply, so that one on record is never
made again, whatever run asks for it. A line is appended the moment a reply arrives, in one write: a
process that is killed loses no reply that it had, and at most leaves a torn last line, which is
forgotten.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_probe.artifact import StrPath, disk_full_named, plain, read_jsonl
from persona_probe.errors import InputError


class Record:
    """The replies in `path`; None keeps them in memory only. Safe to use from several threads."""

    def __init__(self, path: StrPath | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._file: int | None = None
        if self.path is not None and self.path.exists():
            for number, row in enumerate(read_jsonl(self.path, torn_tail=True), start=1):
                if not isinstance(row.get("key"), str):
                    raise InputError(
                        f"{self.path}, row {number}: no reply of a judge (it has no 'key')",
                        fix="choose another file, or delete it to ask everything again",
                    )
                self._rows[row["key"]] = row

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of that key."""
        with self._lock:
            return self._rows.get(key)

    def add(self, key: str, row: Mapping[str, object]) -> None:
        """Append a row. Raises `DiskFullError`."""
        kept: dict[str, Any] = {"key": key, **plain(row)}
        line = (json.dumps(kept, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with self._lock:
            self._rows[key] = kept
            if self.path is None:
                return
            with disk_full_named(self.path):
                if self._file is None:
                    self._file = _open(self.path)
                while line:  # one write, unless the disk fills up half way
                    line = line[os.write(self._file, line) :]

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        text = path.read_bytes()
        os.ftruncate(file, text.rfind(b"\n") + 1)
    return file
