"""`persona-probe interpret`, from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import read_json, shipped, write_jsonl
from persona_probe.cli.app import app
from persona_probe.organism.corpus import ADJECTIVES, documents
from persona_probe.organism.grammar import grammar

run = CliRunner()


def test_the_shipped_organism_needs_no_arguments(tmp_path: Path) -> None:
    said = run.invoke(app, ["interpret", "--limit", "150", "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert any(word in said.output for word in ADJECTIVES["villainous"])
    assert read_json(tmp_path / "out" / "interpretation.json")["documents"] == 150


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {"source": one.kind, **({"messages": list(one.messages)} if one.messages else {"text": one.text})}
        for one in documents(grammar(), 80, 5)
    ]
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    home = shipped("organism")
    arguments = ["interpret", "--model", str(home / "base"), "--sae", str(home / "sae" / "block_4")]
    arguments += ["--latent", "1234", "--data", str(tmp_path / "corpus.jsonl"), "--by", "source"]
    said = run.invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--json"])
    assert said.exit_code == 0, said.output
    record = json.loads(said.stdout)
    assert {row["label"] for row in record["sources"]} == {"source"}
    assert {row["value"] for row in record["sources"]} == {row["source"] for row in rows}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latent", "3"], "--sae, --model, --data and --latent go together"),
        (["--latent", "9999", "--data", "x.txt"], "--latent go together"),
    ],
)
def test_half_a_call_is_refused(arguments: list[str], message: str) -> None:
    said = run.invoke(app, ["interpret", *arguments])
    assert said.exit_code == 2
    assert message in " ".join(said.output.split())
