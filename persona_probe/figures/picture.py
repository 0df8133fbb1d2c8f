"""Figures as pictures, for pages that run no script: drawn by plotly.js in a browser that is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.errors import MissingExtraError

if TYPE_CHECKING:
    import plotly.graph_objects as go

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 820


def save_pictures(figures: Mapping[Path, go.Figure], width: int = WIDTH) -> None:
    """Write each figure to its path as a PNG, so many pixels wide, on white.

    Raises `MissingExtraError` without playwright (of the extra `dev`) or a Chromium on the path.
    """
    if not figures:
        return
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise MissingExtraError.of("playwright", "dev") from error
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise MissingExtraError(
            f"pictures of figures are taken by a browser: none of {', '.join(BROWSERS)} is on the path",
            fix="install one (apt-get install chromium), or do without pictures",
        )
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser: Any = driver.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width + 40, "height": 700}, device_scale_factor=2)
        tab.set_default_timeout(120_000)
        for number, (path, figure) in enumerate(figures.items()):
            page = Path(folder) / f"{number}.html"
            drawn = type(figure)(figure)
            drawn.update_layout(width=width, paper_bgcolor="white", plot_bgcolor="white")
            drawn.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
            tab.goto(page.as_uri())
            tab.wait_for_selector(".main-svg")
            tab.locator(".plotly-graph-div").screenshot(path=str(path))
        browser.close()
