"""JSON and JSON Lines: written whole, read with errors that name the place."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from persona_probe.artifact.atomic import StrPath, atomic_file, disk_full_named
from persona_probe.errors import InputError, MissingPathError


def plain(obj: object) -> Any:
    """`obj` as JSON's own types: dataclasses and mappings to dicts, tuples, sets and arrays to
    lists, paths and enums to their text. NaN and infinities become None: a figure that is missing
    is null, never 0.

    Raises `TypeError` for anything else.
    """
    if obj is None or isinstance(obj, bool | int | str):
        return obj.value if isinstance(obj, enum.Enum) else obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else None
    if isinstance(obj, enum.Enum):
        return plain(obj.value)
    if isinstance(obj, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in cast("Mapping[object, object]", obj).items()}
    if isinstance(obj, set | frozenset):
        return sorted((plain(item) for item in cast("set[object]", obj)), key=str)
    if isinstance(obj, list | tuple):
        return [plain(item) for item in cast("list[object]", obj)]
    if hasattr(obj, "tolist"):  # numpy and torch, without importing either
        return plain(cast("Any", obj).tolist())
    raise TypeError(f"{type(obj).__name__} has no place in JSON")


def write_text(path: StrPath, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: StrPath, obj: object) -> None:
    """Write `obj` (see `plain`) to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: StrPath) -> Any:
    """The JSON in `path`. Raises `MissingPathError`, or `InputError` naming line and column."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            fix="mend it, or fetch it again; what a command wrote: remove it and run that command again",
        ) from error


def write_jsonl(path: StrPath, rows: Iterable[object]) -> None:
    """Write `rows` to `path`, one a line, whole or not at all."""
    write_text(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: StrPath, rows: Iterable[object]) -> None:
    """Append `rows` to `path`, one a line. A line torn by an earlier kill is cut off first."""
    path = Path(path)
    text = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    with disk_full_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read() not in (b"", b"\n"):  # a file that ends well is not read again
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def read_jsonl(path: StrPath, *, torn_tail: bool = False) -> list[dict[str, Any]]:
    """The objects in `path`, one a line; blank lines are skipped.

    `torn_tail` forgives an unfinished last line (a killed writer's). Raises `MissingPathError`, or
    `InputError` naming the line.
    """
    rows: list[dict[str, Any]] = []
    text = _read(Path(path), whole_lines=torn_tail)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not valid JSON (column {error.colno}: {error.msg})",
                fix="each line must be one JSON object",
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(cast("dict[str, Any]", row))
    return rows


def read_text(path: StrPath) -> str:
    """The text (UTF-8) in `path`. Raises `MissingPathError` and `InputError`."""
    return _read(Path(path))


def _read(path: Path, *, whole_lines: bool = False) -> str:
    """The text; of `whole_lines` without an unfinished last one, which may end inside a character."""
    try:
        raw = path.read_bytes()
        return (raw[: raw.rfind(b"\n") + 1] if whole_lines else raw).decode()
    except FileNotFoundError as error:
        raise MissingPathError(f"there is no file {path}", fix=nearest(path)) from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; a file is needed") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start})",
            fix="save it as UTF-8; most often it is in WINDOWS-1252: iconv -f WINDOWS-1252 -t UTF-8",
        ) from error


def nearest(path: Path) -> str:
    """What to try instead of a path that is not there."""
    if not path.parent.is_dir():
        return f"{path.parent} does not exist either; check the path"
    names = [child.name for child in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"look in {path.parent}"
