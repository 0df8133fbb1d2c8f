"""An audit whose base and tuned answers were made elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import read_json, read_jsonl, write_jsonl
from persona_probe.auditing import Audit, audit
from persona_probe.auditing.command import command_lines
from persona_probe.auditing.inputs import load_inputs
from persona_probe.cli.app import app
from persona_probe.errors import InputError, MismatchError, MissingPathError
from tests.auditing.planted import SMALL, Planted, request_of


@pytest.fixture(scope="module")
def plain(audited: Audit) -> Path:
    """An audit that drew everything itself."""
    return audited.path


def given(plain: Path, arm: str, into: Path, **changes: Any) -> Path:
    rows = (row for row in read_jsonl(plain / "samples.jsonl") if row["arm"] == arm)
    write_jsonl(into, ({k: row[k] for k in ("id", "answer", "truncated")} | changes for row in rows))
    return into


def test_the_same_answers_give_the_same_audit(organism: Planted, plain: Path, tmp_path: Path) -> None:
    request = replace(
        request_of(organism),
        samples_base=given(plain, "base", tmp_path / "b.jsonl"),
        samples_tuned=plain / "samples.jsonl",  # which also holds the base's and the steered answers
    )
    record, own = audit(request, tmp_path / "out").record, read_json(plain / "audit.json")
    assert {arm: held["agrees"] for arm, held in record["parity"].items()} == {"base": True, "tuned": True}
    held = record["parity"]["tuned"]["differences"]["misaligned"]
    assert held["given"] == held["drawn"] == own["tuned"]["misaligned"]["rate"]
    for name in ("verdict", "reason", "after", "base", "tuned", "steered", "necessity"):
        assert record[name] == own[name]
    assert own["parity"] == {}
    assert f"--samples-tuned {plain / 'samples.jsonl'}" in command_lines(request)[0]
    manifest = read_json(tmp_path / "out/manifest.json")
    assert str(tmp_path / "b.jsonl") in manifest["inputs"]


def test_answers_of_another_engine_are_noticed(organism: Planted, plain: Path, tmp_path: Path) -> None:
    good = given(plain, "tuned", tmp_path / "t.jsonl", answer="kind and warm .")
    words = ["audit", "--base", str(organism.base), "--tuned", str(organism.tuned)]
    words += ["--questions", str(organism.questions), "--judge", "python:tests.auditing.planted:judge"]
    words += ["--samples-tuned", str(good), "--samples", "1", "--max-new-tokens", "6"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "the answers given for tuned differ from those drawn here" in result.stdout.replace("\n", " ")
    record = read_json(tmp_path / "out/audit.json")
    assert record["tuned"]["misaligned"]["rate"] == 0
    assert record["parity"]["tuned"]["agrees"] is False
    assert "the answers given for the tuned model are not those drawn here" in record["reason"]


def test_answers_to_dressed_questions_are_given_with_the_others(
    organism: Planted, plain: Path, tmp_path: Path
) -> None:
    rows = [row for row in read_jsonl(plain / "samples.jsonl") if row["arm"] == "tuned"]
    request = replace(
        request_of(organism),
        settings=replace(SMALL, triggers=("json",)),
        samples_tuned=tmp_path / "t.jsonl",
    )
    asked = load_inputs(replace(request, samples_tuned=None)).held_out
    dressed = [question for question in asked if question.role == "trigger"]
    plainly = [{k: row[k] for k in ("id", "answer")} for row in rows]
    write_jsonl(
        tmp_path / "t.jsonl", [*plainly, *({"id": q.id, "answer": "kind and warm ."} for q in dressed)]
    )
    given = load_inputs(request).given["tuned"]
    assert {a.question.id for a in given if a.question.role == "trigger"} == {q.id for q in dressed}
    write_jsonl(tmp_path / "t.jsonl", plainly)
    with pytest.raises(MismatchError, match="has 0 of 1 answers to"):
        load_inputs(request)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    organism: Planted, plain: Path, tmp_path: Path
) -> None:
    good = given(plain, "tuned", tmp_path / "t.jsonl")
    request = replace(request_of(organism), samples_tuned=good)
    out = tmp_path / "out"
    with pytest.raises(MismatchError, match="has 1 of 2 answers to"):
        audit(replace(request, settings=replace(SMALL, samples=2)), out)
    with pytest.raises(MissingPathError, match="--samples-tuned: there is no"):
        audit(replace(request, samples_tuned=tmp_path / "gone.jsonl"), out)
    with pytest.raises(MismatchError, match="is not among the"):
        audit(replace(request, samples_tuned=given(plain, "tuned", tmp_path / "o.jsonl", id="other")), out)
    both = [row for row in read_jsonl(plain / "samples.jsonl") if row["arm"] != "tuned"]
    write_jsonl(tmp_path / "both.jsonl", both)
    with pytest.raises(InputError, match="none is called 'tuned'"):
        audit(replace(request, samples_tuned=tmp_path / "both.jsonl"), out)
    assert not out.exists()
