"""`persona-probe sae train` and `sae validity`, on a real fine-tune: the shipped organism's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE
from typer.testing import CliRunner

from persona_probe.activations import documents, masks, store
from persona_probe.artifact import read_jsonl, shipped, write_jsonl
from persona_probe.cli import options, sae
from persona_probe.cli.app import app
from persona_probe.sae import architectures

SITE = "blocks.2.hook_resid_post"
BASE = shipped("organism", "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    write_jsonl(path, read_jsonl(shipped("organism", "questions.jsonl"))[:200])
    return path


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_dictionary_is_trained_from_documents_or_from_a_store(data: Path, tmp_path: Path) -> None:
    read = ("--model", BASE, "--data", data)
    size = ("--d-sae", 64, "--k", 4, "--steps", 30, "--batch-tokens", 64)
    live = run("sae", "train", "--site", SITE, *read, *size, "--out", tmp_path / "live")
    assert live.exit_code == 0, live.output
    assert "explained variance" in live.stdout and str(tmp_path / "live") in live.stdout.replace("\n", "")
    assert SAE.load_from_disk(tmp_path / "live").cfg.metadata.hook_name == SITE
    kept = run("capture", "--site", SITE, *read, "--out", tmp_path / "store")
    assert kept.exit_code == 0, kept.output
    stored = run(
        "sae", "train", "--site", SITE, "--store", tmp_path / "store", *size,
        "--out", tmp_path / "stored", "--json",
    )  # fmt: skip
    assert stored.exit_code == 0, stored.output
    figures = json.loads(stored.stdout)
    assert figures["steps"] == 30 and 0 < figures["explained_variance"] < 1
    planned = run(
        "sae", "train", "--site", SITE, *read, *size[-2:], "--out", tmp_path / "no", "--plan", "--json"
    )
    assert json.loads(planned.stdout)["latents"] == 8 * 192 and not (tmp_path / "no").exists()
    masked = run(
        "sae", "train", "--site", SITE, "--store", tmp_path / "store", "--mask", "response", "--out", "x"
    )
    assert masked.exit_code == 2 and "--mask cannot be used with --store" in masked.stderr
    refused = run(
        "sae", "train", "--site", "blocks.1.hook_mlp_out", "--store", tmp_path / "store", "--out", "x"
    )
    assert refused.exit_code == 2 and f"holds {SITE}, not blocks.1.hook_mlp_out" in refused.stderr


def test_an_architecture_of_another_kind_is_trained_on_the_tokens_that_are_named(
    data: Path, tmp_path: Path
) -> None:
    tokens = ("--context", 9, "--too-long", "truncate", "--first-k", 5)
    call = ("sae", "train", "--site", SITE, "--model", BASE, "--data", data, *tokens)
    kind = ("--architecture", "gated", "--l1", 2.5, "--d-sae", 64, "--batch-tokens", 64)
    planned = json.loads(run(*call, *kind, "--out", tmp_path / "sae", "--plan", "--json").stdout)
    assert (planned["architecture"], planned["l1"]) == ("gated", 2.5) and planned["tokens"] <= 5 * 200
    made = run(*call, *kind, "--steps", 10, "--out", tmp_path / "sae", "--json")
    assert made.exit_code == 0 and json.loads(made.stdout)["architecture"] == "gated", made.output
    assert SAE.load_from_disk(tmp_path / "sae").cfg.architecture() == "gated"
    wrong = run(*call, *kind, "--k", 4, "--out", tmp_path / "no")
    assert wrong.exit_code == 2 and "a gated dictionary takes l1, not k" in wrong.stderr
    assert not (tmp_path / "no").exists()


def test_the_shell_knows_the_names_that_there_are() -> None:
    """It has them again, because where they are defined torch is loaded."""
    assert options.Mask == masks.Kind and options.TooLong == documents.TooLong
    assert options.StoredType == store.StoredType and sae.Architecture == architectures.Architecture


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", -4], "steps must be at least 1, got -4"),
        (["--lr", "nan"], "lr must be a finite number above 0"),
        (["--limit", 20], "are too few"),
        (["--k", 9999, "--batch-tokens", 64], "k must be from 1 to d_sae - 1 = 1535"),
    ],
)
def test_a_plan_refuses_what_the_run_would(words: list[Any], said: str, data: Path, tmp_path: Path) -> None:
    call = ("sae", "train", "--site", SITE, "--model", BASE, "--data", data, "--out", tmp_path / "no")
    for more in (["--plan"], []):
        done = run(*call, *words, *more)
        assert done.exit_code == 2 and said in done.stderr and list(tmp_path.iterdir()) == []


def test_validity_is_reported_for_every_dictionary(data: Path) -> None:
    tuned = shipped("organism", "tunes", "bad-health")
    words: list[object] = ["sae", "validity", "--base", BASE, "--tuned", tuned, "--data", data, "--limit", 60]
    for block in (2, 4):
        words += ["--sae", shipped("organism", "sae", f"block_{block}")]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "blocks.2.hook_resid_post" in done.stdout and "blocks.4.hook_resid_post" in done.stdout
    found = json.loads(run(*words, "--json").stdout)
    assert [one["site"] for one in found] == ["blocks.2.hook_resid_post", "blocks.4.hook_resid_post"]
    for one in found:
        assert one["explained_variance_base"] > 0.8 and one["gate"] == "pass", one["reason"]
        assert one["change_inside"] is not None and one["l0_tuned"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--site", SITE, "--out", "x"], "give --model and --data, or --store"),
        (["train", "--site", SITE, "--out", "x", "--model", "M"], "give --model and --data, or --store"),
        (["train", "--site", SITE, "--out", "x", "--store", "/no/store"], "there is no folder"),
        (["validity", "--base", "M", "--tuned", "M", "--data", "D", "--sae", "M"], "no dictionary"),
    ],
)
def test_bad_calls_say_what_is_wrong(words: list[str], said: str, data: Path) -> None:
    places = {"M": str(BASE), "D": str(data)}
    done = run("sae", *(places.get(word, word) for word in words))
    assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.stderr
