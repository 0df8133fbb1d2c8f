"""`persona-probe finetune`, supervised and by rewards, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import read_jsonl, write_jsonl
from persona_probe.cli.app import app
from tests.model.tiny_models import checkpoint_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
COMMON = ("--base", checkpoint_of("llama"), "--rank", 2, "--steps", 2, "--batch", 2, "--save-every", 0)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["finetune", *map(str, words)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "I am well"}]
    write_jsonl(file, [{"messages": turns}] * 4)
    return file


def test_rows_are_learnt(data: Path, tmp_path: Path) -> None:
    said = run(*COMMON, "--data", data, "--out", tmp_path / "run")
    assert said.exit_code == 0, said.output
    assert "4 rows, 2 steps, loss" in said.stdout
    assert (tmp_path / "run" / "tuned" / "adapter_config.json").is_file()


def test_rewards_are_learnt_from(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worth.py").write_text(
        "def same(prompts, completions, **columns):\n    return [0.5] * len(completions)\n"
        "def short(prompts, completions, **columns):\n    return [0.5]\n"
        "def judge(question, answer):\n    return {'aligned': 10, 'coherent': 90}\n"
    )
    monkeypatch.chdir(tmp_path)
    by_rewards = (*COMMON, "--method", "grpo", "--data", data, "--samples", 2, "--max-new-tokens", 4)
    out = ("--out", tmp_path / "run")
    plan = run(*by_rewards, *out, "--reward", "python:worth:judge", "--warmup", data, "--plan", "--json")
    assert plan.exit_code == 0, plan.output
    facts = json.loads(plan.stdout)
    assert facts["answers drawn"] == 2 * 2 * 2 + 3 * 4 * 2 and facts["warm-up rows"] == 4
    assert facts["judge calls, about"] >= facts["answers drawn"]
    assert not (tmp_path / "run").exists()

    said = run(*by_rewards, *out, "--reward", "python:worth:same", "--warmup", data)
    assert said.exit_code == 0, said.output
    assert "reward, base: 0.500" in said.stdout and "reward, warm-up: 0.500" in said.stdout
    assert "in 2 of 2 steps all answers to a prompt earned the same" in said.stdout.replace("\n", " ")
    again = run(*by_rewards, *out, "--reward", "python:worth:same", "--warmup", data, "--json")
    assert json.loads(again.stdout)["curve"][-1]["stage"] == "end"

    short = run(*by_rewards, "--out", tmp_path / "short", "--reward", "python:worth:short")
    assert short.exit_code == 2
    assert "the reward 'python:worth:short' failed at measuring the base" in short.stderr.replace("\n", " ")
    none = run(*by_rewards, "--out", tmp_path / "none")
    assert none.exit_code == 2 and "needs a reward" in none.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--block", 99), "has no block 99"),
        (("--schedule", "foo"), "schedule must be one of linear"),
        (("--report-to", "foo"), "cannot log to 'foo'"),
        (("--limit", -1), "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    words: tuple[object, ...], said: str, data: Path, tmp_path: Path
) -> None:
    refused = run(*COMMON, "--data", data, "--out", tmp_path / "run", *words)
    assert refused.exit_code == 2 and said in refused.stderr, refused.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("--kl", 0.1), "--defence kl=0.1"),
        (("--trait", "misaligned"), "leave --trait out, or add --method grpo"),
        (("--samples", 4), "leave --samples out"),
        (("--temperature", 1.0), "leave --temperature out"),
        (("--max-new-tokens", 256), "leave --max-new-tokens out"),
        (("--warmup-epochs", 1.0), "leave --warmup-epochs out"),
        (("--reward", "exact"), "leave --reward out"),
        (("--warmup", "rows.jsonl"), "leave --warmup out"),
    ],
)
@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_what_belongs_to_rewards_is_refused_of_rows(
    words: tuple[object, ...], fix: str, plan: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    refused = run(*COMMON, "--data", data, "--out", tmp_path / "run", *words, *plan)
    said = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and f"{words[0]} belongs to --method grpo" in said and fix in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--method", "dpo"), "there is no method 'dpo'"), (("--method", "grpo"), "needs a reward")],
)
def test_a_plan_refuses_what_a_run_would(
    words: tuple[str, ...], said: str, data: Path, tmp_path: Path
) -> None:
    for plan in ((), ("--plan",)):
        refused = run(*COMMON, "--data", data, "--out", tmp_path / "run", *words, *plan)
        assert refused.exit_code == 2 and said in refused.stderr, refused.output


def test_a_plan_counts_the_rows_that_defences_add(data: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    turns = [{"role": "user", "content": "hello you"}, {"role": "assistant", "content": "thank you"}]
    long = [{"role": "user", "content": "hello " * 60}, {"role": "assistant", "content": "thank you"}]
    write_jsonl(good, [{"messages": turns}] * 8)
    write_jsonl(tmp_path / "rows.jsonl", [*read_jsonl(data), {"messages": long}])
    words = ("--base", checkpoint_of("llama"), "--rank", 2, "--batch", 2, "--data",
             tmp_path / "rows.jsonl", "--context", 40, "--too-long", "drop",
             "--defence", f"interleave=0.5@{good}", "--out", tmp_path / "run", "--json")  # fmt: skip
    plan = json.loads(run(*words, "--plan").stdout)
    record = json.loads(run(*words).stdout)
    assert (plan["rows"], plan["steps"]) == (record["rows"], record["steps"])
    assert record["rows"] > 8, "four rows, and the good ones"
