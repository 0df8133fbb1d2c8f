"""`persona-probe doctor`: what is here, what is missing, and the command that adds it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from persona_probe.artifact import shipped, versions
from persona_probe.cli.console import out, show_json, size
from persona_probe.errors import MissingPathError

DISTRIBUTION = "persona-probe"
_MIN_FREE = 2 * 1024**3
"""An audit of the shipped organism peaks below this, in memory and on disk."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show versions, devices, free memory and disk, and which extras are installed.

    Exits with 1 when something is wrong that would stop an audit, and says what.
    """
    report = examine()
    if as_json:
        show_json(report)
    else:
        _show(report)
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """What `doctor` shows, as plain data; sizes in bytes, None where it cannot be told."""
    problems: list[str] = []
    found = versions()
    extras: dict[str, dict[str, Any]] = {}
    try:
        needed = requirements()
    except metadata.PackageNotFoundError:
        needed = {}
        problems.append(f"{DISTRIBUTION} is not installed as a package (next: make setup)")
    for extra, packages in sorted(needed.items()):
        missing = [name for name in packages if not _installed(name)]
        if extra and missing:
            command = f"{sys.executable} -m pip install '{DISTRIBUTION}[{extra}]'"
        else:
            command = None
        if extra:
            extras[extra] = {"installed": not missing, "missing": missing, "command": command}
        elif missing:
            problems.append(f"not installed: {', '.join(missing)} (next: make setup)")

    from persona_probe.execution.memory import free_memory

    memory, disk = free_memory(), shutil.disk_usage(Path.cwd()).free
    if memory is not None and memory < _MIN_FREE:
        problems.append(f"only {size(memory)} of memory are free; an audit may need 2 GiB")
    if disk < _MIN_FREE:
        problems.append(f"only {size(disk)} are free on the disk of {Path.cwd()}")
    devices, trouble = _devices()
    return {
        "versions": found,
        "devices": devices,
        "memory_free_bytes": memory,
        "disk": {"path": str(Path.cwd()), "free_bytes": disk},
        "extras": extras,
        "organism": _organism(),
        "problems": problems + trouble,
    }


def requirements() -> dict[str, list[str]]:
    """The packages that each extra of this distribution needs; the core's under `""`."""
    grouped: dict[str, list[str]] = {"": []}
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if name:
            grouped.setdefault(extra[1] if extra else "", []).append(name[0])
    return grouped


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _devices() -> tuple[list[dict[str, Any]], list[str]]:
    """The devices that torch sees, and what is wrong with torch."""
    # what this process may use, where the system can tell (not on macOS)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    cpu: dict[str, Any] = {"name": "cpu", "cores": cores}
    try:
        import torch
    except (ImportError, OSError) as error:
        return [cpu], [f"torch does not load: {error} (next: make setup)"]
    devices = [cpu | {"threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        model = torch.cuda.get_device_name(index)
        device = {"name": f"cuda:{index}", "model": model}
        devices.append(device | {"memory_free_bytes": free, "memory_total_bytes": total})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps"})
    return devices, []


def _organism() -> str | None:
    try:
        return str(shipped("organism"))
    except MissingPathError:
        return None


def _show(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, version in report["versions"].items():
        table.add_row(name, version or "[red]not installed[/]")
    for device in report["devices"]:
        table.add_row(device["name"], _about(device))
    memory = report["memory_free_bytes"]
    table.add_row("memory", f"{size(memory)} free" if memory is not None else "unknown")
    table.add_row("disk", f"{size(report['disk']['free_bytes'])} free at {report['disk']['path']}")
    table.add_row("organism", report["organism"] or "[yellow]not shipped with this install[/]")
    for name, extra in report["extras"].items():
        missing = f"[yellow]without {', '.join(extra['missing'])}[/]"
        table.add_row(f"extra {name}", "installed" if extra["installed"] else missing)
    out.print(table)
    for extra in report["extras"].values():
        if extra["command"]:
            out.print(f"to add: {extra['command']}", markup=False, soft_wrap=True)
    for problem in report["problems"]:
        out.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    if not report["problems"]:
        out.print("all that an audit needs is here", style="green")


def _about(device: dict[str, Any]) -> str:
    if device["name"] == "cpu":
        return f"{device['cores']} cores, {device.get('threads', 'no')} torch threads"
    if "model" in device:
        free, total = size(device["memory_free_bytes"]), size(device["memory_total_bytes"])
        return f"{device['model']}, {free} of {total} free"
    return "available"
