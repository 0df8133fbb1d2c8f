"""`persona-probe capture`, as a shell user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.activations import ActivationStore
from persona_probe.cli.app import app
from tests.model.tiny_models import adapter_of, checkpoint_of

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": "user", "content": "hello " * n}]} for n in (1, 3, 200)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{torn\n" + '{"prompt": 1}\n')
    return path


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_pair_is_stored_and_what_was_left_out_is_said(data: Path, tmp_path: Path) -> None:
    pair = ("--base", checkpoint_of("llama"), "--tuned", adapter_of("llama"))
    call = ("capture", *pair, "--site", SITE, "--data", data, "--out", tmp_path / "store")
    done = run(*call)
    assert done.exit_code == 0, done.output
    assert "2 rows could not be read" in done.stderr and f"{data}, line 4: not valid JSON" in done.stderr
    assert "1 documents are longer than the context" in done.stderr and "tokens were cut off" in done.stderr
    assert "of them BOS" in done.stdout and "sinks, left out" in done.stdout
    store = ActivationStore.open(tmp_path / "store")
    assert [model.name for model in store.models] == ["llama", "llama-lora-0"]
    assert store.source == str(data) and store.counts.conversations == 3
    again = run(*call, "--json")
    told = json.loads(again.stdout)
    assert told["digest"] == store.digest and told["counts"]["counted"] == len(store)
    assert told["reading"]["bad"] == 2
    refused = run(*call, "--mask", "prompt", "--skip-first", 1)
    assert refused.exit_code == 2 and "holds a run with other settings: mask was" in refused.stderr


def test_a_plan_writes_nothing(data: Path, tmp_path: Path) -> None:
    call = ("capture", "--model", checkpoint_of("llama"), "--site", SITE, "--data", data)
    planned = run(*call, "--out", tmp_path / "store", "--plan", "--json")
    assert planned.exit_code == 0, planned.output
    facts = json.loads(planned.stdout)
    assert facts["conversations"] == 3 and facts["models"] == ["llama"]
    assert facts["bytes on disk (at most)"] > facts["tokens stored (at most)"] * 32 * 4
    assert "tokens stored" in run(*call, "--out", tmp_path / "store", "--plan").stdout
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--site", SITE], "give --model, or --base and --tuned"),
        (["--model", "M", "--base", "M", "--site", SITE], "give --model, or --base and --tuned"),
        (["--model", "M", "--site", "blocks.9.hook_resid_post"], "blocks 0 to 2"),
        (["--model", "M", "--site", SITE, "--mask", "some"], "'some' is not one of"),
        (["--model", "M", "--site", SITE, "--mask", "response"], "leaves no token"),
        (["--model", "M", "--site", SITE, "--too-long", "crop"], "'crop' is not one of"),
        (["--model", "M", "--site", SITE, "--too-long", "error"], "and the context is 128"),
        (["--model", "M", "--site", SITE, "--store-dtype", "int8"], "'int8' is not one of"),
        (["--model", "M", "--site", SITE, "--field", "prompt"], "no row of"),
        (["--model", "M", "--site", SITE, "--context", "-5"], "context must be at least 1"),
        (["--model", "M", "--site", SITE, "--context", "129"], "at most the 128"),
        (["--model", "M", "--site", SITE, "--batch-tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_calls_say_what_is_wrong(words: list[str], said: str, data: Path, tmp_path: Path) -> None:
    words = [str(checkpoint_of("llama")) if word == "M" else word for word in words]
    done = run("capture", *words, "--data", data, "--out", tmp_path / "store")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr and not (tmp_path / "store").exists()
