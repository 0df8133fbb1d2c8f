"""The folder of one run: locked, settings first, stages as they finish, manifest last."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from persona_probe.artifact.atomic import StrPath, disk_full_named, remove, remove_partials, writable
from persona_probe.artifact.provenance import MANIFEST, check_manifest, digest_of, write_manifest
from persona_probe.artifact.records import plain, read_json, write_json
from persona_probe.errors import BusyError, InputError

SETTINGS = "settings.json"
_LOCK = ".lock"
_STAGES = ".stages"
_MISSING = object()
_PATIENCE = 10.0
"""Seconds that a process waits for another of the same run to write the settings."""


class RunFolder:
    """A run's output folder, held by this process (or by those that do it together) until `close`.

    Made by `RunFolder.open`; a context manager. A run that ends in an error before it saved
    anything leaves nothing behind; one that ends later is resumed by opening it again with the same
    settings.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, object], lock: int, *, together: bool = False
    ) -> None:
        self.path = path
        self.settings = settings
        self._together = together
        self._lock: int | None = lock

    @classmethod
    def open(
        cls,
        out: StrPath,
        settings: Mapping[str, object],
        overwrite: bool = False,
        *,
        together: bool = False,
    ) -> RunFolder:
        """Create `out`, or take up the run in it; `settings` (see `plain`) go to `settings.json`.

        With `together`, other processes may hold it too, if they open it so.

        Raises `BusyError` when another process holds it, and `InputError` when `out` holds anything
        else: a file, a folder that no run wrote, or a run with other settings (the first that
        differs is named). `overwrite` empties a run's folder; a folder that no run wrote is refused
        all the same.
        """
        path = Path(out).absolute()
        _refuse_foreign(path)
        with disk_full_named(path), writable(f"--out {path}"):
            path.mkdir(parents=True, exist_ok=True)
            lock = _join(path) if together else _take_lock(path, fcntl.LOCK_EX)
        try:
            _refuse_foreign(path)  # again: it may have been filled before the lock was taken
            remove_partials(path)
            if overwrite:
                _empty(path)
            wanted = plain(settings)
            if (path / SETTINGS).is_file():
                _refuse_other(path, read_json(path / SETTINGS)["settings"], wanted)
            else:
                write_json(path / SETTINGS, {"written_by": "persona_probe", "settings": wanted})
            if together:
                fcntl.flock(lock, fcntl.LOCK_SH)
        except BaseException:
            if not (path / SETTINGS).exists():
                _remove_untouched(path)
            os.close(lock)
            raise
        return cls(path, settings, lock, together=together)

    @property
    def complete(self) -> bool:
        """Whether an earlier call finished this run."""
        return (self.path / MANIFEST).is_file()

    def stage(self, name: str) -> Any:
        """What `save_stage` saved under `name`, or None when that stage is still to do.

        Raises `InputError` when the saved file was changed since.
        """
        file = self._stage_file(name)
        if not file.is_file():
            return None
        saved = read_json(file)
        if digest_of(saved["value"]) != saved["digest"]:
            raise InputError(
                f"{file} was changed since it was written",
                fix="delete it, and the same command does that stage again",
                command=f"rm {file}",
            )
        return saved["value"]

    def save_stage(self, name: str, obj: object) -> None:
        """Save the result of a finished stage (see `plain`), whole or not at all."""
        value = plain(obj)
        write_json(self._stage_file(name), {"digest": digest_of(value), "value": value})

    def check_inputs(self, digests: Mapping[str, str], run: str) -> None:
        """Raise `InputError` for the first input, by path, that is not as it was for the `run` ("audit") that
        is here: finished, or begun and its stage `inputs` saved.
        """
        before = check_manifest(self.path)["inputs"] if self.complete else self.stage("inputs")
        for path, digest in digests.items() if before else ():
            if before.get(path) != digest:
                raise InputError(
                    f"{path} has changed since the {run} in {self.path}",
                    fix="choose another --out, or pass --overwrite to do it again",
                )

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Write `manifest.json`: settings, `manifest`, versions, and every file's digest. What the stages
        saved goes: nothing is to be taken up any more.
        """
        write_manifest(self.path, {"settings": self.settings, **manifest})
        remove(self.path / _STAGES)

    def close(self) -> None:
        """Let go of the folder. Closing twice is harmless."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and not self._together:
            _remove_untouched(self.path)
        self.close()

    def _stage_file(self, name: str) -> Path:
        return self.path / _STAGES / f"{name}.json"


def _is_ours(path: Path) -> bool:
    file = path / SETTINGS
    if not file.is_file():
        return False
    saved = read_json(file)
    return isinstance(saved, dict) and {"written_by", "settings"} <= saved.keys()


def _refuse_foreign(path: Path) -> None:
    """Raise unless `path` is free, empty, or the folder of a run."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"--out {path} is a file; a folder is needed")
    # a run killed between taking the lock and writing its settings leaves only these
    holds = [e.name for e in path.iterdir() if e.name != _LOCK and not e.name.endswith(".partial")]
    if holds and not _is_ours(path):
        raise InputError(
            f"--out {path} is not empty and was not written by persona-probe "
            f"(it holds {', '.join(sorted(holds)[:3])})",
            fix="choose a new or an empty folder",
        )


def _join(path: Path) -> int:
    """A lock that processes share; the first of them has it alone until the settings are written."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return _take_lock(path, fcntl.LOCK_SH if (path / SETTINGS).is_file() else fcntl.LOCK_EX)
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _take_lock(path: Path, kind: int) -> int:
    """An open handle on `path/.lock`, locked as `kind` says."""
    file = path / _LOCK
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise BusyError(
                f"--out {path} is in use by another run ({holder or 'unknown process'})",
                fix="wait for it to end, or choose another --out",
            ) from error
        # the holder may have removed the file between our open and our lock: then it locks nothing
        if file.exists() and os.fstat(handle).st_ino == file.stat().st_ino:
            break
        os.close(handle)
        path.mkdir(parents=True, exist_ok=True)
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def _refuse_other(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise naming the first setting in which the saved run and the wanted one differ."""
    for name in [*wanted, *saved]:
        before, now = saved.get(name, _MISSING), wanted.get(name, _MISSING)
        if before != now:
            raise InputError(
                f"--out {path} holds a run with other settings: {name} was {_shown(before)}, "
                f"this call has {_shown(now)}",
                fix="choose another --out, or pass --overwrite to throw that run away",
            )


def _shown(value: object) -> str:
    return "not set" if value is _MISSING else repr(value)


def _empty(path: Path) -> None:
    """Remove all but the lock; settings last, so that a kill half way leaves a run's folder."""
    entries = [entry for entry in path.iterdir() if entry.name not in (_LOCK, SETTINGS)]
    # the manifest first: a folder half emptied must not look complete
    for entry in sorted(entries, key=lambda e: e.name != MANIFEST):
        remove(entry)
    remove(path / SETTINGS)


def _remove_untouched(path: Path) -> None:
    """Remove the folder of a run that saved nothing; any other is let be."""
    if not path.is_dir() or {entry.name for entry in path.iterdir()} - {SETTINGS, _LOCK}:
        return
    for entry in (SETTINGS, _LOCK):
        (path / entry).unlink(missing_ok=True)
    with suppress(OSError):  # not empty after all, or not ours to remove
        path.rmdir()
