"""`persona-probe flag`: what its scores are called, which way they point, and which of them decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from persona_probe.artifact import write_jsonl
from persona_probe.cli.app import app
from persona_probe.cli.flag import probes_of
from persona_probe.errors import InputError
from persona_probe.steering.intervention import Intervention, Level
from persona_probe.steering.io import save_fix
from persona_probe.steering.target import direction
from persona_probe.training.flag import flag
from persona_probe.training.watching import Probe
from tests.model.tiny_models import checkpoint_of
from tests.training.tiny import SITE, dictionary, llama, rows

ROSE, FELL = torch.linspace(-1, 1, 32), torch.linspace(1, 2, 32).cos()


def fix(folder: Path, *edits: tuple[str, torch.Tensor]) -> Path:
    made = [Intervention(op, direction(v), SITE, level=Level((0.0,))) for op, v in edits]  # type: ignore[arg-type]
    save_fix(made, folder)
    return folder


def called(tmp_path: Path, *words: object, code: int = 0) -> Any:
    write_jsonl(tmp_path / "rows.jsonl", [row.record() for row in rows(4)])
    given = ("--base", checkpoint_of("llama"), "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    words = (*given, "--max-new-tokens", 3, *words, "--json")
    result = CliRunner().invoke(app, ["flag", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def scores(tmp_path: Path) -> pl.DataFrame:
    return pl.read_parquet(tmp_path / "out" / "scores.parquet")


def test_fixes_of_one_folder_name_each_have_their_column(tmp_path: Path) -> None:
    one = fix(tmp_path / "a" / "interventions", ("cap", ROSE))
    other = fix(tmp_path / "b" / "interventions", ("cap", FELL))
    alone = fix(tmp_path / "b" / "alone", ("cap", ROSE))
    called(tmp_path, "--with", one, "--with", other, "--with", alone)
    found = scores(tmp_path)
    names = [name for name in found.columns if name.endswith(" 0.0")]
    assert names == ["a/interventions 0.0", "b/interventions 0.0", "alone 0.0"]
    probes = [Probe(str(i), SITE, direction(v)) for i, v in enumerate((ROSE, FELL, ROSE))]
    expected = flag(rows(4), llama(), probes, max_new_tokens=3).table
    for i, name in enumerate(names):
        assert found[name].to_list() == expected[str(i)].to_list()


def test_latents_of_one_index_are_told_apart_by_their_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_probe.sae.load.load_sae", lambda _: dictionary())
    names = [one.name for one in probes_of(["x/sae:5", "y/sae:5", "y/sae:7", "y/other:9", "other:9"], [])]
    assert names[:3] == ["latent 5 of x/sae", "latent 5 of y/sae", "latent 7"]
    assert names[3] == "latent 9 of y/other" and len(set(names)) == 5


def test_what_is_given_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = fix(tmp_path / "fix", ("cap", ROSE))
    with pytest.raises(InputError, match=r"--with .*fix is given twice"):
        probes_of([], [Path("fix"), place])
    with pytest.raises(InputError, match=r"--latent \./sae:5 is given twice"):
        probes_of(["sae:5", "./sae:5"], [])
    assert "is given twice" in called(tmp_path, "--with", "fix", "--with", place, code=2).stderr


def test_a_latent_that_fell_is_read_the_other_way_round_and_decides_last(tmp_path: Path) -> None:
    mended = fix(tmp_path / "fix", ("floor", FELL), ("cap", ROSE))
    chosen = json.loads(called(tmp_path, "--with", mended).stdout)["by"]
    assert chosen == "fix 1.0 difference", "the latent that rose, though it is the second"
    plain = flag(rows(4), llama(), [Probe("fell", SITE, direction(FELL))], max_new_tokens=3).table
    turned = scores(tmp_path)["fix 0.0 difference"].to_list()
    assert turned == pytest.approx([-one for one in plain["fell difference"].to_list()])
    helpful = max(range(4), key=lambda i: plain["fell difference"][i])
    assert turned[helpful] == min(turned), "the most helpful row is the least suspect"


def test_a_fix_of_floors_alone_decides_too(tmp_path: Path) -> None:
    only = fix(tmp_path / "fix", ("floor", FELL))
    assert json.loads(called(tmp_path, "--with", only).stdout)["by"] == "fix 0.0 difference"
