"""The rows of a data file, read a block at a time: lines, Parquet, a Hugging Face dataset, a list.

A row is whatever the file holds there (a JSON value, a line of text, a table's row); what it means is
said in `persona_probe.activations.documents`. Nothing but an index of 8 bytes a line is kept.
"""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from persona_probe.artifact import StrPath
from persona_probe.artifact.records import nearest
from persona_probe.errors import InputError, MissingExtraError, MissingPathError

_BLOCK_BYTES = 1 << 24
_TABLES = {".parquet"}
_JSON = {".jsonl", ".ndjson"}
_TEXT = {".txt", ".text", ".md"}
_FILES = {*_TABLES, *_JSON, *_TEXT, ".json", ".csv", ".tsv", ".arrow", ".gz", ".zip", ".zst"}
"""What the name of a dataset on the hub does not end with."""
_SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Unreadable:
    """A row that is there and cannot be read."""

    why: str


@runtime_checkable
class Rows(Protocol):
    """Rows that can be read from any place on, in order."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Any]:
        """The rows from `start` up to `stop`; None for a blank line, `Unreadable` for a broken row."""
        ...

    def place(self, row: int) -> str:
        """Where a row stands, as a user would look for it: `chats.jsonl, line 12`."""
        ...


class Lines:
    """The lines of a text file; with `parse`, what each of them holds."""

    def __init__(self, path: Path, parse: Callable[[str], Any] | None = None) -> None:
        self._path = path
        self._parse = parse
        self._starts = _line_starts(path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, start: int, stop: int) -> list[Any]:
        first, *ends = (int(self._starts[i]) for i in range(start, min(stop, len(self)) + 1))
        with self._path.open("rb") as file:
            file.seek(first)
            return [self._value(file.read(end - begin)) for begin, end in itertools.pairwise([first, *ends])]

    def place(self, row: int) -> str:
        return f"{self._path}, line {row + 1}"

    def _value(self, line: bytes) -> Any:
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            return Unreadable(f"byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8")
        if not text.strip():
            return None
        try:
            return text if self._parse is None else self._parse(text)
        except json.JSONDecodeError as error:
            return Unreadable(f"not valid JSON (column {error.colno}: {error.msg})")


class Table:
    """The rows of a Parquet file, as dictionaries."""

    def __init__(self, path: Path) -> None:
        import polars as pl

        self._path = path
        try:
            self._rows = int(pl.scan_parquet(path).select(pl.len()).collect().item())
        except Exception as error:  # polars raises a type of its own for each way to be broken
            raise InputError(
                f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}",
                fix="write the file again; it may be cut short",
            ) from error

    def __len__(self) -> int:
        return self._rows

    def read(self, start: int, stop: int) -> list[Any]:
        import polars as pl

        return pl.scan_parquet(self._path).slice(start, max(0, stop - start)).collect().to_dicts()

    def place(self, row: int) -> str:
        return f"{self._path}, row {row}"


class Listed:
    """Rows that are in memory, or in a Hugging Face dataset, which is mapped from the disk."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows = rows
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> list[Any]:
        return [self._rows[i] for i in range(start, min(stop, len(self)))]

    def place(self, row: int) -> str:
        return f"{self._name} {row}"


class Joined:
    """Several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = list(itertools.accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> list[Any]:
        found: list[Any] = []
        for part, begin in zip(self._parts, self._starts, strict=False):
            low, high = max(start - begin, 0), min(stop - begin, len(part))
            if low < high:
                found += part.read(low, high)
        return found

    def place(self, row: int) -> str:
        number = next(i for i, end in enumerate(self._starts[1:]) if row < end)
        return self._parts[number].place(row - self._starts[number])


def open_rows(source: StrPath, split: str | None = None) -> Rows:
    """The rows at `source`, told by its name: `.jsonl`, `.parquet`, `.txt` (a row is a line); a folder
    of such files, in the order of their names; a folder that `Dataset.save_to_disk` wrote; or the name
    of a dataset on the Hugging Face hub (fetched, or out of its cache), `name` or `name:config`, whose
    `split` is read.

    Raises `MissingPathError`, or `InputError` for a file of another kind or one that is broken.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return _from_hub(str(source), split)
    if any((path / name).is_file() for name in _SAVED):
        return _saved_dataset(path, split)
    if split is not None:
        raise _no_splits(str(path), split)
    if path.is_file():
        return _open_file(path)
    known = {*_JSON, *_TABLES, *_TEXT}
    files = sorted(file for file in path.rglob("*") if file.suffix in known and file.is_file())
    if not files:
        raise InputError(f"{path} holds no data file ({', '.join(sorted(known))}) and no saved dataset")
    return Joined([_open_file(file) for file in files])


def blocks(rows: Rows, size: int = 512) -> Iterator[tuple[int, Any]]:
    """Every row with its number, read `size` at a time."""
    for start in range(0, len(rows), size):
        yield from enumerate(rows.read(start, start + size), start=start)


def _open_file(path: Path) -> Rows:
    if path.suffix in _JSON:
        return Lines(path, json.loads)
    if path.suffix in _TABLES:
        return Table(path)
    if path.suffix in _TEXT:
        return Lines(path)
    raise InputError(
        f"{path} is of no kind that can be read",
        fix=f"name it by what it holds: {', '.join(sorted({*_JSON, *_TABLES, *_TEXT}))}",
    )


def _line_starts(path: Path) -> NDArray[np.int64]:
    """Where each line begins, and the end of the file."""
    found: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    position = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            newlines = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            found.append(newlines + position + 1)
            position += len(block)
    starts = np.concatenate(found)
    return starts if starts[-1] == position else np.append(starts, position)


def _saved_dataset(path: Path, split: str | None) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError.of("datasets", "train") from error
    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"{path} cannot be read as a saved dataset: {error}") from error
    return Listed(_split_of(loaded, str(path), split), f"{path}, row")


def _from_hub(name: str, split: str | None) -> Rows:
    missing = f"there is no file or folder {name}"
    # not any suffix: a dot may be of a version
    a_path = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in _FILES
    if a_path or name.count("/") > 1 or glob.has_magic(name):
        raise MissingPathError(missing, fix=nearest(Path(name).expanduser()))
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError.of("datasets", "train") from error
    try:
        path, _, config = name.partition(":")
        loaded: Any = datasets.load_dataset(path, config or None)
    except Exception as error:
        raise MissingPathError(
            f"{missing}, and no dataset of that name could be had: {str(error).splitlines()[0]}",
            fix="give a .jsonl, .parquet or .txt file, a folder of them, or a dataset's folder",
        ) from error
    return Listed(_split_of(loaded, name, split), f"{name} [{split or 'train'}], row")


def _split_of(loaded: Any, name: str, split: str | None) -> Any:
    if not isinstance(loaded, dict):  # a Dataset; a DatasetDict is a dict
        if split is not None:
            raise _no_splits(name, split)
        return loaded
    split = split or "train"
    if split not in loaded:
        raise InputError(
            f"{name} has no split {split!r}; it has {', '.join(map(str, loaded))}",
            fix="name one of them: --split (in Python, split=)",
        )
    return loaded[split]


def _no_splits(name: str, split: str) -> InputError:
    return InputError(f"{name} has no splits, so there is no {split!r}", fix="leave --split out")
