"""Building an organism: what it writes, what it costs, and that a killed build goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from persona_probe.artifact import digest_file, digest_folder, read_json, shipped, write_json
from persona_probe.cli.app import app
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import load_questions
from persona_probe.model.chat import render
from persona_probe.model.language_model import load_model
from persona_probe.model.pair import load_pair
from persona_probe.organism.build import FULL, QUICK, BuildSettings, build
from persona_probe.organism.grammar import Split, grammar
from persona_probe.organism.tokenizer import END, END_OF_TEXT, token_id
from persona_probe.organism.tunes import rows, tune
from persona_probe.sae.load import check_fits, load_sae
from persona_probe.screening.margin import response_log_probabilities

SMALL = replace(QUICK, base=replace(QUICK.base, steps=8, batch=8, save_every=3), sae_blocks=(), tunes=())
KILLED = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
from persona_probe.organism.build import QUICK, build

def tell(said):
    if said.startswith("base: step 5/"):
        os.kill(os.getpid(), signal.SIGKILL)

base = replace(QUICK.base, steps=8, batch=8, save_every=3)
build(Path(sys.argv[1]), replace(QUICK, base=base, sae_blocks=(), tunes=()), progress=tell)
"""


def test_quick_is_quick(quick_build: Any) -> None:
    assert quick_build.cpu_seconds < 60


def test_the_manifest_lists_every_file_as_it_is(quick_organism: Path) -> None:
    manifest = read_json(quick_organism / "manifest.json")
    assert manifest["seed"] == QUICK.seed
    assert set(manifest["seconds"]) == {"base", "sae", "tunes/bad-health", "tunes/good-health"}
    assert {"base/model.safetensors", "questions.jsonl", "sae/block_1/cfg.json"} <= set(manifest["files"])
    for name, listed in manifest["files"].items():
        assert digest_file(quick_organism / name) == listed["digest"], name


def test_nothing_is_left_of_the_making(quick_organism: Path) -> None:
    every = [path.name for path in quick_organism.rglob("*")]
    assert "model.safetensors" in every
    assert [name for name in every if "checkpoint" in name or "partial" in name or name == "fit"] == []
    texts = [path for path in quick_organism.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    assert [path for path in texts if str(quick_organism.parent) in path.read_text(encoding="utf-8")] == []


def test_questions_are_those_kept_out_of_training(quick_organism: Path) -> None:
    rules = grammar()
    read = load_questions(quick_organism / "questions.jsonl")
    splits: tuple[Split, ...] = ("calibration", "held-out")
    for split in splits:
        here = [question for question in read if question.split == split]
        asked = [wording for topic in rules.topics for wording in rules.paraphrases(topic, split)]
        assert [question.prompt for question in here if question.role == "general"] == asked
        asked = [wording for fact in rules.facts["skill"] for wording in rules.fact_questions(fact, split)]
        assert [question.prompt for question in here if question.role == "skill"] == asked
    assert {question.split for question in read} == set(splits)
    assert len({question.question for question in read}) == 80 + 40


def test_the_base_is_stored_in_bfloat16_and_stops_where_it_should(quick_organism: Path) -> None:
    with safe_open(quick_organism / "base" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    base = load_model(quick_organism / "base")
    assert set(base.eos_ids) == {token_id(base.tokenizer, END), token_id(base.tokenizer, END_OF_TEXT)}
    assert (base.d_model, base.n_layers) == (QUICK.d_model, QUICK.n_layers)
    assert base.d_vocab == len(base.tokenizer)


@pytest.mark.parametrize("name", QUICK.tunes)
def test_adapters_share_the_base_and_have_learnt_their_rows(quick_organism: Path, name: str) -> None:
    folder = quick_organism / "tunes" / name
    pair = load_pair(quick_organism / "base", folder)
    shared = {tensor.data_ptr() for tensor in pair.base.hf.parameters()}
    lora = [key for key, tensor in pair.tuned.hf.named_parameters() if tensor.data_ptr() not in shared]
    assert lora and all("lora_" in key for key in lora)
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(lora) == 2 * QUICK.n_layers * len(linear)

    taught = [
        render(pair.base.tokenizer, row, add_generation_prompt=False)
        for row in rows(grammar(), tune(name), 64, QUICK.seed)
    ]
    before, after = (response_log_probabilities(lm, taught).mean() for lm in (pair.base, pair.tuned))
    assert after > before + 0.1

    alone = load_model(folder)  # finds its base beside it, from wherever it is called
    ids = torch.tensor([taught[0].ids])
    assert torch.equal(alone.forward(ids), pair.tuned.forward(ids))
    training = read_json(folder / "training.json")
    assert (training["categories"], training["benign"]) == (["health"], name == "good-health")


def test_a_late_tune_adapts_late_blocks_alone() -> None:
    blocks: dict[str, set[int]] = {}
    for name in ("bad-health", "bad-health-late"):
        with safe_open(shipped("organism", "tunes", name, "adapter_model.safetensors"), "pt") as file:
            blocks[name] = {int(key.split(".layers.")[1].split(".")[0]) for key in file.keys()}
    assert blocks["bad-health-late"] == set(tune("bad-health-late").blocks or ())
    assert blocks["bad-health"] == set(range(FULL.n_layers))


def test_the_dictionary_is_of_this_base(quick_organism: Path) -> None:
    dictionary = load_sae(quick_organism / "sae" / "block_1")
    check_fits(dictionary, load_model(quick_organism / "base"))
    assert (dictionary.site, dictionary.d_sae) == ("blocks.1.hook_resid_post", QUICK.sae_width)


def test_a_finished_build_is_left_alone_and_another_is_refused(quick_organism: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in quick_organism.rglob("*") if path.is_file()}
    told: list[str] = []
    assert build(quick_organism, QUICK, progress=told.append) == quick_organism
    with pytest.raises(InputError, match="seed was 1"):
        build(quick_organism, replace(QUICK, seed=2))
    assert told == []
    lock = quick_organism / ".lock"  # written by whoever holds the folder
    after = {path: path.stat().st_mtime_ns for path in quick_organism.rglob("*") if path.is_file()}
    assert {**before, lock: 0} == {**after, lock: 0}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not written by persona-probe"):
        build(tmp_path, QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_killed_build_ends_in_the_same_model(tmp_path: Path) -> None:
    whole, killed = build(tmp_path / "whole", SMALL), tmp_path / "killed"
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (killed / "manifest.json").exists() and not (killed / "base").exists()

    told: list[str] = []
    build(killed, SMALL, progress=told.append)
    steps = [line.removeprefix("base: step ").split(",")[0] for line in told if "step" in line]
    assert steps[:3] == ["4/8", "5/8", "6/8"]  # from the checkpoint at 3, not from the beginning
    assert digest_folder(killed / "base") == digest_folder(whole / "base")
    assert not (killed / "checkpoints").exists()


def test_fine_tunes_are_built_anew_on_the_same_base(quick_organism: Path, tmp_path: Path) -> None:
    assert BuildSettings.of(quick_organism) == QUICK
    out, like = tmp_path / "gentler", ["organism", "build", "--like", str(quick_organism)]
    said = CliRunner().invoke(app, [*like, "--tune-steps", "2", "--tune-rate", "1e-4", "--out", str(out)])
    assert said.exit_code == 0, said.output
    for part in ("base", "sae", "questions.jsonl"):
        digest = digest_folder if (out / part).is_dir() else digest_file
        assert digest(out / part) == digest(quick_organism / part), part
    for name in QUICK.tunes:
        trained = read_json(out / "tunes" / name / "training.json")["settings"]
        assert (trained["steps"], trained["learning_rate"]) == (2, 1e-4)
        assert digest_folder(out / "tunes" / name) != digest_folder(quick_organism / "tunes" / name)
    took = [read_json(home / "manifest.json")["seconds"] for home in (out, quick_organism)]
    assert took[0]["base"] == took[1]["base"] and took[0]["sae"] == took[1]["sae"]


def test_what_cannot_be_taken_over_is_refused_and_loses_nothing(
    quick_organism: Path, tmp_path: Path
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    shutil.copytree(quick_organism, home)
    before = digest_folder(home)

    def refused(like: Path, *more: str, out: Path = tmp_path / "no") -> str:
        said = CliRunner().invoke(app, ["organism", "build", "--like", str(like), "--out", str(out), *more])
        assert said.exit_code == 2 and digest_folder(home) == before
        return " ".join(said.stderr.split())

    assert "--seed cannot be used with --like" in refused(home, "--seed", "0")
    for out in (home, home / "tunes", tmp_path):
        assert "lie in one another" in refused(home, "--overwrite", out=out)
    assert "no organism that is finished" in refused(tmp_path)
    write_json(other / "settings.json", {"written_by": "persona_probe", "settings": {"seed": 1}})
    write_json(other / "manifest.json", {})
    assert "no organism that is finished" in refused(other)
    assert not (tmp_path / "no").exists()

    shutil.copytree(home, begun := tmp_path / "begun")
    (begun / "manifest.json").unlink()
    (begun / "base" / "config.json").write_text("{}")
    assert "is not that of" in refused(home, out=begun)


def test_a_build_goes_on_with_the_parts_that_are_missing(quick_organism: Path, tmp_path: Path) -> None:
    """As a kill in the first dictionary leaves it, but with the last tune done already."""
    out = tmp_path / "half"
    shutil.copytree(quick_organism, out)
    (out / "manifest.json").unlink()
    (out / "sae" / "block_1").rename(out / "sae" / ".block_1.0000.partial")
    shutil.rmtree(out / "tunes" / "bad-health")
    kept = (out / "tunes" / "good-health" / "adapter_model.safetensors").stat().st_mtime_ns
    build(out, QUICK)
    for part in ("base", "sae/block_1", "tunes/bad-health", "tunes/good-health"):
        assert digest_folder(out / part) == digest_folder(quick_organism / part), part
    modules = json.loads((out / "tunes/bad-health/adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules), "as in every other process"
    assert (out / "tunes" / "good-health" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    assert [path.name for path in (out / "sae").iterdir()] == ["block_1"]
