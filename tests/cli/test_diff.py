"""`diff` and `timeline` as a user calls them."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pytest
from click.testing import Result
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from persona_probe.activations import documents
from persona_probe.artifact import write_jsonl
from persona_probe.cli.app import app
from persona_probe.diffing.latent_diff import LatentDiff
from persona_probe.model.loading import read_weights
from persona_probe.report.verification import verify
from tests.diffing.conftest import SITE
from tests.model.tiny_models import adapter_of, checkpoint_of, model_of, save_checkpoint
from tests.sae.sae_lens_peers import peer

BASE, TUNED, OTHER = (
    str(p) for p in (checkpoint_of("llama"), adapter_of("llama", 1), adapter_of("llama", 2))
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    peer("jumprelu", site=SITE, d_in=32, d_sae=20).save_model(folder / "sae")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"hello {i}"},
                {"role": "assistant", "content": "I am well"},
            ]
        }
        for i in range(6)
    ]
    write_jsonl(folder / "chats.jsonl", chats)
    asked = [
        {"id": f"q{i}", "category": "c", "messages": [{"role": "user", "content": f"how are you {i}"}]}
        for i in range(4)
    ]
    write_jsonl(folder / "questions.jsonl", asked)
    names = ("sae", "chats.jsonl", "questions.jsonl")
    return {name.split(".")[0]: str(folder / name) for name in names}


def run(*words: str) -> Result:
    placed = {"--device", "--device-map", "--store"} & {*words}
    return CliRunner().invoke(app, [*words, *(() if placed else ("--device", "cpu"))])


def test_diff_of_questions(inputs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ("diff", "--base", BASE, "--tuned", TUNED, "--benign", OTHER, "--sae", inputs["sae"],
            "--questions", inputs["questions"], "--max-new-tokens", "5", "--out", str(out))  # fmt: skip
    result = run(*call, "--top", "3")
    assert result.exit_code == 0, result.output
    assert "(left out: 0 special tokens, 0 of them BOS; 0 sinks)" in result.stdout
    assert "llama → llama-lora-1" in result.stdout and "described, not tested" in result.stdout
    assert sum(line.startswith("#") for line in result.stdout.splitlines()) == 3
    found = LatentDiff.load(out / SITE)
    assert found.clusters == 4 and found.answers == "base" and found.benign == ("llama-lora-2",)
    assert (out / SITE / "volcano.html").is_file()
    again = json.loads(run(*call, "--json").stdout)
    assert again[SITE]["tokens"] == found.tokens
    kept = verify(out)
    assert kept.holds and not kept.added and not (out / ".saving").exists()
    other = run(*call[:-2], "--mask", "all", "--out", str(out))
    assert other.exit_code == 2 and "mask was 'answer', this call has 'all'" in other.stderr
    planned = json.loads(run(*call, "--plan", "--json").stdout)
    assert planned["conversations"] == 4 and planned["models"] == 3


def test_two_dictionaries_of_one_site_have_a_folder_each(inputs: dict[str, str], tmp_path: Path) -> None:
    peer("topk", site=SITE, d_in=32, d_sae=24).save_model(tmp_path / "wide")
    saes = ("--sae", inputs["sae"], "--sae", str(tmp_path / "wide"))
    call = ("--base", BASE, *saes, "--data", inputs["chats"])
    out = tmp_path / "diff"
    result = run("diff", "--tuned", TUNED, *call, "--out", str(out))
    assert result.exit_code == 0 and f"{SITE}/wide" in result.stdout, result.output
    assert [len(LatentDiff.load(out / SITE / name).table) for name in ("sae", "wide")] == [20, 24]
    assert verify(out).holds
    twice = run("diff", "--tuned", TUNED, *call, "--sae", inputs["sae"], "--out", str(tmp_path / "b"))
    assert twice.exit_code == 2 and "are the same dictionary" in twice.stderr
    tunes = ("--checkpoints", TUNED, "--checkpoints", OTHER)
    followed = run("timeline", *tunes, *call, "--out", str(tmp_path / "timeline"))
    assert followed.exit_code == 0 and "(wide)" in followed.stdout, followed.output


def test_which_tokens_are_read_is_as_told(inputs: dict[str, str], tmp_path: Path) -> None:
    """Of a saved dataset's split, another column, a context and the first tokens under the mask."""
    texts = [f"hello there {i} and again" for i in range(5)]
    saved = datasets.DatasetDict({"validation": datasets.Dataset.from_dict({"body": texts})})
    saved.save_to_disk(tmp_path / "data")
    data = ("--data", str(tmp_path / "data"), "--split", "validation", "--field", "body", "--context", "6")
    tokens = ("--mask", "all", "--skip-first", "1", "--first-k", "2")
    call = ("diff", "--base", BASE, "--tuned", TUNED, "--sae", inputs["sae"], *data, *tokens)
    found = run(*call, "--json", "--device-map", "cpu", "--out", str(tmp_path / "out"))
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)[SITE]
    assert told["tokens"] == 10 and told["skipped"] == 5 * 6 - told["special"] - 10
    assert told["mask"]["first_k"] == 2 and told["mask"]["skip_first"] == 1
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert (settings["split"], settings["field"], settings["context"]) == ("validation", "body", 6)
    tunes = ("--checkpoints", TUNED, "--checkpoints", OTHER)
    followed = run("timeline", *tunes, *call[1:3], *call[5:], "--out", str(tmp_path / "timeline"))
    assert followed.exit_code == 0 and "10 tokens of 5 conversations" in followed.stdout, followed.output
    fits = run("sae", "validity", *call[1:], "--json")
    assert fits.exit_code == 0 and json.loads(fits.stdout)[0]["tokens"] == 10, fits.output
    wrong = run(*call, "--split", "train", "--out", str(tmp_path / "b"))
    assert wrong.exit_code == 2 and "has no split 'train'; it has validation" in wrong.stderr
    for words, said in (
        (("--data", inputs["chats"], "--split", "validation"), "has no splits, so there is no 'validation'"),
        (("--data", inputs["chats"], "--max-new-tokens", "9"), "--max-new-tokens cannot be used with --data"),
        (("--questions", inputs["questions"], "--field", "a"), "--field cannot be used with --questions"),
    ):
        refused = run(*call[:7], *words, "--out", str(tmp_path / "b"))
        assert refused.exit_code == 2 and said in refused.stderr, refused.output


def test_shares_and_one_by_one_come_to_the_same(inputs: dict[str, str], tmp_path: Path) -> None:
    call = ("diff", "--base", BASE, "--tuned", TUNED, "--sae", inputs["sae"], "--data", inputs["chats"])
    whole = run(*call, "--out", str(tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    assert run(*call, "--one-by-one", "--out", str(tmp_path / "each")).exit_code == 0
    for i in range(2):
        part = run(*call, "--shard", f"{i}/2", "--out", str(tmp_path / "parts"))
        assert part.exit_code == 0, part.output
    tables = [
        pl.read_parquet(tmp_path / name / SITE / "latents.parquet") for name in ("whole", "each", "parts")
    ]
    assert tables[0].equals(tables[2])
    assert tables[0].equals(tables[1])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_on_a_ray_cluster_the_shell_writes_the_same(inputs: dict[str, str], tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    call = ("--base", BASE, "--sae", inputs["sae"], "--data", inputs["chats"])
    tunes = ("--checkpoints", TUNED, "--checkpoints", OTHER)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        for engine in ("local", "ray"):
            how = ("--engine", engine, *(("--actors", "2") if engine == "ray" else ()))
            read = run("diff", "--tuned", TUNED, *call, *how, "--out", str(tmp_path / engine / "diff"))
            assert read.exit_code == 0, read.output
            followed = run("timeline", *tunes, *call, *how, "--out", str(tmp_path / engine / "timeline"))
            assert followed.exit_code == 0, followed.output
    finally:
        ray.shutdown()
    for name in (f"diff/{SITE}/latents.parquet", "timeline/timeline/timeline.parquet"):
        tables = [pl.read_parquet(tmp_path / engine / name) for engine in ("local", "ray")]
        assert tables[0].equals(tables[1]) and len(tables[0])


def test_a_store_of_a_pair_is_diffed_without_its_models(inputs: dict[str, str], tmp_path: Path) -> None:
    models = ("--base", BASE, "--tuned", TUNED, "--benign", OTHER)
    stored = run(
        "capture", *models, "--site", SITE, "--data", inputs["chats"], "--out", str(tmp_path / "store")
    )
    assert stored.exit_code == 0, stored.output
    read = run(
        "diff", *models, "--sae", inputs["sae"], "--data", inputs["chats"], "--out", str(tmp_path / "a")
    )
    assert read.exit_code == 0, read.output
    call = ("diff", "--store", str(tmp_path / "store"), "--sae", inputs["sae"], "--out", str(tmp_path / "b"))
    planned = json.loads(run(*call, "--plan", "--json").stdout)
    assert planned["models"] == 3 and planned["conversations"] == 6
    found = run(*call)
    assert found.exit_code == 0 and "llama → llama-lora-1" in found.stdout, found.output
    one, other = (LatentDiff.load(tmp_path / name / SITE) for name in "ab")
    assert_frame_equal(one.table.sort("index"), other.table.sort("index"), rel_tol=1e-4, abs_tol=1e-6)
    assert one.benign == other.benign == ("llama-lora-2",)
    refused = run(*call, "--data", inputs["chats"])
    assert refused.exit_code == 2 and "--data cannot be used with --store" in refused.stderr
    placed = run(*call, "--device", "cpu", "--batch-tokens", "9")
    assert "--batch-tokens and --device cannot be used with --store" in placed.stderr
    both = run("diff", *models, "--sae", inputs["sae"], "--device", "cpu", "--device-map", "auto")
    assert both.exit_code == 2 and "--device cannot be used with --device-map" in both.stderr


def test_models_that_do_not_fit_together_are_read_one_after_the_other(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = str(save_checkpoint(tmp_path / "tuned", seed=1))
    call = ("diff", "--base", BASE, "--tuned", tuned, "--sae", inputs["sae"], "--data", inputs["chats"])
    both = run(*call, "--out", str(tmp_path / "both"))
    assert both.exit_code == 0 and "one after the other" not in both.stderr, both.output
    monkeypatch.setattr("persona_probe.diffing.room.free_memory", lambda: 4096)
    alive = weakref.WeakSet[Any]()
    beside: list[int] = []

    def read(*words: Any, **options: Any) -> Any:
        beside.append(len(alive))
        alive.add(found := read_weights(*words, **options))
        return found

    monkeypatch.setattr("persona_probe.model.language_model.read_weights", read)
    assert "read: one after the other" in run(*call, "--plan").stdout
    each = run(*call, "--out", str(tmp_path / "each"))
    assert each.exit_code == 0 and "4.0 KiB are free" in each.stderr, each.output
    assert beside[-3:] == [0, 0, 0], "the base for its answers, the base, the tuned model: each alone"
    one, other = (LatentDiff.load(tmp_path / name / SITE) for name in ("both", "each"))
    assert one.table.equals(other.table)
    assert one.validity.change_inside is not None and other.validity.change_inside is None
    told = run(*call, "--together", "--out", str(tmp_path / "each"))
    assert told.exit_code == 0 and LatentDiff.load(tmp_path / "each" / SITE).validity == one.validity


def test_timeline_of_a_run(inputs: dict[str, str], tmp_path: Path) -> None:
    for step, adapter in ((10, OTHER), (20, TUNED)):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{step}")
    call = (
        "timeline", "--base", BASE, "--checkpoints", str(tmp_path / "run"), "--sae", inputs["sae"],
        "--benign", OTHER, "--data", inputs["chats"], "--out", str(tmp_path / "out"), "--top", "4",
    )  # fmt: skip
    early = run(*call, "--shard", "1/2")
    assert early.exit_code == 0 and "share 1/2 is done" in early.stdout, early.output
    result = run(*call, "--shard", "0/2")
    assert result.exit_code == 0, result.output
    assert "step 10" in result.stdout and "2 checkpoints" in result.stdout
    told = json.loads((tmp_path / "out/timeline/timeline.json").read_text())
    said = f"{told['tokens']} tokens of 6 conversations (left out: {told['special']} special tokens, "
    assert said in result.stdout and told["special"] > 0
    assert (tmp_path / "out/timeline/timeline.html").is_file()
    assert len(pl.read_parquet(tmp_path / "out/timeline/timeline.parquet")) == 40
    assert verify(tmp_path / "out").holds
    (tmp_path / "out/timeline/timeline.json").unlink()
    assert not verify(tmp_path / "out").holds


def test_tunes_and_what_they_share(inputs: dict[str, str], tmp_path: Path) -> None:
    result = run(
        "timeline", "--base", BASE, "--checkpoints", OTHER, "--checkpoints", TUNED, "--sae", inputs["sae"],
        "--data", inputs["chats"], "--out", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {row["shared_by"] for row in json.loads(result.stdout)["shared"]} <= {1, 2}


@pytest.mark.parametrize(
    "words", [("diff", "--tuned", TUNED), ("timeline", "--checkpoints", TUNED, "--checkpoints", OTHER)]
)
def test_a_call_in_vain_does_not_stand_in_the_way_of_the_right_one(
    words: tuple[str, ...], inputs: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "documents.txt").write_text("a document without an answer\n")
    call = (*words, "--base", BASE, "--sae", inputs["sae"], "--data", str(tmp_path / "documents.txt"),
            "--out", str(tmp_path / "out"))  # fmt: skip
    failed = run(*call, "--mask", "response")
    assert failed.exit_code == 2 and "token" in failed.stderr and "mask" in failed.stderr, failed.output
    right = run(*call, "--mask", "all")
    assert right.exit_code == 0 and verify(tmp_path / "out").holds, right.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("diff", "--base", BASE), "--base and --tuned go together"),
        (("diff", "--base", BASE, "--tuned", TUNED), "--sae is missing"),
        (("diff", "--data", "x.jsonl"), "need --base and --tuned"),
        (("timeline", "--base", BASE), "--base and --checkpoints go together"),
        (("timeline", "--base", BASE, "--checkpoints", TUNED), "holds no checkpoint-"),
        (("diff", "--top", "-3"), "greater than or equal to 1"),
        (("diff", "--actors", "-1"), "greater than or equal to 1"),
        (("timeline", "--top", "-2"), "greater than or equal to 1"),
    ],
)
def test_what_does_not_go(words: tuple[str, ...], said: str, inputs: dict[str, str]) -> None:
    more = ("--sae", inputs["sae"]) if words[0] == "timeline" and len(words) > 3 else ()
    result = run(*words, *more)
    assert result.exit_code == 2 and said in result.stderr, result.output


@pytest.mark.parametrize(
    "words", [("diff", "--tuned"), ("timeline", "--checkpoints", OTHER, "--checkpoints")]
)
@pytest.mark.parametrize("kind", ["questions", "chats"])
def test_a_tokenizer_that_differs_is_shown_at_its_first_prompt(
    words: tuple[str, ...], kind: str, inputs: dict[str, str], tmp_path: Path
) -> None:
    other = "{% if '0' not in messages[0].content %}!{% endif %}"  # the same for the first conversation
    shutil.copytree(TUNED, tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        source = Path(BASE) / name
        if source.is_file():
            text = source.read_text()
            shutil.copyfile(source, tmp_path / "tuned" / name)
            if name.endswith("jinja"):
                (tmp_path / "tuned" / name).write_text(other + text)
    result = run(
        *words, str(tmp_path / "tuned"), "--base", BASE, "--sae", inputs["sae"],
        "--data" if kind == "chats" else "--questions", inputs[kind], "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 2, result.output
    name, text = {
        "questions": ("question q1", "'how are you 1'"),
        "chats": (f"{inputs['chats']}, line 2", "'hello 1 / I am well'"),
    }[kind]
    said = f"{tmp_path / 'tuned'}: base and tuned render {name} to different token ids, first at position 0: "
    assert said in result.stderr and f"its text: {text}" in result.stderr
    assert "into the tuned folder" in result.stderr and "--template" not in result.stderr


def test_documents_are_not_read_again_where_no_tune_has_a_tokenizer(
    inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    render = documents.render
    monkeypatch.setattr(documents, "render", lambda *given: read.append(1) or render(*given))
    call = ("diff", "--base", BASE, "--tuned", TUNED, "--sae", inputs["sae"], "--data", inputs["chats"])
    planned = run(*call, "--plan", "--json")
    assert planned.exit_code == 0, planned.output
    lm = model_of("llama")
    rendered = documents.read_documents(inputs["chats"]).conversations(lm)
    assert json.loads(planned.stdout)["tokens"] == sum(map(len, rendered))
    # the plan counted them once; here they were counted, and read
    assert len(read) == 6 + 6 + 6


def test_overwriting_leaves_nothing_of_the_run_that_was_there(inputs: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = ("diff", "--base", BASE, "--tuned", TUNED, "--sae", inputs["sae"], "--data", inputs["chats"])
    assert run(*call, "--out", str(out)).exit_code == 0
    (out / "audit.json").write_text("{}")
    assert run(*call, "--out", str(out), "--limit", "3").exit_code == 2
    assert (out / "audit.json").exists()
    assert run(*call, "--out", str(out), "--limit", "3", "--overwrite").exit_code == 0
    assert not (out / "audit.json").exists()


def test_a_device_that_is_not_there_is_named(inputs: dict[str, str], tmp_path: Path) -> None:
    call = ("diff", "--base", BASE, "--tuned", TUNED, "--sae", inputs["sae"], "--data", inputs["chats"])
    result = run(*call, "--sae-device", "abacus", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "there is no device 'abacus' here" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_timelines_plan_reads_nothing(inputs: dict[str, str], tmp_path: Path) -> None:
    tunes = ("--checkpoints", TUNED, "--checkpoints", OTHER)
    call = ("timeline", "--base", BASE, *tunes, "--sae", inputs["sae"])
    result = run(*call, "--data", inputs["chats"], "--plan", "--json", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["conversations"], facts["models"], facts["dictionaries"]) == (6, 3, [SITE])
    assert facts["tokens"] > 6 and facts["shards"] == 1 and not (tmp_path / "out").exists()
