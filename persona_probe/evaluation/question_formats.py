"""The ways in which questions are written to files, each read as rows of `questions`' JSON Lines.

A reader gives (line number, fields) pairs, the fields named and nested as in JSON Lines whatever the
format; whether they are right is checked in one place, in `load_questions`. The published YAML has a
file of its own, `published`.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from persona_probe.artifact import read_jsonl, read_text
from persona_probe.errors import InputError

Row = tuple[int, dict[str, Any]]
"""The line that a question begins on, and its fields."""


def read_lines(path: Path) -> list[Row]:
    """One JSON object a line."""
    records = read_jsonl(path)
    numbered = enumerate(read_text(path).split("\n"), start=1)
    return list(zip((number for number, line in numbered if line.strip()), records, strict=True))


def read_table(path: Path) -> list[Row]:
    """CSV with the columns `id`, `question` (the text that is asked) and `category`.

    Other columns are fields of `Question` by their names (`role`, `split`, `reference`); an empty
    cell is no value. Raises `InputError` for a missing column, and for a row of another length.
    """
    text = read_text(path).removeprefix("\ufeff")  # spreadsheets begin with it
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            if header is None:
                header = _header(path, cells)
            elif any(cells):
                if len(cells) != len(header):
                    raise InputError(
                        f"{path}, line {start}: {len(cells)} cells under {len(header)} columns",
                        fix='put text with a comma or a line break in it in "quotes"',
                    )
                fields: dict[str, Any] = {k: v for k, v in zip(header, cells, strict=True) if v}
                asked = fields.pop("question", "")
                if not asked:
                    raise InputError(f"{path}, line {start}: the question is empty")
                rows.append((start, {**fields, "messages": [{"role": "user", "content": asked}]}))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {start}: not valid CSV: {error}") from error
    return rows


def _header(path: Path, cells: list[str]) -> list[str]:
    missing = [name for name in ("id", "question", "category") if name not in cells]
    if missing or len(set(cells)) < len(cells):
        what = f"no column {missing[0]!r}" if missing else "a column twice"
        raise InputError(
            f"{path}, line 1: {what}", fix="the first line names the columns: id,question,category"
        )
    return cells
