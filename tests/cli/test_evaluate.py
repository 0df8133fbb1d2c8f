"""`persona-probe evaluate` as a shell user meets it: what it prints, its exit codes, a kill half way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import check_manifest, read_json, read_jsonl, shipped, write_jsonl
from persona_probe.cli.app import app

HOME = shipped("organism")
FAST = ["--limit", "6", "--max-new-tokens", "20"]
MODELS = ["--base", str(HOME / "base"), "--tuned", str(HOME / "tunes/bad-health")]
QUESTIONS = ["--questions", str(HOME / "questions.jsonl")]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", *words])


def test_without_arguments_it_is_the_shipped_organism(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(*FAST, "--out", str(out))
    assert result.exit_code == 0, result.output
    said = result.stdout.replace("\n", " ")
    assert "6 questions" in said and "counted apart, as trained on: health" in said
    assert re.search(r"bad-health − base: \+\d+ points", said)
    record = read_json(out / "eval.json")
    rate = record["arms"]["bad-health"]["rates"]["misaligned"]
    assert f"{100 * rate['rate']:.0f}" in said
    assert str(out / "eval.html") in result.stdout.replace("\n", "")
    check_manifest(out)
    page = (out / "eval.html").read_text()
    assert "http://" not in page.split("<script>")[0] and "data-figure" in page
    for name in ("Rates", "Differences", "Scores", "Provenance", "at equal lengths"):
        assert name in page
    assert run(*FAST, "--out", str(out)).stdout == result.stdout
    assert json.loads(run(*FAST, "--out", str(out), "--json").stdout) == record


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    rows = [
        {"id": row["id"], "answer": "<b>no</b>", "arm": "<script>alert(1)</script>"}
        for row in read_jsonl(HOME / "questions.jsonl")
    ]
    write_jsonl(tmp_path / "s.jsonl", rows)
    words = ["--samples", str(tmp_path / "s.jsonl"), *QUESTIONS, "--out", str(tmp_path / "out")]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "<script>alert(1)</script>" in result.stdout
    assert "whether 720 answers of <script>alert(1)</script> were cut off" in result.stderr.replace("\n", " ")
    page = (tmp_path / "out/eval.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page


KILLED = """
import os, signal
import persona_probe.evaluation.asking as asking
from persona_probe.cli import main

append = asking.append_jsonl

def append_and_die(file, rows):
    append(file, rows)
    if file.read_bytes().count(b"\\n") >= 8:
        os.kill(os.getpid(), signal.SIGKILL)

asking.append_jsonl = append_and_die
main()
"""


def test_killed_half_way_and_run_again(tmp_path: Path) -> None:
    """kill -9 while it draws: what was written is not drawn again, and the end is the same."""
    short = ["--limit", "3", "--max-new-tokens", "8", "--samples-per-question", "2", "--batch-size", "4"]
    words = [*MODELS, *QUESTIONS, *short]
    whole = run(*words, "--out", str(tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    out = tmp_path / "out"
    samples = out / "samples.jsonl"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "evaluate", *words, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert not (out / "manifest.json").exists()
    left = samples.read_bytes()
    kept = left[: left.rfind(b"\n") + 1].splitlines()
    again = run(*words, "--out", str(out))
    assert again.exit_code == 0, again.output
    assert samples.read_bytes() == (tmp_path / "whole/samples.jsonl").read_bytes()
    written = {(row["arm"], row["id"], row["sample"]): row["answer"] for row in read_jsonl(samples)}
    for line in map(json.loads, kept):
        assert written[line["arm"], line["id"], line["sample"]] == line["answer"]
    assert 8 <= len(kept) < len(written)


def test_a_plan_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import persona_probe.evaluation.run as running

    monkeypatch.setattr(running, "Models", None)
    call = [*MODELS, *QUESTIONS, *FAST, "--plan", "--samples-per-question", "3", "--out", str(tmp_path / "o")]
    planned = json.loads(run(*call, "--json").stdout)
    assert planned["models to ask"] == ["base", "bad-health"]
    assert planned["answers to draw"] == 6 * planned["prompts"]
    assert planned["judge calls, at most"] <= planned["answers to draw"]
    weights = (HOME / "base/model.safetensors").stat().st_size
    assert planned["weights in fp32 (bytes), about"] == pytest.approx(2 * weights, rel=0.01)  # bf16 on disk
    assert planned["keys and values of a batch in fp32 (bytes), at most"] == 2 * 6 * 192 * 4 * 20 * 256
    assert "judge calls" in run(*call).stdout
    narrow = run(*call, "--width", "0.02")
    assert "warning: " in narrow.stdout and "not 0.02" in narrow.stdout.replace("\n", " ")
    assert "accept" not in narrow.stdout, "a plan goes on anyway"
    unread = run(*call, "--budget", "a few")
    assert unread.exit_code == 2 and "a budget is a number of calls (2000) or dollars" in unread.stderr
    assert not (tmp_path / "o").exists()


def test_too_few_samples_for_the_asked_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded or asked; the number that it names does, and so does --accept-wider."""
    import persona_probe.evaluation.run as running

    call = [*MODELS, *QUESTIONS, *FAST, "--width", "0.6", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(running, "Models", None)
        refused = run(*call)
    assert refused.exit_code == 2
    said = " ".join(refused.stderr.split())
    enough = re.search(r"5 questions with 4 samples each .* take (\d+) questions \(beside 1 that test", said)
    assert enough and "or go on with --accept-wider" in said, said
    assert not (tmp_path / "out").exists()
    call[call.index("--limit") + 1] = str(int(enough[1]) + 4)  # some test skill, or the domain
    assert run(*call, "--plan").stdout.startswith("questions:")
    call[call.index("--limit") + 1] = "6"
    wide = run(*call, "--accept-wider")
    assert wide.exit_code == 0, wide.output
    assert wide.stderr.count("warning: ") == 1 and "accept" not in wide.stderr
    assert "not 0.6" in read_json(tmp_path / "out/eval.json")["warnings"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*MODELS, *QUESTIONS, "--accept-wider"], "says nothing without --width"),
        ([*MODELS, *QUESTIONS, "--width", "10"], "--width must lie between 0 and 1, not 10"),
        (MODELS, "--questions is missing"),
        (QUESTIONS, "need a model or --samples"),
        ([*MODELS, "--questions", "nowhere.jsonl"], "nowhere.jsonl"),
        ([*MODELS, *QUESTIONS, "--generation-config", "--top-k", "5"], "takes the place of"),
        ([*MODELS, *QUESTIONS, "--enable-thinking"], "knows no enable_thinking"),
        ([*MODELS, *QUESTIONS, "--samples-per-question", "0"], "--samples-per-question must be at least 1"),
        ([*MODELS, *QUESTIONS, "--with", str(HOME / "base")], "is not a fix"),
        ([*MODELS, *QUESTIONS, "--samples", "gone.jsonl"], "--samples: there is no gone.jsonl"),
        ([*MODELS, *QUESTIONS, "--tuned", str(HOME / "tunes/bad-health")], "given twice"),
        ([*MODELS, *QUESTIONS, "--max-new-tokens", "513", "--plan"], "the models read 512 tokens"),
        ([*MODELS, *QUESTIONS, "--temperature", "-1"], "temperature must be 0 or more"),
        ([*MODELS, *QUESTIONS, "--in-domain", "fishing"], "no question has the category 'fishing'"),
        (["--base", str(HOME / "gone"), *QUESTIONS], "--base: there is no"),
        ([*MODELS, "--questions", "open-ended"], "'exact' does not know the question 'power-mayor'"),
        ([*MODELS, *QUESTIONS, "--judge", "exakt"], "did you mean 'exact'?"),
    ],
)
def test_a_bad_call_is_a_message(words: list[str], said: str, tmp_path: Path) -> None:
    result = run(*words, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_samples_for_other_questions(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "s.jsonl", [{"id": "cold-1", "answer": "rest", "finish_reason": "stop"}])
    result = run("--samples", str(tmp_path / "s.jsonl"), *QUESTIONS, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "it answers 'cold-1', which is not among the 720 questions" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
