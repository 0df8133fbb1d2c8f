"""The page in a real browser: figures drawn, nothing requested, nothing hostile run, any width."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persona_probe.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NEEDED = os.environ.get("PERSONA_PROBE_NEEDS_BROWSER") == "1"
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not NEEDED, reason="no chromium; apt-get install chromium"
)

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror=window.broken=2>\"'\u2028"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, headless=True, args=QUIET
        )
        yield context
        context.close()


@pytest.fixture
def show(chromium: Any) -> Iterator[Any]:
    """Open a file; complaints and requests that leave the file end up in ``tab.said``."""
    tabs: list[Any] = []

    def opened(path: Path, width: int = 1440) -> Any:
        tab = chromium.new_page()
        tabs.append(tab)
        tab.set_default_timeout(120_000)  # a busy machine reads 4.8 MB of plotly.js slowly
        tab.said = []
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.on("request", lambda asked: tab.said.append(asked.url))
        tab.set_viewport_size({"width": width, "height": 900})
        tab.goto(path.as_uri())
        assert tab.said.pop(0) == path.as_uri()
        return tab

    yield opened
    for tab in tabs:
        tab.close()


@pytest.fixture
def path(tmp_path: Path, audit: Any, latents: Any, examples: Any, dose: Any) -> Path:
    return write_report(audit, latents, examples, dose, tmp_path / "report.html")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The same page with plotly.js left out, for what does not look at the figures: it loads at once."""
    stub = "window.Plotly = { newPlot() {}, relayout() {} };"
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: stub)
    return request.getfixturevalue("path")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_draws_every_figure_asks_for_nothing_and_prints(show: Any, path: Path, width: int) -> None:
    tab = show(path, width)
    drawn = tab.locator(".drawing").evaluate_all(
        "all => all.map(one => [one.querySelectorAll('.main-svg').length > 0,"
        " one.getBoundingClientRect().right <= innerWidth])"
    )
    assert drawn == [[True, True]] * 8
    assert tab.evaluate("document.documentElement.scrollWidth") == width, "no sideways scrolling"
    printed = tab.pdf()
    assert printed.startswith(b"%PDF") and 1 <= printed.count(b"/Type /Page\n") <= 12
    assert tab.said == []


def test_the_verdict_is_seen_without_scrolling_on_a_phone(show: Any, light: Path) -> None:
    tab = show(light, 390)
    for place in ("h1", ".gauge.tuned .rate", ".gauge.steered .rate"):
        box = tab.locator(place).bounding_box()
        assert box["y"] + box["height"] < 700, place


def test_hovering_tells_the_numbers(show: Any, path: Path) -> None:
    tab = show(path)
    mark = tab.locator("#rates .drawing .scatterlayer .point").nth(1)
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    told = tab.locator("#rates .hoverlayer .hovertext")
    told.first.wait_for(state="attached")
    assert "%" in told.first.text_content()


def test_what_a_latent_fires_on_stays_folded_until_asked_for(show: Any, light: Path) -> None:
    tab = show(light)
    card = tab.locator(".card").first
    text = card.locator("details p").first
    assert not text.is_visible()
    card.locator("summary").first.click()
    assert text.is_visible() and "word6" in text.text_content()


def test_answers_open_one_by_one_and_all_at_once(show: Any, light: Path) -> None:
    tab = show(light)
    answers = tab.locator("details.answer blockquote")
    assert not answers.first.is_visible()
    tab.locator("details.answer summary").first.click()
    assert answers.first.is_visible() and not answers.last.is_visible()
    tab.locator("#open-all").click()
    assert answers.last.is_visible()
    tab.locator("#open-all").click()
    assert not answers.first.is_visible()


def test_hostile_strings_are_shown_and_not_run(
    show: Any, tmp_path: Path, audit: Any, latents: Any, examples: Any, dose: Any
) -> None:
    for fix in audit["fixes"]:
        fix["name"] = HOSTILE
    latents[0]["label"] = audit["title"] = audit["trait"] = audit["reason"] = HOSTILE
    audit["baselines"][HOSTILE] = audit["base"]
    audit["provenance"]["digests"] = {HOSTILE: HOSTILE}  # a file's name
    card = audit["cards"][0]
    card["terms"] = [HOSTILE]
    card["top"][0] |= {"place": HOSTILE, "tokens": [[HOSTILE, 9.0, False], [HOSTILE, None, True]]}
    examples = [dict.fromkeys(example, HOSTILE) for example in examples]
    dose = [row | {"strength_unit": HOSTILE, "arm": HOSTILE} for row in dose]
    tab = show(write_report(audit, latents, examples, dose, tmp_path / "hostile.html"))
    tab.locator(".drawing .main-svg").first.wait_for()
    assert tab.evaluate("window.broken") is None
    assert tab.locator("img").count() == 0 and tab.locator(".drawing a").count() == 0
    assert "onerror=window.broken" in tab.locator("#claims .drawing").first.text_content()
    assert "onerror=window.broken" in tab.locator(".card").first.text_content()
    assert "onerror=window.broken" in tab.locator("details.answer .question").first.text_content()
    assert tab.said == []


def test_a_script_that_slipped_in_would_not_run(show: Any, light: Path) -> None:
    html = light.read_text(encoding="utf-8")
    slipped = "<script>window.broken = 1</script></main>"
    light.write_text(html.replace("</main>", slipped), encoding="utf-8")
    tab = show(light)
    assert tab.evaluate("window.broken") is None
    assert any("Content Security Policy" in said for said in tab.said)
    refused = "fetch('https://example.invalid/').then(() => 'sent', () => 'refused')"
    assert tab.evaluate(refused) == "refused"
