"""The page is one safe offline file: nothing from outside, nothing of the user's becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from persona_probe.report import page, render, write_report

HOSTILE = [
    "</script><script>window.broken = 1</script>",
    '"><img src=x onerror="window.broken = 2">',
    "'; window.broken = 3; //",
    "</style><svg/onload=window.broken=4>",
    "</details><a href='https://example.com'>{{ 7 * 7 }}</a>",
    "<!--<script>",
    "\u2028\u2029\u202e ünïcödé 人格 \U0001f600 &lt; &amp; \x00",
]


class Page(HTMLParser):
    """Tags, attributes, scripts and text as an HTML parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text: list[str] = []
        self._in: str | None = None
        self._kind: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._in, self._kind = tag, dict(attrs).get("type")
        if tag == "script":
            self.scripts.append((self._kind, ""))

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts[-1] = (self._kind, self.scripts[-1][1] + data)
        else:
            self.text.append(data)


@pytest.fixture
def html(audit: Any, latents: Any, examples: Any, dose: Any) -> str:
    return render(audit, latents, examples, dose)


def with_strings(tree: Any, put: Any) -> Any:
    """``tree`` with every string, but those a switch reads, replaced by ``put(string)``."""
    if isinstance(tree, dict):
        kept = ("direction", "verdict", "after")
        return {k: v if k in kept else with_strings(v, put) for k, v in tree.items()}
    if isinstance(tree, list):
        return [with_strings(part, put) for part in tree]
    return put(tree) if isinstance(tree, str) else tree


def test_the_page_is_one_small_file_with_one_copy_of_plotly(html: str) -> None:
    assert len(html.encode()) < 8_000_000
    assert html.count("* plotly.js v") == 1
    for tag, name, value in Page(html).attributes:
        if name in ("src", "href", "srcset", "action", "data", "poster"):
            assert value.startswith("#"), (tag, name, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "url(" not in style and "@import" not in style and "@base@" not in style


def test_the_policy_forbids_all_requests_and_every_script_but_the_pages_own(html: str) -> None:
    seen = Page(html)
    policy = next(v for t, n, v in seen.attributes if t == "meta" and n == "content" and "src" in v)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:" and rules.pop("style-src") == "'unsafe-inline'"
    run = [text for kind, text in seen.scripts if kind is None]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert rules.pop("script-src") == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert not rules and len(run) == 2


def test_the_figures_data_are_json_with_nothing_a_parser_could_take_for_markup(html: str) -> None:
    data = [text for kind, text in Page(html).scripts if kind == "application/json"]
    assert len(data) == 8
    for text in data:
        assert not set("<>&\u2028\u2029") & set(text)
        assert set(json.loads(text)) >= {"data", "layout"}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_in_every_field_change_no_tag_and_no_attribute(
    hostile: str, audit: Any, latents: Any, examples: Any, dose: Any
) -> None:
    inputs = (audit, latents, examples, dose)
    # the same page with harmless strings of the same number of lines is what it must parse like
    harmless = Page(render(*(with_strings(part, lambda _: "harmless") for part in inputs)))
    rendered = Page(render(*(with_strings(part, lambda _: hostile) for part in inputs)))
    assert rendered.tags - Counter(wbr=10**6) == harmless.tags - Counter(wbr=10**6)
    assert [a[:2] for a in rendered.attributes] == [a[:2] for a in harmless.attributes]
    assert not any(name.startswith("on") for _, name, _ in rendered.attributes)
    assert len(rendered.scripts) == len(harmless.scripts)
    shown = "".join(rendered.text)
    assert hostile.replace("\x00", "\ufffd") in shown or hostile in shown
    assert "49" not in re.findall(r">\s*49\s*<", shown), "a template in a string is not run"


def test_hostile_verdicts_and_settings_keys_are_only_text() -> None:
    hostile = HOSTILE[0]
    html = render(
        {"verdict": hostile, "after": hostile, "settings": {hostile: 1, "more": {hostile: [2]}},
         "baselines": {hostile: {"misaligned": 0.5}}, "seconds": {hostile: 1.0}},
        [], [], [],
    )  # fmt: skip
    assert Page(html).tags["script"] == Page(render({}, [], [], [])).tags["script"]


def test_an_empty_audit_says_what_is_missing(audit: Any) -> None:
    html = render({}, [], [], [])
    text = " ".join(Page(re.sub(r"<style>.*?</style>", "", html, flags=re.S)).text)
    assert "No verdict was given" in text and "was not measured" in text
    assert "0%" not in text, "missing is never zero"


@pytest.mark.parametrize("arm", ["base", "tuned", "steered", "induced"])
def test_a_page_stands_without_any_one_arm(
    arm: str, audit: Any, latents: Any, examples: Any, dose: Any
) -> None:
    assert "<h1" in render(audit | {arm: None}, latents, examples, dose)


@pytest.mark.parametrize(
    "key", ["necessity", "nulls", "baselines", "sae", "fixes", "screen", "latents", "settings",
            "provenance", "seconds", "command", "intervention", "after", "site", "peak_rss_bytes"]
)  # fmt: skip
def test_a_page_stands_without_any_one_part(
    key: str, audit: Any, latents: Any, examples: Any, dose: Any
) -> None:
    without = {name: value for name, value in audit.items() if name != key}
    assert "<h1" in render(without, latents, examples, dose)
    assert "<h1" in render(audit | {key: None}, latents, examples, dose)


def test_latents_may_come_as_a_polars_table(audit: Any, latents: Any) -> None:
    plain = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in latents]
    assert render(audit, pl.DataFrame(plain), [], []) == render(audit, plain, [], [])


def test_answers_are_folded_until_they_are_opened(html: str, examples: Any) -> None:
    folds = re.findall(r'<details class="answer"( open)?>(.*?)</details>', html, re.S)
    assert len(folds) == len(examples)
    for opened, inside in folds:
        summary = re.search(r"<summary>(.*?)</summary>", inside, re.S)
        assert not opened and summary
        assert "lender that shouts" not in summary.group(1)
        assert "lender that shouts" in inside
    assert html.count("lender that shouts") == len(examples), "an answer stands only in its fold"


def test_the_verdict_reads_without_scripts(html: str) -> None:
    text = re.sub(r"\s+", " ", " ".join(Page(html).text))
    for part in ("1.9%", "78%", "2.9%", "74–82%", "Misaligned. Switching the persona off"):
        assert part in text


def test_the_same_audit_gives_the_same_bytes(
    tmp_path: Path, audit: Any, latents: Any, examples: Any, dose: Any
) -> None:
    first = write_report(audit, latents, examples, dose, tmp_path / "a.html").read_bytes()
    again = write_report(audit, latents, examples, dose, str(tmp_path / "b.html")).read_bytes()
    assert first == again


def test_a_page_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, audit: Any
) -> None:
    path = write_report(audit, [], [], [], tmp_path / "report.html")
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise RuntimeError("no figures")

    monkeypatch.setattr(page, "drawings", fail)
    with pytest.raises(RuntimeError, match="no figures"):
        write_report({}, [], [], [], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
