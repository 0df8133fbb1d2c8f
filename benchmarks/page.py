"""docs/benchmarks.md: what was measured last, by each benchmark, as one page."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def page(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The figures of `results.json` as Markdown, one table per benchmark."""
    versions = machine["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers"))
    parts = [
        "# Benchmarks\n",
        "Written by `python -m benchmarks` (or `python -m benchmarks NAME` for one of them), which keeps the "
        "figures in [results.json](../benchmarks/results.json). What is compared was measured in the same "
        "run, the contenders taking turns; where a bar was set beforehand, it says whether it holds.\n",
        f"Last run on {machine['cores']} cores of {machine['processor']}, no GPU; {shown}.\n",
    ]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        about = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
        parts.append(f"## {name.replace('_', ' ')}\n\n{about.strip().splitlines()[0]}\n")
        parts.append("| | value | against | ratio | bar | holds |\n| --- | --- | --- | --- | --- | --- |")
        parts += [_line(row) for row in rows if row["benchmark"] == name]
        parts.append("")
    return "\n".join(parts)


def _line(row: Mapping[str, Any]) -> str:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
    holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
    value = f"{row['value']:,.0f}" if abs(row["value"]) >= 1000 else f"{row['value']:.3g}"
    cells = (row["name"], f"{value} {row['unit']}".strip(), row["against"], ratio, row["bar"] or "", holds)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
