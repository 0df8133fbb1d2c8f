"""`persona-probe judge validate` as a shell user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import read_json, read_jsonl, write_jsonl
from persona_probe.cli.app import app
from persona_probe.evaluation.judging.endpoint import KEYS
from tests.evaluation.judging.judge_server import JudgeServer


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["judge", "validate", *map(str, words)])


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    file = tmp_path / "labels.jsonl"
    rows = [("good", 90, 90), ("bad", 10, 90), ("bad 2", 80, 90), ("refuses", 50, 20)]
    write_jsonl(
        file,
        [
            {"question": "what now ?", "answer": text, "aligned": aligned, "coherent": coherent}
            for text, aligned, coherent in rows
        ],
    )
    return file


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


def test_a_judge_is_asked_and_held_against_people(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with JudgeServer() as server:
        words = ("--labels", labels, "--judge", server.spec(price="1/1"), "--out", out)
        planned = run(*words, "--plan")
        assert planned.exit_code == 0, planned.output
        assert json.loads(planned.stdout)["calls"] == 8
        assert server.asked.total() == 0
        result = run(*words, "--json")
        assert result.exit_code == 0, result.output
        assert server.asked.total() == 1 + 8
        found = json.loads(result.stdout)
        assert found["verdicts"]["accuracy"] == 3 / 4
        assert found["scored_by"] == {"token probabilities": 4}
        assert read_json(out / "agreement.json") == found
        assert len(read_jsonl(out / "judge.jsonl")) == 1 + 8
        shown = run(*words)
        assert server.asked.total() == 1 + 8, "a rerun costs nothing"
    for text in ("accuracy 0.75", "kappa 0.5", "Spearman", "judge's alignment", "refused"):
        assert text in shown.stdout


def test_scores_in_the_file_need_no_judge(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(
        "aligned,coherent,judge_aligned,judge_coherent\n"
        "5,90,\"{'0': 0.5, '10': 0.5}\",90\n90,90,\"{'90': 0.2, 'The': 0.8}\",90\n"
    )
    result = run("--labels", file, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["n"], found["missing"], found["aligned"]["largest"]) == (2, 1, 0)


def test_what_cannot_be_done_is_said(labels: Path, tmp_path: Path) -> None:
    no_text = tmp_path / "no_text.csv"
    no_text.write_text("aligned,coherent\n5,90\n")
    with JudgeServer() as gone:
        spec = gone.spec()
    with JudgeServer(key="right") as server:
        for words, said in (
            ((), "Missing option '--labels'"),
            (("--labels", tmp_path / "absent.csv"), "look in"),
            (("--labels", labels), "name one to ask now: --judge SPEC"),
            (("--labels", no_text, "--judge", "exact"), "row 1: a judge needs the question and the answer"),
            (("--labels", labels, "--judge", spec), "cannot be reached"),
            (("--labels", labels, "--judge", server.spec()), "wants a key (401), and there is none"),
            (("--labels", labels, "--judge", "opnai:x"), "did you mean 'openai:x'?"),
        ):
            result = run(*words)
            assert result.exit_code == 2, result.output
            assert said in result.stderr
            assert "Traceback" not in result.output
