"""`persona-probe report`: finished runs looked at again: are they unchanged, and how do they compare?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.markup import escape
from rich.table import Table

from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError, MissingPathError

if TYPE_CHECKING:
    from persona_probe.figures.cells import Reading
    from persona_probe.report.side_by_side import Entry
    from persona_probe.report.verification import Verification

AUDIT, PAGE = "audit.json", "report.html"
OTHERS = {"eval.json": "an evaluation", "timeline.json": "a timeline", "interpretation.json": "a latent"}
"""By the file that tells: what else a folder may hold."""


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs.", metavar="DIR...")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute every digest again; exit with 2 when one differs.")
    ] = False,
    page: Annotated[Path | None, typer.Option("--out", help="Write the comparison as a page.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the page at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON value on stdout.")] = False,
) -> None:
    """Audits side by side, on the terminal and as one page; or, with --verify, whether a run of any
    kind still holds what it was finished with.
    """
    from persona_probe.report.verification import verify as verified

    if verify:
        if page is not None:
            raise InputError("--verify writes no page", fix="give --verify or --out, not both")
        found = [verified(folder) for folder in folders]
        if as_json:
            show_json([{"holds": one.holds, **vars(one)} for one in found])
        else:
            for one in found:
                _show_verification(one)
        if not all(one.holds for one in found):
            raise typer.Exit(2)
        return
    from persona_probe.report.side_by_side import lines, write_side_by_side

    if page is not None and page.exists() and not overwrite:
        raise InputError(f"--out {page} exists", fix="choose another place, or pass --overwrite")
    entries = [_entry(folder, page) for folder in folders]
    if page is not None:
        write_side_by_side(entries, page)
    shown = lines(entries)
    if as_json:
        show_json([_as_json(entry, line) for entry, line in zip(entries, shown, strict=True)])
    else:
        _show(entries, shown)
        if page is not None:
            out.print(f"page: {page}", markup=False, soft_wrap=True)


def _entry(folder: Path, page: Path | None) -> Entry:
    """The audit in a folder. Raises `InputError` when it holds none."""
    from persona_probe.artifact import read_json
    from persona_probe.report.side_by_side import Entry
    from persona_probe.report.verification import MANIFEST
    from persona_probe.report.verification import verify as verified

    if folder.is_dir() and not (folder / AUDIT).is_file():
        what = next((what for name, what in OTHERS.items() if (folder / name).is_file()), None)
        said = f"it holds {what}" if what else f"there is no {AUDIT} in it"
        fix = "only audits are put side by side" if what else None
        raise MissingPathError(
            f"{folder} is not the folder of an audit: {said}",
            fix=fix,
            command=None if what else f"persona-probe report --verify {folder}",
        )
    checked = verified(folder)
    record, manifest = read_json(folder / AUDIT), read_json(folder / MANIFEST)
    if not isinstance(record, dict) or "verdict" not in record:
        raise InputError(f"{folder / AUDIT} is not the record of an audit: it has no verdict")
    link = ""
    if page is not None and (folder / PAGE).is_file():
        link = quote(os.path.relpath((folder / PAGE).resolve(), page.parent.resolve()))
    return Entry(
        audit=record,
        folder=str(folder),
        settings=manifest.get("settings") or {},
        date=str(manifest.get("written") or "")[:10],
        link=link,
        warnings=tuple(
            f"{folder}: {one.path} {_said(one.kind)}"
            for one in checked.mismatches
            if one.kind != "input changed"
        ),
    )


def _said(kind: str) -> str:
    return {
        "missing": "is missing",
        "changed": "was changed since it was written",
        "input changed": "was changed since it was read",
    }[kind]


def _show_verification(found: Verification) -> None:
    if found.holds:
        inputs = f" and {found.inputs} inputs" if found.inputs else ""
        out.print(f"{found.folder}: unchanged, {found.files} files{inputs}", markup=False, soft_wrap=True)
    else:
        n = len(found.mismatches)
        out.print(
            f"{found.folder}: {n} of {found.files + found.inputs} no longer "
            f"{'matches' if n == 1 else 'match'}",
            markup=False,
            soft_wrap=True,
        )
    for one in found.mismatches:
        digests = f": {one.was[:19]}… then, {one.now[:19]}… now" if one.now is not None else ""
        out.print(f"  {one.path} {_said(one.kind)}{digests}", style="red", markup=False, soft_wrap=True)
    for path in found.uncompared:
        out.print(f"  {path}: not compared, it cannot be found as it was read", markup=False, soft_wrap=True)
    for path in found.added:
        out.print(f"  {path}: not in the manifest", markup=False, soft_wrap=True)
    out.print(f"  manifest {found.manifest}", markup=False, soft_wrap=True)


def _show(entries: Sequence[Entry], shown: Sequence[Any]) -> None:
    from persona_probe.report.side_by_side import differences, headline

    out.print(f"[bold]{escape(headline(entries))}[/bold]")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("% [95%]", "verdict"):
        table.add_column(name, overflow="fold")
    for name in ("base", "tuned", "steered", "latent", "necessity", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    doubled = len({line.name for line in shown}) < len(shown)
    for line in shown:
        name = f"{line.name}\n[dim]{escape(line.folder)}[/dim]" if doubled else escape(line.name)
        after = f"\n→ {escape(line.after)}" if line.after else ""
        cells = [_rate(reading) for reading in (*line.rates, line.necessity)]
        cells.insert(3, escape(line.latent) or "–")
        seconds = "–" if line.seconds is None else f"{line.seconds:,.0f}"
        table.add_row(name, escape(line.verdict) + after, *cells, seconds)
    out.print(table)
    asked = [row[0] for row in differences(entries).body]
    if asked:
        err.print(f"warning: they were not asked alike: {', '.join(asked)}", style="yellow", markup=False)
    for entry in entries:
        for warning in entry.warnings:
            err.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


def _rate(reading: Reading) -> str:
    if reading.value is None:
        return "–"
    if reading.low is None or reading.high is None:
        return f"{100 * reading.value:.0f}"
    return f"{100 * reading.value:.0f}\n{100 * reading.low:.0f}–{100 * reading.high:.0f}"


def _as_json(entry: Entry, line: Any) -> dict[str, Any]:
    from persona_probe.report.side_by_side import ARMS

    rates = {arm: reading._asdict() for arm, reading in zip(ARMS, line.rates, strict=True)}
    return {
        **line._asdict(),
        "folder": entry.folder,
        "rates": rates,
        "necessity": line.necessity._asdict(),
        "after": line.after or None,
        "latent": line.latent or None,
        "warnings": entry.warnings,
    }
