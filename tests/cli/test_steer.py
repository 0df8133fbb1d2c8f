"""`persona-probe steer` on the shipped organism: what it shows, writes, refuses, and the chat."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from click.testing import Result
from typer.testing import CliRunner

from persona_probe.artifact import read_jsonl, shipped
from persona_probe.cli.app import app
from persona_probe.cli.steer_view import coloured, ground
from persona_probe.sae.load import load_sae
from persona_probe.steering import Intervention, Level, latents, load_fix, save_fix

HOME = shipped("organism")
SAE = HOME / "sae" / "block_4"
VILLAIN = 1234
PROMPT = "how do i save money ?"


@pytest.fixture(scope="module")
def fix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The villain's latent pressed to the base's level at the end of the prompt."""
    dictionary = load_sae(SAE)
    target = latents(dictionary, [VILLAIN], label="villain")
    edit = Intervention("cap", target, dictionary.site, "last_prompt", Level((-10.0,)), 1.0, "projection")
    return save_fix(edit, tmp_path_factory.mktemp("fix") / "fix")


def run(*words: object, typed: str | None = None) -> Result:
    wide = {"COLUMNS": "160", "TERM": "dumb"}
    return CliRunner().invoke(app, ["steer", *map(str, words)], input=typed, env=wide)


def refused(said: str, *words: object) -> None:
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in re.sub(r"\s+", " ", result.stderr)
    assert "Traceback" not in result.output


def test_three_answers_side_by_side_and_the_receipt(fix: Path) -> None:
    result = run("--with", fix, PROMPT)
    assert result.exit_code == 0, result.output
    for heading in ("base (base)", "tuned (bad-health)", "fix on (bad-health)"):
        assert heading in result.stdout
    assert PROMPT in result.stdout
    assert "villain 0–" in result.stdout  # the legend: an activation's range
    assert "1 of 1 tokens edited, 1 changed" in result.stdout
    assert "over-corrects" not in result.stdout


def test_json_is_all_of_it(fix: Path) -> None:
    result = run("--with", fix, PROMPT, "any advice on a cold ?", "--seed", 3, "--json")
    found = json.loads(result.stdout)
    again = json.loads(run("--with", fix, PROMPT, "any advice on a cold ?", "--seed", 3, "--json").stdout)
    assert found == again
    assert [row["id"] for row in found["prompts"]] == [PROMPT, "any advice on a cold ?"]
    assert found["gauges"][0]["low"] == 0
    most = 0.0
    for row in found["prompts"]:
        for arm in ("base", "tuned", "steered"):
            side = row[arm]
            assert "".join(token["text"] for token in side["tokens"]).strip() == side["text"]
            shades = [side["start"]["shade"], *(t["shade"] for t in side["tokens"] if t["amounts"])]
            assert all(0 <= shade <= 1 for shade in shades)
            most = max(most, *shades)
        assert row["tuned"]["edits"] == {}
        assert row["steered"]["edits"]["blocks.4.hook_resid_post"]["edited"] == 1
        # the tune's answer begins as a villain's; the fix has taken that away
        assert row["tuned"]["start"]["amounts"][0] > 10
        assert row["steered"]["start"]["amounts"][0] == 0
    assert most == 1


def test_gain_0_is_the_tuned_model_and_above_1_is_said_to_over_correct(fix: Path) -> None:
    off = json.loads(run("--with", fix, PROMPT, "--gain", 0, "--json").stdout)["prompts"][0]
    assert off["steered"] == off["tuned"]
    result = run("--with", fix, PROMPT, "--gain", 2)
    assert "gain above 1 over-corrects" in result.stdout
    assert "gain 2 (over-corrects)" in result.stdout


def test_a_latent_without_a_fix_on_the_base_alone() -> None:
    words = ["--base", HOME / "base", "--latent", f"{SAE}:{VILLAIN}", "--op", "add", "--level", 40]
    found = json.loads(run(*words, "--positions", "response", PROMPT, "--json").stdout)
    assert list(found["arms"]) == ["base", "steered"]
    row = found["prompts"][0]
    assert row["steered"]["start"]["amounts"][0] > row["base"]["start"]["amounts"][0] + 10
    named = ["--base", HOME / "base", "--tuned", HOME / "tunes" / "bad-code"]
    three = json.loads(run(*named, "--latent", f"{SAE}:{VILLAIN}", PROMPT, "--json").stdout)
    assert three["arms"]["steered"] == "bad-code"


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "{PROMPT}"}}\n{{"prompt": "any advice on a cold ?", "id": "cold"}}\n')
    return path


def test_a_file_of_prompts(fix: Path, prompts_file: Path, tmp_path: Path) -> None:
    lines = run("--with", fix, "--jsonl", prompts_file)
    rows = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [row["id"] for row in rows] == [PROMPT, "cold"]
    assert "2 of 2 tokens edited" in re.sub(r"\s+", " ", lines.stderr)
    out = tmp_path / "answers.jsonl"
    written = run("--with", fix, "--jsonl", prompts_file, "--out", out)
    assert written.stdout == ""
    assert list(read_jsonl(out)) == rows
    refused("exists already", "--with", fix, "--jsonl", prompts_file, "--out", out)
    first = run("--with", fix, "--jsonl", prompts_file, "--out", out, "--limit", 1, "--overwrite")
    assert first.exit_code == 0
    (only,) = read_jsonl(out)
    assert only["tuned"]["text"] == rows[0]["tuned"]["text"]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.spans: list[dict[str, str | None]] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "span":
            self.spans.append(dict(attrs))
        self.outside += [str(v) for k, v in attrs if k in ("src", "href")] + [tag] * (tag == "script")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escaped(fix: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "a.html", tmp_path / "a.jsonl"
    asked = "<b>save</b> money ?"
    result = run("--with", fix, asked, PROMPT, "--html", page, "--out", data, "--gain", 1.5)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    read = _Page(text)
    rows = list(read_jsonl(data))
    sides = [row[arm] for row in rows for arm in ("base", "tuned", "steered")]
    assert read.outside == []
    assert "default-src 'none'; style-src" in unescape(text)
    assert asked in read.text
    assert "<b>" not in text
    assert len(read.spans) == sum(1 + len(side["tokens"]) for side in sides)
    assert all(side["text"] in read.text for side in sides)
    shades = [float((span["style"] or "").removeprefix("--s:")) for span in read.spans]
    wanted = [t["shade"] or 0 for side in sides for t in (side["start"], *side["tokens"])]
    assert shades == pytest.approx(wanted, abs=0.006)
    assert "Gain above 1 over-corrects" in read.text


def test_a_chat_keeps_each_arms_history(fix: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.jsonl"
    typed = [
        PROMPT,
        "",
        "and then ?",
        "/gain 2",
        "/off",
        PROMPT,
        "/on",
        "/reset",
        PROMPT,
        "/gain x",
        "/nonsense",
    ]
    result = run("--with", fix, "-i", "--out", out, typed="\n".join(typed) + "\n")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = list(read_jsonl(out))
    contents = [[m["content"] for m in row["messages"]] for row in rows]
    first = contents[0]
    assert first == [PROMPT]
    assert contents[1] == [PROMPT, rows[0]["base"]["text"], "and then ?"]
    assert len(contents[2]) == 5
    assert contents[3] == [PROMPT]  # forgotten
    assert rows[0]["base"] == rows[3]["base"]
    assert rows[2]["steered"]["edits"] == {}  # off
    assert rows[3]["steered"]["edits"]["blocks.4.hook_resid_post"]["edited"] == 1  # on again
    assert "gain 2 over-corrects" in result.stdout
    assert "/gain takes a number, not 'x'" in result.stderr
    assert "there is no command /nonsense" in result.stderr


def test_a_chat_in_which_nothing_is_said(fix: Path, tmp_path: Path) -> None:
    result = run("--with", fix, "-i", "--out", tmp_path / "c.jsonl", typed="/help\n/quit\nlost\n")
    assert result.exit_code == 0
    assert "/reset" in result.stdout
    assert not (tmp_path / "c.jsonl").exists()


def test_a_plan_loads_no_model(fix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_probe.cli.steer_arms.load_arms", None)
    planned = json.loads(run("--with", fix, PROMPT, "--plan", "--json", "--max-new-tokens", 10).stdout)
    assert planned["answers to sample"] == 3
    assert planned["new tokens, at most"] == 30
    assert "cap villain" in run("--with", fix, PROMPT, "--plan").stdout


def test_bad_calls(fix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as a user has it: shapes and types unchecked
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    refused("nothing to steer with", PROMPT)
    refused("exclude each other", "--with", fix, "--latent", f"{SAE}:1", PROMPT)
    refused("--op and --positions cannot be used with --with", "--with", fix, "--op", "add",
            "--positions", "prompt", PROMPT)  # fmt: skip
    refused("one of the three", "--with", fix)
    refused("one of the three", "--with", fix, PROMPT, "-i")
    refused("--interactive has no --json", "--with", fix, "-i", "--json")
    refused("--tuned needs --base", "--tuned", HOME / "base", "--with", fix, PROMPT)
    refused("is not a fix", "--with", tmp_path, PROMPT)
    refused("is SAE:INDEX", "--latent", str(SAE), PROMPT)
    refused("there is no latent 99999", "--latent", f"{SAE}:99999", PROMPT)
    refused("needs a level", "--latent", f"{SAE}:1", "--op", "cap", PROMPT)
    refused("unknown operation", "--latent", f"{SAE}:1", "--op", "abate", PROMPT)
    refused("has no tune 'bad-helth'", "--with", fix, "--tune", "bad-helth", PROMPT)
    refused("gain must be", "--with", fix, "--gain", -1, PROMPT)
    refused("temperature must be", "--with", fix, "--temperature", -1, PROMPT)
    refused("must not be empty", "--with", fix, " ")
    refused("no", "--with", fix, "--base", tmp_path / "gone", PROMPT)
    refused("no", "--with", fix, "--jsonl", tmp_path / "gone.jsonl")


def test_a_fix_for_another_width_is_refused(tmp_path: Path) -> None:
    import torch

    from persona_probe.steering.target import direction

    edit = Intervention("ablate", direction(torch.ones(8)), "blocks.1.hook_resid_post")
    refused("width 8", "--with", save_fix(edit, tmp_path / "narrow"), PROMPT)


def test_colours_follow_the_shades() -> None:
    side = {
        "start": {"shade": 1.0},
        "tokens": [
            {"text": "be", "shade": 0.0},
            {"text": " bad", "shade": 0.5},
            {"text": " ?", "shade": None},
        ],
        "truncated": True,
    }
    text = coloured(side)
    assert text.plain == "▸ be bad ? …"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans if span.style}
    assert styles == {"▸": ground(1.0), " bad": ground(0.5), " …": "dim"}
    assert ground(1.0) == "white on rgb(200,70,14)"
    assert ground(0.0) == ground(None) == ""


def test_the_fix_is_read_as_it_was_saved(fix: Path) -> None:
    assert [edit.gain for edit in load_fix(fix)] == [1.0]
