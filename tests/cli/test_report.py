"""`persona-probe report`: what it finds changed in a run's folder, and how it puts audits side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import RunFolder, digest_file, digest_folder, digest_of, write_json, write_text
from persona_probe.cli.app import app
from persona_probe.report.verification import verify
from tests.report.test_side_by_side import ALIGNED, entry


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def audit(folder: Path, name: str = "bad-health", seed: int = 0, **more: Any) -> Path:
    """A finished run that holds an audit's record and a page."""
    weights = folder.parent / "weights.bin"
    weights.write_bytes(b"weights")
    model = folder.parent / "model"
    write_text(model / "config.json", "{}")
    with RunFolder.open(folder, {"tuned": name, "seed": seed}) as opened:
        write_json(folder / "audit.json", entry(name, **more).audit)
        write_text(folder / "report.html", "<p>report</p>")
        write_text(folder / "interventions" / "fix.json", "{}")
        inputs = {str(weights): digest_file(weights), str(model): digest_folder(model)}
        opened.finish({"inputs": inputs | {"/nowhere/else": "sha256:00"}})
    return folder


def test_an_untouched_run_holds(tmp_path: Path) -> None:
    folder = audit(tmp_path / "a")
    result = run("--verify", folder)
    assert result.exit_code == 0, result.output
    assert f"{folder}: unchanged, 4 files and 2 inputs" in result.stdout
    assert "/nowhere/else: not compared" in result.stdout
    assert digest_file(folder / "manifest.json") in result.stdout


def test_everything_that_no_longer_matches_is_named(tmp_path: Path) -> None:
    folder = audit(tmp_path / "a")
    record = folder / "audit.json"
    record.write_bytes(record.read_bytes().replace(b"restored", b"restureD"))  # no longer, no shorter
    (folder / "interventions" / "fix.json").unlink()
    write_text(folder / "notes.txt", "mine")
    (tmp_path / "weights.bin").write_bytes(b"others")
    result = run("--verify", folder, "--json")
    assert result.exit_code == 2
    (found,) = json.loads(result.stdout)
    assert found["holds"] is False
    assert [(one[0], one[1]) for one in found["mismatches"]] == [
        ("changed", "audit.json"),
        ("missing", "interventions/fix.json"),
        ("input changed", str(tmp_path / "weights.bin")),
    ]
    assert found["mismatches"][0][3] == digest_file(record)
    assert found["added"] == ["notes.txt"]
    said = run("--verify", folder)
    assert said.exit_code == 2
    for text in (
        "3 of 6 no longer match",
        "fix.json is missing",
        "audit.json was changed",
        "notes.txt: not in",
    ):
        assert text in said.stdout


def test_one_changed_folder_among_several_is_enough(tmp_path: Path) -> None:
    good, bad = audit(tmp_path / "a"), audit(tmp_path / "b")
    (bad / "report.html").unlink()
    assert run("--verify", good, bad).exit_code == 2
    assert run("--verify", good).exit_code == 0


def test_the_shards_and_the_seal_of_a_capture(tmp_path: Path) -> None:
    write_text(tmp_path / "shards" / "0.safetensors", "tensors")
    write_text(tmp_path / "shards" / "0.json", "{}")
    shard = {"name": "shards/0.safetensors", "digest": digest_file(tmp_path / "shards" / "0.safetensors")}
    facts: dict[str, Any] = {"kind": "activation store", "shards": [shard], "d_model": 8}
    write_json(tmp_path / "manifest.json", {**facts, "digest": digest_of(facts)})
    found = verify(tmp_path)
    assert found.holds
    assert (found.files, found.added) == (1, ())
    write_json(tmp_path / "manifest.json", {**facts, "d_model": 9, "digest": digest_of(facts)})
    write_text(tmp_path / "shards" / "0.safetensors", "tensorz")
    assert [(one.kind, one.path) for one in verify(tmp_path).mismatches] == [
        ("changed", "shards/0.safetensors"),
        ("changed", "manifest.json"),
    ]


def test_the_questions_of_an_evaluation_are_not_taken_for_a_file(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("{}\n")
    with RunFolder.open(tmp_path / "run", {"questions": str(questions)}) as opened:
        write_json(opened.path / "eval.json", {})
        opened.finish({"inputs": {str(questions): "sha256:of the parsed questions"}})
    found = verify(tmp_path / "run")
    assert found.holds
    assert found.uncompared == (str(questions),)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (None, "holds no manifest.json"),
        ("[]", "is not a manifest of ours"),
        ('{"files": [1]}', "is not a manifest of ours"),
        ('{"files": {"a": 1}}', "is not a manifest of ours"),
        ('{"files": {}, "inputs": [1]}', "is not a manifest of ours"),
        ('{"files": {"../../etc/passwd": {"digest": "x"}}}', "a file outside of its folder"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, manifest: str | None, said: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    result = run("--verify", folder)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "internal error" not in result.stderr
    assert run("--verify", tmp_path / "none").exit_code == 2


def test_audits_side_by_side(tmp_path: Path) -> None:
    first, second = audit(tmp_path / "a"), audit(tmp_path / "b", "good", seed=3, **ALIGNED)
    page = tmp_path / "pages" / "page.html"
    result = run(first, second, "--out", page)
    assert result.exit_code == 0, result.output
    assert "1 of 2 fine-tunes is misaligned; a fix restores it." in result.stdout
    assert "not asked alike: seed" in result.stderr
    assert 'href="../a/report.html"' in page.read_text()
    again = run(first, second, "--out", page)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert run(first, second, "--out", page, "--overwrite").exit_code == 0


def test_side_by_side_as_json(tmp_path: Path) -> None:
    result = run(audit(tmp_path / "a"), audit(tmp_path / "b", "good", **ALIGNED), "--json")
    one, other = json.loads(result.stdout)
    assert (one["verdict"], one["after"], one["latent"]) == (
        "misaligned, persona found",
        "restored",
        "latent 812, block 3",
    )
    assert one["rates"]["tuned"]["value"] == 0.76
    assert other["after"] is other["latent"] is other["seconds"] is other["rates"]["steered"]["value"] is None


def test_a_changed_audit_is_shown_with_a_warning(tmp_path: Path) -> None:
    folder = audit(tmp_path / "a")
    (folder / "report.html").unlink()
    result = run(folder, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert f"{folder}: report.html is missing" in result.stderr
    page = (tmp_path / "page.html").read_text()
    assert "report.html is missing" in page
    assert "href" not in page


def test_a_folder_that_is_no_audit_is_said_to_be_none(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", {}) as opened:
        write_json(opened.path / "eval.json", {})
        opened.finish({})
    result = run(tmp_path / "run")
    assert result.exit_code == 2
    assert "it holds an evaluation" in result.stderr
    assert run(tmp_path / "nowhere").exit_code == 2
    folder = audit(tmp_path / "a")
    (folder / "audit.json").unlink()
    missing = run(folder)
    assert missing.exit_code == 2
    assert "there is no audit.json in it" in missing.stderr
