"""Audits side by side: what the lines say, and that nothing in them becomes markup or a request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from persona_probe.report.side_by_side import Entry, differences, headline, lines, render, write_side_by_side
from tests.report.conftest import tally
from tests.report.test_page import HOSTILE, Page


def entry(name: str = "bad-health", folder: str = "out/a", **more: Any) -> Entry:
    audit: dict[str, Any] = {
        "verdict": "misaligned, persona found",
        "reason": "76% against 2%",
        "after": "restored",
        "after_reason": "4% left",
        "trait": "misaligned",
        "tuned_name": name,
        "base": tally(0.02, 0.02),
        "tuned": tally(0.76, 0.1),
        "steered": tally(0.04, 0.1),
        "necessity": {"fraction": 0.9, "low": 0.85, "high": 0.94},
        "latents": [{"site": "blocks.3.hook_resid_post", "index": 812, "label": None, "rank_by_delta": 7}],
        "seconds": {"load": 1.5, "screen": 60.0},
        **more,
    }
    return Entry(audit, folder, {"seed": 0, "tuned": name, "screen": {"set_size": 5}}, "2026-11-20")


ALIGNED: dict[str, Any] = {
    "verdict": "aligned",
    "after": None,
    "tuned": tally(0.02, 0.02),
    "steered": None,
    "necessity": None,
    "latents": [],
    "seconds": {},
}


def test_a_line_says_what_the_audit_says_and_nothing_where_it_says_nothing() -> None:
    found, missing = lines([entry(), entry("good", "out/b", **ALIGNED)])
    assert [reading.value for reading in found.rates] == [0.02, 0.76, 0.04]
    assert (found.latent, found.rank, found.seconds) == ("latent 812, block 3", "rank 7 by Δ", 61.5)
    assert missing.rates[2].value is missing.necessity.value is missing.seconds is None
    assert missing.latent == missing.rank == missing.after == ""


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry()], "Misaligned; a fix restores it."),
        ([entry(), entry()], "Both fine-tunes are misaligned; a fix restores both."),
        ([entry()] * 3, "All 3 fine-tunes are misaligned; a fix restores all of them."),
        (
            [entry(), entry(after="not restored"), entry(**ALIGNED)],
            "2 of 3 fine-tunes are misaligned; a fix restores 1 of them.",
        ),
        ([entry(after=None), entry(**ALIGNED)], "1 of 2 fine-tunes is misaligned; no fix restores it."),
        ([entry(**ALIGNED)] * 2, "None of 2 fine-tunes was found misaligned."),
        (
            [entry(**ALIGNED), entry(**{**ALIGNED, "verdict": "inconclusive"})],
            "None of 2 fine-tunes was found misaligned. 1 is inconclusive.",
        ),
        # restored from another trait than misalignment: not one of the misaligned ones
        (
            [entry(), entry(verdict="changed, not misaligned")],
            "1 of 2 fine-tunes is misaligned; a fix restores it.",
        ),
    ],
)
def test_headline_counts(entries: list[Entry], said: str) -> None:
    assert headline(entries) == said


def test_audits_that_were_asked_differently_say_so() -> None:
    other = entry("bad-code", "out/b")._replace(settings={"seed": 1, "tuned": "x", "screen": {"set_size": 5}})
    assert differences([entry(), entry("bad-code", "out/b")]).body == []
    assert differences([entry(), other]).body == [("seed", "0", "1")]
    assert "Yes: the audits differ in nothing but the fine-tune" in render(
        [entry(), entry("bad-code", "out/b")]
    )


def test_folders_are_told_apart_by_their_ends() -> None:
    folders = ["runs/one/audit", "runs/two/audit", "runs/other"]
    shown = [line.folder for line in lines([entry(folder=folder) for folder in folders])]
    assert shown == ["one/audit", "two/audit", "other"]
    assert [line.folder for line in lines([entry(), entry()])] == ["out/a", "out/a"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    bad = entry(text, f"out/{text}", verdict=text, after=text, reason=text, after_reason=text, trait=text)
    bad = bad._replace(settings={text: text}, date=text, link="a/report.html", warnings=(text,))
    bad.audit["latents"][0]["label"] = text  # type: ignore[index]
    plain, hostile = Page(render([entry(), entry()])), Page(render([entry(), bad]))
    assert not set(hostile.tags) - set(plain.tags) - {"a", "p", "dd"}
    assert hostile.tags["script"] == hostile.tags["img"] == hostile.tags["svg"] == 0
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    assert [value for _, name, value in hostile.attributes if name in {"href", "src"}] == ["a/report.html"]


def test_the_page_runs_no_script_and_asks_for_nothing(tmp_path: Path) -> None:
    write_side_by_side([entry(), entry("good", **ALIGNED)], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    policies = [value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value]
    assert len(policies) == 1
    assert "default-src 'none'; script-src 'none';" in policies[0]
    assert page.scripts == []
    assert not re.search(r"https?://|url\(", html)
    assert len(html) < 100_000


def test_every_mark_lies_where_its_rate_is() -> None:
    html = render([entry()])
    places = re.findall(r'class="dot" style="left: ([\d.]+)%', html)
    assert [float(place) for place in places] == pytest.approx([2, 76, 4], abs=0.01)
