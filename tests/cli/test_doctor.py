"""`doctor` tells what is here and what is missing, and names the command that adds it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from persona_probe.cli import doctor
from persona_probe.cli.app import app


def report(*, code: int = 0) -> dict:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in absent:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_versions_and_devices_are_the_running_ones() -> None:
    found = report()
    assert found["versions"]["torch"] == torch.__version__
    cpu = found["devices"][0]
    assert cpu["name"] == "cpu"
    assert 1 <= cpu["cores"] <= (os.cpu_count() or 1)
    assert cpu["threads"] == torch.get_num_threads()


def test_disk_and_memory_are_the_systems() -> None:
    found = report()
    assert found["disk"]["free_bytes"] == pytest.approx(shutil.disk_usage(".").free, rel=0.1)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < found["memory_free_bytes"] < total


def test_every_extra_in_pyproject_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib")
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    written = tomllib.loads(pyproject.read_text())["project"]
    assert set(report()["extras"]) == set(written["optional-dependencies"])
    assert len(doctor.requirements()[""]) == len(written["dependencies"])


def test_a_missing_extra_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "trl")
    train = report()["extras"]["train"]
    assert train["missing"] == ["trl"]
    assert train["command"] == f"{sys.executable} -m pip install 'persona-probe[train]'"
    shown = CliRunner().invoke(app, ["doctor"]).output
    assert "without trl" in shown
    assert train["command"] in shown


def test_an_extra_that_is_there_needs_no_command() -> None:
    assert report()["extras"]["dev"] == {"installed": True, "missing": [], "command": None}


def test_a_missing_core_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "polars")
    found = report(code=1)
    assert found["versions"]["polars"] is None
    assert any("polars" in problem for problem in found["problems"])
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert "problem: not installed: polars" in shown.output


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_almost_full_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**6, 10**6))
    found = report(code=1)
    assert found["problems"] == [f"only 976.6 KiB are free on the disk of {Path.cwd()}"]


def test_a_torch_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = report(code=1)
    assert found["devices"][0]["name"] == "cpu"
    assert any("torch does not load" in problem for problem in found["problems"])
