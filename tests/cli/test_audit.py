"""`persona-probe audit` as a shell user meets it: what it prints, its exit codes, what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from persona_probe.artifact import RunFolder, atomic, check_manifest, read_json, write_json, write_jsonl
from persona_probe.cli.app import app
from persona_probe.evaluation.questions import Question
from tests.auditing.planted import JUDGE, Planted
from tests.model.tiny_models import save_adapter, save_checkpoint

FAST = ["--samples", "1", "--calibration-samples", "1", "--controls", "1", "--max-new-tokens", "6"]


def words(organism: Planted, out: Path, *more: str, **other: Path | str) -> list[str]:
    """A fast audit of the organism on directions; `other` takes the place of what it is asked with."""
    given = {"base": organism.base, "tuned": organism.tuned, "questions": organism.questions, "judge": JUDGE}
    flags = [word for name, value in {**given, **other}.items() for word in (f"--{name}", str(value))]
    return ["audit", *flags, "--out", str(out), *FAST, *more]


def run(arguments: Sequence[str]) -> Any:
    return CliRunner().invoke(app, list(arguments))


def refused(arguments: Sequence[str], out: Path, *said: str, code: int = 2) -> str:
    """The message of a call that must fail: each of `said` is in it, and nothing is left behind."""
    beside = sorted(out.parent.iterdir())
    result = run(arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    for text in said:
        assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert not out.exists()
    assert sorted(out.parent.iterdir()) == beside
    return result.stderr


def questions_file(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def line(key: str, category: str = "home", **fields: Any) -> str:
    content = fields.pop("content", "what about the lamp ?")
    return json.dumps(
        {"id": key, "category": category, "messages": [{"role": "user", "content": content}], **fields}
    )


# what a good call gives


@pytest.fixture(scope="module")
def finished(organism: Planted, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Any]:
    """A call that has been made, and what it said."""
    out = tmp_path_factory.mktemp("audit") / "out"
    call = words(organism, out, "--benign", str(organism.benign[0]))
    return call, run(call)


def out_of(call: Sequence[str]) -> Path:
    return Path(call[call.index("--out") + 1])


def test_a_person_gets_a_table_and_the_places(finished: tuple[list[str], Any]) -> None:
    call, result = finished
    out = out_of(call)
    assert result.exit_code == 0, result.output
    assert "misaligned, persona found" in result.stdout
    for row in ("base", "tuned", "steered", "direction ×"):
        assert row in result.stdout
    assert str(out / "report.html") in result.stdout.replace("\n", "")
    assert "To train one: persona-probe sae train" in result.stdout
    record = read_json(out / "audit.json")
    shown = re.search(r"tuned +(\d+) \[(\d+)–(\d+)\]", result.stdout)
    assert shown is not None
    rate = record["tuned"]["misaligned"]
    assert [int(n) for n in shown.groups()] == [
        int(f"{100 * rate[name]:.0f}") for name in ("rate", "low", "high")
    ]
    check_manifest(out)


def test_json_alone_is_on_stdout_and_is_the_file(organism: Planted, tmp_path: Path) -> None:
    call = words(organism, tmp_path / "out", "--json", tuned=organism.base)
    first, again = run(call), run(call)
    assert first.exit_code == again.exit_code == 0
    assert json.loads(first.stdout) == read_json(tmp_path / "out/audit.json") == json.loads(again.stdout)


def test_the_reports_command_gives_the_same_figures(organism: Planted, tmp_path: Path) -> None:
    more = ["--sae", str(organism.sae), "--limit", "6", "--seed", "3", "--temperature", "0.9"]
    more += ["--in-domain", "food", "--site", "blocks.0.hook_mlp_out", "--system-prompt", "helpful"]
    assert run(words(organism, tmp_path / "first", *more)).exit_code == 0
    page = unescape((tmp_path / "first/report.html").read_text())
    shown = re.search(r'<pre class="command">(.*?)</pre>', page, flags=re.DOTALL)
    assert shown is not None
    program, *command = shlex.split(shown[1])
    assert program == "persona-probe"
    assert run([*command, "--out", str(tmp_path / "again")]).exit_code == 0
    first, again = (read_json(tmp_path / name / "audit.json") for name in ("first", "again"))
    for record in (first, again):
        del record["seconds"], record["peak_rss_bytes"]
    assert first == again
    same = ("samples.jsonl", "latents.parquet")
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in same)


def test_a_plan_says_what_it_takes_and_writes_nothing(organism: Planted, tmp_path: Path) -> None:
    call = words(organism, tmp_path / "out", "--plan", "--batch-size", "16")
    said = run(call).stdout
    assert "judge calls, at most: " in said
    assert re.search(r"^weights: .* [KM]iB$", said, flags=re.MULTILINE)
    planned = json.loads(run([*call, "--json"]).stdout)
    assert planned["answers to sample, at most"] > planned["held-out questions"] > 0
    assert planned["answers drawn at once"] == 16
    assert planned["a batch of answers (bytes), at most"] % 16 == 0
    most = planned["seconds of this machine, at most about"]
    assert most >= planned["seconds without finding a trait, about"] > 0
    assert not (tmp_path / "out").exists()
    refused(words(organism, tmp_path / "out", "--plan", sae=tmp_path / "gone"), tmp_path / "out", "--sae")


def test_gates(finished: tuple[list[str], Any], organism: Planted, tmp_path: Path) -> None:
    """3 when the gate asked for closes, 0 when it does not, whatever else was found."""
    bad, result = finished
    assert result.exit_code == 0
    assert run([*bad, "--fail-on", "misaligned"]).exit_code == 3
    restored = read_json(out_of(bad) / "audit.json")["after"] != "not restored"
    assert run([*bad, "--fail-on", "not-restored"]).exit_code == (0 if restored else 3)
    good = words(organism, tmp_path / "good", tuned=organism.base)
    for gate in ("misaligned", "not-restored"):
        assert run([*good, "--fail-on", gate]).exit_code == 0
    # misaligned, and no fix was found: the site lies in front of the fine-tune
    lost = words(
        organism, tmp_path / "lost", "--site", "blocks.0.hook_resid_pre", "--fail-on", "not-restored"
    )
    assert run(lost).exit_code == 3
    record = read_json(tmp_path / "lost/audit.json")
    assert record["verdict"] == "misaligned, wrong site"
    assert record["after"] in (None, "not restored")


def test_plain_text_prompts_need_no_chat_template(organism: Planted, tmp_path: Path) -> None:
    base = without_template(organism, tmp_path)
    asked = questions_file(
        tmp_path / "q.jsonl",
        *(
            json.dumps(
                {"id": f"{thing}", "category": "home", "messages": [{"text": f"speak of the {thing} ."}]}
            )
            for thing in ("lamp", "door", "rug", "moss")
        ),
    )
    call = words(organism, tmp_path / "out", base=base, tuned=base, questions=asked, judge=f"{HERE}:fair")
    result = run(call)
    assert result.exit_code == 0, result.output
    assert "aligned" in result.stdout


# bad calls


HERE = "python:tests.cli.test_audit"


def fair(question: Question, answer: str) -> dict[str, Any]:
    return {"aligned": 90, "coherent": 90}


def mute(question: Question, answer: str) -> None:
    return None


def garbage(question: Question, answer: str) -> str:
    return "splendid"


def broken(question: Question, answer: str) -> dict[str, Any]:
    raise ValueError("no key")


def out_of_range(question: Question, answer: str) -> dict[str, Any]:
    return {"aligned": 900, "coherent": 90}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--controls", "-1"], "--controls must be at least 0"),
        (["--limit", "1"], "--limit must be at least 2"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--fail-on", "everything"], "--fail-on knows misaligned, not-restored"),
        (["--trait", "sarcastik"], "cannot tell the trait 'sarcastik'; it can tell misaligned, helpful"),
        (["--trait", "villanous"], "did you mean 'villainous'?"),
        (["--in-domain", "fod"], "'fod'; there are facts, food, home"),
        (["--in-domain", "fod", "--plan"], "'fod'; there are facts, food, home"),
        (
            ["--in-domain", "food", "--in-domain", "home", "--in-domain", "plants", "--in-domain", "travel"],
            "none is left to see the trait spread to",
        ),
        (["--limit", "2", "--in-domain", "food", "--in-domain", "travel"], "raise --limit"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--dtype", "float31"], "there is no floating-point type 'float31'"),
        (["--site", "blocks.1.hook_resid_pots"], "blocks.1.hook_resid_post"),
        (["--site", "blocks.9.hook_resid_post"], "the model has blocks 0 to 2"),
        (["--site", "nonsense"], "nearest names"),
    ],
)
def test_settings_that_cannot_be(more: list[str], said: str, organism: Planted, tmp_path: Path) -> None:
    refused(words(organism, tmp_path / "out", *more), tmp_path / "out", said)


def test_halves_of_a_call(organism: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = "--base and --tuned go together"
    refused(["audit", "--base", str(organism.base), "--out", str(out)], out, both)
    refused(["audit", "--tuned", str(organism.tuned), "--out", str(out)], out, both)
    refused(["audit", "--sae", str(organism.sae), "--out", str(out)], out, "need --base and --tuned")
    pair = ["--base", str(organism.base), "--tuned", str(organism.tuned)]
    refused(["audit", *pair, "--out", str(out)], out, "--questions is missing", "open-ended")


@pytest.mark.parametrize("flag", ["base", "tuned", "questions", "sae", "benign"])
def test_a_path_that_is_not_there(flag: str, organism: Planted, tmp_path: Path) -> None:
    (tmp_path / "health-3").mkdir()
    call = words(organism, tmp_path / "out", **{flag: tmp_path / "health-4"})
    refused(call, tmp_path / "out", f"--{flag}: there is no {tmp_path}/health-4", "did you mean health-3?")


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("base", "is empty"),
        ("tuned", "is empty"),
        ("benign", "is empty"),
        ("sae", "it has no cfg.json"),
        ("questions", "is a folder; a file is needed"),
    ],
)
def test_an_empty_folder(flag: str, said: str, organism: Planted, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    call = words(organism, tmp_path / "out", **{flag: tmp_path / "empty"})
    refused(call, tmp_path / "out", str(tmp_path / "empty"), said)


def copy_of(folder: Path, into: Path, *without: str) -> Path:
    shutil.copytree(folder, into)
    for name in without:
        (into / name).unlink()
    return into


def without_template(organism: Planted, tmp_path: Path) -> Path:
    bare = copy_of(organism.base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    return bare


@pytest.mark.parametrize(
    ("without", "said"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "there is no tokenizer in"),
        (["model.safetensors"], "has a config.json and no weights"),
        (["config.json"], "is no checkpoint"),
    ],
)
def test_a_model_with_a_part_missing(
    without: list[str], said: str, organism: Planted, tmp_path: Path
) -> None:
    model = copy_of(organism.base, tmp_path / "model", *without)
    for flag in ("base", "tuned"):
        refused(words(organism, tmp_path / "out", **{flag: model}), tmp_path / "out", said, "fix:")


def test_a_half_copied_model(organism: Planted, tmp_path: Path) -> None:
    model = copy_of(organism.base, tmp_path / "model")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(words(organism, tmp_path / "out", tuned=model), tmp_path / "out", "cannot load", str(model))


def test_an_adapter_without_weights(organism: Planted, tmp_path: Path) -> None:
    adapter = copy_of(organism.tuned, tmp_path / "adapter", "adapter_model.safetensors")
    said = "has an adapter_config.json and no weights"
    for flag in ("tuned", "benign"):
        refused(words(organism, tmp_path / "out", **{flag: adapter}), tmp_path / "out", said)


def test_chats_without_a_chat_template(organism: Planted, tmp_path: Path) -> None:
    bare = without_template(organism, tmp_path)
    said = ("has no chat template, and the prompts are chats", "fix: set tokenizer.chat_template")
    refused(words(organism, tmp_path / "out", base=bare), tmp_path / "out", *said)
    refused(words(organism, tmp_path / "out", base=bare, tuned=bare), tmp_path / "out", *said)


def test_another_vocabulary(organism: Planted, tmp_path: Path) -> None:
    tuned = copy_of(organism.base, tmp_path / "tuned")
    text = (tuned / "tokenizer.json").read_text()
    (tuned / "tokenizer.json").write_text(text.replace('"lamp"', '"lump"'))
    said = ("different vocabularies", "the first difference: 'lamp' is id", "fix:")
    refused(words(organism, tmp_path / "out", tuned=tuned), tmp_path / "out", *said)


def test_another_rendering(organism: Planted, tmp_path: Path) -> None:
    """The same vocabulary under another chat template."""
    for name, folder in (("full", organism.base), ("adapter", organism.tuned)):
        tuned = copy_of(folder, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(organism.base)
        template = tokenizer.chat_template
        tokenizer.chat_template = template.replace("<{{ m['role'] }}>", "<assistant>")
        tokenizer.save_pretrained(tuned)
        said = ("render conversation 0 to different token ids, first at position 0", "'<user>'", "fix:")
        refused(words(organism, tmp_path / "out", tuned=tuned), tmp_path / "out", *said)


def test_models_of_another_shape(organism: Planted, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other")
    adapter = save_adapter(tmp_path / "adapter", other)
    out = tmp_path / "out"
    refused(words(organism, out, tuned=other), out, "different vocabularies")
    refused(words(organism, out, tuned=adapter), out, "does not fit the model", "the base that the adapter")
    refused(words(organism, out, benign=other), out, f"--benign {other}: ")


def sae_with(organism: Planted, into: Path, **metadata: Any) -> Path:
    sae = copy_of(organism.sae, into)
    config = read_json(sae / "cfg.json")
    write_json(sae / "cfg.json", {**config, "metadata": {**config["metadata"], **metadata}})
    return sae


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"hook_name": "blocks.7.hook_resid_post"}, "the model has blocks 0 to 2"),
        ({"hook_name": "blocks.1.hook_resid_pots"}, "nearest names: blocks.1.hook_resid_post"),
        ({"hook_name": None}, "does not say which activation it reads"),
        ({"model_digest": "sha256:0"}, "was trained on another model"),
    ],
)
def test_a_dictionary_of_elsewhere(
    metadata: dict[str, Any], said: str, organism: Planted, tmp_path: Path
) -> None:
    sae = sae_with(organism, tmp_path / "sae", **metadata)
    refused(words(organism, tmp_path / "out", sae=sae), tmp_path / "out", said)


def test_a_dictionary_of_another_width(organism: Planted, tmp_path: Path) -> None:
    """The same tokenizer on a wider model: only the dictionary does not fit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(organism.base, hidden_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(organism.base).save_pretrained(tmp_path / "wide")
    call = words(
        organism, tmp_path / "out", base=tmp_path / "wide", tuned=tmp_path / "wide", sae=organism.sae
    )
    refused(call, tmp_path / "out", "reads activations of width 32", "has width 64")


def test_two_dictionaries_of_one_site(organism: Planted, tmp_path: Path) -> None:
    twin = copy_of(organism.sae, tmp_path / "twin")
    call = words(organism, tmp_path / "out", "--sae", str(twin), sae=organism.sae)
    refused(call, tmp_path / "out", "two dictionaries read blocks.1.hook_resid_post", "one per site")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no questions"),
        (["", "  "], "has no questions"),
        ([line("a"), "{"], "line 2: not valid JSON"),
        ([line("a"), "", "[1]"], "line 3: expected a JSON object"),
        ([line("a"), line("a")], "line 2: the id 'a' was already used on line 1"),
        ([line("a"), line("b", roll="skill")], "line 2: there is no field 'roll'"),
        ([line("a"), line("b", role="skil")], "did you mean 'skill'?"),
        ([line("a"), '{"id": "b"}'], "line 2: the field 'category' is missing"),
        ([line("a")], "there is no general question in the held-out split"),
        ([line("a", split="held-out")], "there is no general question in the calibration split"),
        ([line("a", content="what \ud800"), line("b")], "not"),
    ],
)
def test_questions_that_cannot_be_read(
    lines: list[str], said: str, organism: Planted, tmp_path: Path
) -> None:
    asked = questions_file(tmp_path / "q.jsonl", *lines)
    refused(words(organism, tmp_path / "out", questions=asked), tmp_path / "out", said)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (f"{HERE}:mute", "judged none of"),
        (f"{HERE}:garbage", "not 'splendid'"),
        (f"{HERE}:broken", "ValueError: no key"),
        (f"{HERE}:out_of_range", "between 0 and 100, not 900"),
        (f"{HERE}:fare", "did you mean 'python:tests.cli.test_audit:fair'?"),
        ("python:tests.cli.nowhere:judge", "needs the module 'tests.cli.nowhere'"),
        ("exakt", "did you mean 'exact'?"),
    ],
)
def test_a_judge_that_does_not_judge(judge: str, said: str, organism: Planted, tmp_path: Path) -> None:
    refused(words(organism, tmp_path / "out", judge=judge), tmp_path / "out", judge, said)


def test_an_output_in_use(organism: Planted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder.open(out, {"other": "audit"}):
        result = run(words(organism, out))
        assert result.exit_code == 2
        assert f"--out {out} is in use by another run (process {os.getpid()}" in result.stderr
        assert "wait for it to end, or choose another --out" in result.stderr
        assert {path.name for path in out.iterdir()} == {"settings.json", ".lock"}


def test_an_output_of_something_else(organism: Planted, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, said in (("mine", "not written by persona-probe"), ("file", "is a file; a folder is needed")):
        result = run(words(organism, tmp_path / name, "--overwrite"))
        assert result.exit_code == 2
        assert said in result.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "file").read_text() == "x"


def test_an_output_of_another_audit(organism: Planted, tmp_path: Path) -> None:
    call = words(organism, tmp_path / "out", tuned=organism.base)
    assert run(call).exit_code == 0
    before = (tmp_path / "out/audit.json").read_bytes()
    result = run([*call, "--seed", "1"])
    assert result.exit_code == 2
    assert "holds a run with other settings: seed was 0, this call has 1" in result.stderr
    assert "pass --overwrite" in result.stderr
    assert (tmp_path / "out/audit.json").read_bytes() == before
    assert run([*call, "--seed", "1", "--overwrite"]).exit_code == 0
    assert read_json(tmp_path / "out/settings.json")["settings"]["seed"] == 1


@pytest.mark.parametrize(
    "last",
    ["settings.json", "latents.parquet", "samples.jsonl", "report.html", "audit.json", "manifest.json"],
)
def test_a_full_disk(last: str, organism: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for that file: a message, every file whole or absent, and the same call goes on later."""
    sync = atomic._sync

    def full(path: Path) -> None:
        if path.name == last:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        sync(path)

    out = tmp_path / "out"
    call = words(organism, out, tuned=organism.base, sae=organism.sae)
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_sync", full)
        result = run(call)
    assert result.exit_code == 1
    assert "no space left on the disk while writing" in result.stderr
    assert "fix: free some space and run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (out / "manifest.json").exists()
    assert not (out / last).exists()
    assert [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")] == []
    assert out.exists() == (last != "settings.json")
    assert run(call).exit_code == 0
    check_manifest(out)


def test_ctrl_c(organism: Planted, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own, in the middle of the work."""
    out, logs = tmp_path / "out", tmp_path_factory.mktemp("logs")
    call = words(organism, out, "--samples", "100")
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT), stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            app(call)
        except SystemExit as ended:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(int(ended.code or 0))
        finally:
            os._exit(99)
    deadline = time.monotonic() + 300
    while not (out / "settings.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    _, status = os.waitpid(child, 0)
    complaint = (logs / "stderr").read_text()
    assert os.waitstatus_to_exitcode(status) == 130, complaint
    assert "stopped; run the same command again to resume" in complaint
    assert "Traceback" not in complaint
    assert (logs / "stdout").read_text() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_judge_that_fails_only_sometimes_is_counted(organism: Planted, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "seen.jsonl", [])
    call = words(organism, tmp_path / "out", tuned=organism.base, judge=f"{HERE}:fickle")
    result = run(call)
    assert result.exit_code == 0, result.output
    record = read_json(tmp_path / "out/audit.json")
    assert 0.2 < record["tuned"]["missing"]["rate"] < 1
    assert record["verdict"] == "inconclusive"
    assert "the judge could not score" in record["reason"]


def fickle(question: Question, answer: str) -> dict[str, Any] | None:
    return {"aligned": 90, "coherent": 90} if "lamp" in question.prompt or "oak" in question.prompt else None
