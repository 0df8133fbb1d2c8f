"""`export`, `calibrate`, `sweep` and `transfer` on the shipped organism: what they find, write and refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from persona_probe.artifact import check_manifest, shipped
from persona_probe.cli.app import app
from persona_probe.cli.steer_bench import aims_of
from persona_probe.errors import InputError
from persona_probe.sae.load import load_sae
from persona_probe.steering import Intervention, Level, latents, load_fix, save_fix

SAE = shipped("organism") / "sae" / "block_4"
VILLAIN = f"{SAE}:1234"


@pytest.fixture(scope="module")
def fixes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that weights can carry, and one that they cannot."""
    sae = load_sae(SAE)
    villain = latents(sae, [1234])
    edits = {
        "add": Intervention("add", villain, sae.site, level=Level((-60.0,))),
        "cap": Intervention("cap", villain, sae.site, level=Level((0.0,)), gain=1.5, read="projection"),
    }
    folder = tmp_path_factory.mktemp("fixes")
    return {name: save_fix(edit, folder / name) for name, edit in edits.items()}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "160", "TERM": "dumb"})


def found(*words: object) -> dict:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(said: str, *words: object) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in re.sub(r"\s+", " ", result.stderr)


def test_calibrate_keeps_the_gentlest_setting_and_measures_it_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["calibrate", "--latent", VILLAIN, "--gains", "1,2", "--positions", "all", "--limit", 10,
             "--temperature", 0, "--budget", 0.5, "--out", out]  # fmt: skip
    planned = found(*words, "--plan")
    assert planned["settings"] == 2 and not out.exists()
    record = found(*words)
    (chosen,) = [row for row in record["settings"] if row["best"]]
    assert chosen["within_budget"] and chosen["unit"] == "base_mean"
    (edit,) = load_fix(out / "fix")
    assert str(edit) == record["chosen"] and edit.gain == chosen["gain"] and edit.op == "cap"
    held = record["held_out"]
    assert held["chosen"]["misaligned"]["rate"] < held["unsteered"]["misaligned"]["rate"]
    assert {"result.json", "figure.html", "fix/intervention.json"} <= set(check_manifest(out)["files"])
    shown = run(*words)  # of the run that is there
    assert "chosen" in shown.stdout and "held-out" in shown.stdout and str(out / "fix") in shown.stderr
    refused("other settings", *words, "--seed", 1)


def test_sweep_finds_the_latent_among_others(tmp_path: Path) -> None:
    words = ["sweep", f"{SAE}:1233-1235", "--levels", "12", "--positions", "last_prompt", "--limit", 8]
    assert found(*words, "--plan")["answers to sample"] > 0
    record = found(*words, "--out", tmp_path / "out")
    by_latent = {row["latent"]: row["misaligned"] for row in record["rows"]}
    assert max(by_latent, key=by_latent.__getitem__) == "block_4:1234" and by_latent["block_4:1234"] > 0.5
    assert "12 residual rms" in run(*words, "--out", tmp_path / "out", "--top", 1).stdout


def test_what_changed_in_its_place_is_not_read_back(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    lines = (shipped("organism") / "questions.jsonl").read_text().splitlines()
    questions.write_text("\n".join(lines))
    words = ["sweep", VILLAIN, "--levels", 12, "--limit", 4, "--questions", questions]
    words += ["--out", tmp_path / "out"]
    before = found(*words)
    assert found(*words) == before
    questions.write_text("\n".join(lines[40:]))
    refused("questions has changed since the run", *words)
    assert found(*words, "--overwrite") != before


def test_the_longest_answer_of_ones_own_models(tmp_path: Path) -> None:
    home = shipped("organism")
    own = ["--base", home / "base", "--questions", home / "questions.jsonl", "--limit", 4, "--plan"]
    assert found("sweep", VILLAIN, *own)["longest answer (tokens)"] == 256  # half of the context
    assert found("sweep", VILLAIN, "--limit", 4, "--plan")["longest answer (tokens)"] == 32
    assert found("sweep", VILLAIN, *own, "--max-new-tokens", 9)["longest answer (tokens)"] == 9


def test_transfer_puts_each_fix_on_each_tune(fixes: dict[str, Path], tmp_path: Path) -> None:
    words = ["transfer", "--tuned", "bad-health", "--tuned", "bad-code", "--limit", 8, "--temperature", 0]
    words += ["--with", f"bad-health={fixes['cap']}", "--out", tmp_path / "out"]
    record = found(*words)
    assert record["in_domain"] == ["health", "code"]
    cured = [row for row in record["rows"] if row["fix"] == "bad-health"]
    assert [(row["tune"], row["own"]) for row in cured] == [("bad-health", True), ("bad-code", False)]
    assert all(row["misaligned"] < row["before"] for row in cured)
    assert "of the excess removed" in run(*words).stdout


def test_export_writes_what_transformers_reads(fixes: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "model"
    assert found("export", "--with", fixes["add"], "--plan")["layers that would carry it"] == ["mlp.4"]
    record = found("export", "--with", fixes["add"], "--out", out)
    assert record["max_difference"] < 1e-3 and record["architecture"] == "LlamaForCausalLM"
    bias = AutoModelForCausalLM.from_pretrained(out).model.layers[4].mlp.down_proj.bias
    assert float(bias.detach().norm()) > 1
    before = (out / "manifest.json").stat().st_mtime_ns
    assert found("export", "--with", fixes["add"], "--out", out) == record
    assert (out / "manifest.json").stat().st_mtime_ns == before, "it was there already"
    refused("a cap is not a bias", "export", "--with", fixes["cap"], "--out", tmp_path / "cap")
    refused("not empty", "export", "--project-out", VILLAIN, "--out", out)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    refused("something else", "export", "--project-out", VILLAIN, "--out", foreign, "--overwrite")
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]
    read = ("--base", out, "--out", out, "--overwrite")
    refused("is what is to be read", "export", "--project-out", VILLAIN, *read)
    projected = found("export", "--project-out", VILLAIN, "--out", out, "--overwrite")
    assert projected["layers"][0] == "embedding" and len(projected["layers"]) == 13


def test_bad_calls(fixes: dict[str, Path], tmp_path: Path) -> None:
    refused("one of them", "calibrate")
    refused("one of them", "calibrate", "--latent", VILLAIN, "--with", fixes["cap"])
    refused("--gains takes numbers", "calibrate", "--latent", VILLAIN, "--gains", "much")
    refused("--gains takes numbers, got ''", "calibrate", "--latent", VILLAIN, "--gains", "")
    for flag, value, said in (
        ("--budget", "nan", "0 to 1; got nan"),
        ("--budget", -1, "0 to 1; got -1"),
        ("--kl-budget", "nan", "from 0 nats"),
        ("--limit", 0, "greater than or equal to 1"),
    ):
        refused(said, "calibrate", "--latent", VILLAIN, flag, value, "--out", tmp_path / "no")
        assert not (tmp_path / "no").exists()
    refused("--questions is missing", "calibrate", "--latent", VILLAIN, "--base", tmp_path)
    refused("--tuned needs --base", "sweep", VILLAIN, "--tuned", tmp_path)
    refused("a transfer needs", "transfer", "--tuned", "bad-health")
    refused("names two folders", "transfer", "--tuned", "a", "--with", fixes["cap"], "--with", fixes["cap"])
    refused("one of them", "export")
    refused("--tuned needs --base", "export", "--tuned", tmp_path, "--with", fixes["add"])
    refused("--op and --levels cannot be used with --with", "calibrate", "--with", fixes["cap"],
            "--op", "add", "--levels", 3)  # fmt: skip
    for wrong in (str(SAE), f"{SAE}:x", f"{SAE}:3-"):
        with pytest.raises(InputError, match="latent"):
            aims_of([wrong])
    assert [aim.name for aim in aims_of([f"{SAE}:3,7-8"])] == ["block_4:3", "block_4:7", "block_4:8"]
