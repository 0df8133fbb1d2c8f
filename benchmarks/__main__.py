"""`python -m benchmarks [NAME ...] [--quick] [--out FOLDER]`: run them, show a table, write
`results.json` and docs/benchmarks.md.

Each module of this package that has a `run` is a benchmark. `results.json` holds the figures and
`machine.json` the machine and versions that made them; a benchmark run by name replaces only its own
figures.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import platform
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.figure import Figure
from benchmarks.page import page
from persona_probe.artifact import read_json, versions, write_json, write_text

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"


def names() -> list[str]:
    """The benchmarks that there are."""
    found = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return sorted(name for name in found if name not in ("__main__", "figure", "page"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("name", nargs="*", choices=[*names(), []], help="which; default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that they run")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json goes")
    asked = parser.parse_args()
    results = asked.out / "results.json"
    kept = {row["benchmark"]: [] for row in read_json(results)} if results.exists() else {}
    for row in read_json(results) if results.exists() else []:
        kept[row["benchmark"]].append(row)
    console = Console()
    for name in asked.name or names():
        figures: list[Figure] = []
        # one by one: a run that is cut short leaves what it has measured
        for figure in importlib.import_module(f"benchmarks.{name}").run(quick=asked.quick):
            figures.append(figure)
            kept[name] = [asdict(one) | {"benchmark": name} for one in figures]
            write_json(results, [row for rows in kept.values() for row in rows])
        console.print(table(name, figures))
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    machine |= {"versions": versions(), "quick": asked.quick}
    write_json(asked.out / "machine.json", machine)
    if asked.out == HERE:
        write_text(PAGE, page(read_json(results), machine))


def table(title: str, figures: list[Figure]) -> Table:
    shown = Table(title=title, title_justify="left", box=None)
    for heading in ("", "value", "against", "ratio", "bar", "holds"):
        shown.add_column(heading)
    for row in figures:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        holds = "" if row.holds is None else ("yes" if row.holds else "NO")
        shown.add_row(row.name, f"{row.value:.4g} {row.unit}", row.against, ratio, row.bar or "", holds)
    return shown


if __name__ == "__main__":
    main()
