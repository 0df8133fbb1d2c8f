"""Files and folders that are whole or absent.

Each is written beside its place, synced and renamed. A writer that is killed leaves its place
untouched; what it left beside it is cleared up by the next writer of the same folder, or of the run
folder that it is in.

Not covered: Windows (the lock is `flock`), and file systems without atomic rename.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from persona_probe.errors import DiskFullError, InputError

StrPath = str | os.PathLike[str]

_PARTIAL = ".partial"
_REPLACED = ".replaced"


@contextmanager
def disk_full_named(path: StrPath) -> Generator[None, None, None]:
    """Turn "no space left", whichever writer says it, into a `DiskFullError` about `path`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and polars raise their own types, with the system's sentence in the text
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise DiskFullError(
                f"no space left on the disk while writing {path}",
                fix="free some space and run the same command again; what was finished is kept",
                command="persona-probe doctor",
            ) from error
        raise


@contextmanager
def writable(path: StrPath) -> Generator[None, None, None]:
    """Turn "cannot be made here" (no permission, a file where a folder should be) into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{path} cannot be written to: {error.strerror}", fix="choose another place to write to"
        ) from error


def check_writable(path: StrPath) -> None:
    """Raise `InputError` where no folder can be made at `path`, so that no work is done for nothing."""
    path = Path(path).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    with writable(path):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, f"no permission to write to {there}")


def check_replaceable(path: StrPath, overwrite: bool, known_by: Sequence[str]) -> None:
    """Raise `InputError` unless a folder can be written at `path`: it is free or empty, or `overwrite` and
    of the kind that is to take its place, which is known by the files that it holds.
    """
    path = Path(path).absolute()
    check_writable(path)
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{path} exists and is not empty", fix="choose another place, or overwrite it")
    if not all((path / name).is_file() for name in known_by):
        raise InputError(
            f"{path} holds something else than what would take its place (there is no "
            f"{' and '.join(known_by)} in it)",
            fix="choose a new or an empty folder",
        )


@contextmanager
def atomic_file(path: StrPath) -> Generator[Path, None, None]:
    """Yield a path to write to, of the same name; renamed onto `path` on success, removed on any failure.

    Raises `DiskFullError` when there is no room.
    """
    path = Path(path)
    with disk_full_named(path), _partial_beside(path) as folder:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)


@contextmanager
def atomic_folder(
    path: StrPath, *, overwrite: bool = False, known_by: Sequence[str] = ()
) -> Generator[Path, None, None]:
    """Yield an empty folder to fill; it becomes `path` on success, and is removed on any failure.

    An existing non-empty `path` is refused (`InputError`) unless `overwrite` and it holds the files
    `known_by` (see `check_replaceable`); then it is there, whole, until the new one takes its place.
    Raises `DiskFullError` when there is no room.
    """
    path = Path(path).absolute()
    _recover(path)
    check_replaceable(path, overwrite, known_by)
    with disk_full_named(path), _partial_beside(path) as temporary:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        replaced = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_REPLACED}")
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _sync(path.parent)
        remove(replaced)


@contextmanager
def _partial_beside(path: Path) -> Generator[Path, None, None]:
    """An empty folder beside `path` to fill, locked meanwhile (see `remove_partials`) and then removed.

    What is locked is a folder even for a file: safetensors writes a file of its own choice there and
    renames it, which no lock on a file outlives.
    """
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        with writable(path):
            folder.mkdir()
        with suppress(FileNotFoundError):  # another process may clear it up before it is locked
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                break
            os.close(handle)
    try:
        yield folder
    finally:
        os.close(handle)
        remove(folder)


def _recover(path: Path) -> None:
    """Clear up what a killed writer of `path` left beside it; put back what it had moved aside."""
    if not path.parent.is_dir():
        return
    for entry in sorted(path.parent.glob(f".{glob.escape(path.name)}.*{_REPLACED}")):
        if path.exists():
            remove(entry)
        else:
            entry.rename(path)
    remove_partials(path.parent, glob.escape(path.name))


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left of `folder/name` (a glob), not what another process is filling:
    that is locked.
    """
    for entry in folder.glob(f".{name}.*{_PARTIAL}"):
        try:
            handle = os.open(entry, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(entry)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
