"""Run the notebooks top to bottom: `make notebooks`, or `python notebooks/run.py [NAME ...]`.

The `.py` files are the source. Each is run in a fresh kernel and an empty folder; an error, a warning
(anything on stderr), more than `CELLS` cells, or more than `SECONDS` fails. With `--write` its `.ipynb` is
written beside it, with outputs: figures as pictures, because GitHub shows no scripts (Chromium draws them).
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from time import perf_counter
from typing import Any

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from rich.console import Console

HERE = Path(__file__).parent
CELLS = 25
SECONDS = 360.0
"""All six are done within this on two quiet cores, so no single one may take longer anywhere."""
LONGEST = ("01", "06", "05", "03")
"""Begun first, so that no core waits for the other at the end."""
PLOTLY = "application/vnd.plotly.v1+json"
ENVIRONMENT = {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "OMP_NUM_THREADS": "1",
    # tqdm misses ipywidgets, which come with Jupyter and not with the bare kernel
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
out = Console(soft_wrap=True)


class BadNotebookError(Exception):
    """Why a notebook does not pass."""


def read(path: Path) -> Any:
    """The notebook of a percent-format script. Raises `BadNotebookError` for too many cells."""
    notebook = jupytext.read(path)
    if len(notebook.cells) > CELLS:
        raise BadNotebookError(f"{len(notebook.cells)} cells; at most {CELLS}")
    return notebook


def execute(notebook: Any, folder: Path, seconds: float = SECONDS) -> float:
    """Run `notebook` in place, with `folder` as its working folder; seconds taken.

    Raises `BadNotebookError` for an error, a warning, or when the time is up.
    """
    start = perf_counter()
    client = NotebookClient(
        notebook,
        timeout=int(seconds),
        startup_timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--Application.log_level=40"],  # it warns that its socket is not encrypted
    )
    try:
        client.execute(env={**os.environ, **ENVIRONMENT})
    except CellTimeoutError as error:
        raise BadNotebookError(f"not done within {seconds:.0f} s") from error
    except CellExecutionError as error:
        raise BadNotebookError(re.sub(r"\x1b\[[\d;]*m", "", str(error))) from error
    taken = perf_counter() - start
    if taken > seconds:
        raise BadNotebookError(f"took {taken:.0f} s; at most {seconds:.0f}")
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise BadNotebookError(f"cell {number} warns: {output['text'].strip()}")
    return taken


def write(notebook: Any, path: Path, folder: Path) -> None:
    """Write `path` with outputs: figures as pictures, and without what differs from machine to machine."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    with _browser() as tab:
        for number, data in enumerate(output.get("data", {}) for output in outputs):
            if PLOTLY in data:
                picture = _picture(tab, data[PLOTLY], folder / f"{number}.html")
                data.clear()
                data["image/png"] = base64.b64encode(picture).decode()
            elif "text/html" in data:
                data.pop("text/plain", None)
                html = data["text/html"]
                for place in (folder.resolve(), HERE.parent):
                    html = html.replace(f"{place}/", "")
                data["text/html"] = html
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("language_info", None)
    jupytext.write(notebook, path, fmt="ipynb")


@contextmanager
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise BadNotebookError("no Chromium to draw the figures; apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 860, "height": 700})
        tab.set_default_timeout(600_000)  # a busy machine reads 4.8 MB of plotly.js slowly
        yield tab
        browser.close()


def _picture(tab: Any, figure: dict[str, Any], page: Path) -> bytes:
    import plotly.graph_objects as go

    drawn = go.Figure(figure["data"], figure["layout"])
    drawn.update_layout(width=820, paper_bgcolor="white", plot_bgcolor="white")
    drawn.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
    tab.goto(page.as_uri())
    tab.wait_for_selector(".main-svg")
    return tab.locator(".plotly-graph-div").screenshot()


def run(path: Path, seconds: float, *, keep: bool) -> str | None:
    """Run one notebook and say how it went; what is wrong with it, if anything."""
    try:
        notebook = read(path)
        with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
            taken = execute(notebook, Path(folder), seconds)
            if keep:
                write(notebook, path.with_suffix(".ipynb"), Path(folder))
    except BadNotebookError as error:
        out.print(f"{path.name}: {error}", highlight=False, markup=False)
        return str(error)
    out.print(f"{path.name}: {len(notebook.cells)} cells, {taken:.0f} s", highlight=False)
    return None


def notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The sources, the longest first; those whose name begins with one of `names`."""
    order = {number: place for place, number in enumerate(LONGEST)}
    every = sorted(HERE.glob("[0-9]*.py"), key=lambda path: (order.get(path.name[:2], len(order)), path.name))
    return [path for path in every if not names or path.name.startswith(tuple(names))]


def main() -> int:
    """0 when every notebook passes."""
    parser = argparse.ArgumentParser(description="Run the notebooks top to bottom.")
    parser.add_argument("names", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--write", action="store_true", help="write the .ipynb, with outputs")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at the same time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most for one notebook")
    given = parser.parse_args()
    chosen = notebooks(given.names)
    if not chosen:
        out.print(f"no notebook begins with {', '.join(given.names)}")
        return 2
    start = perf_counter()
    with ThreadPoolExecutor(given.jobs) as pool:
        found = pool.map(lambda path: run(path, given.seconds, keep=given.write), chosen)
        wrong = [one for one in found if one]
    used = getrusage(RUSAGE_CHILDREN)
    spent = f"{perf_counter() - start:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU"
    out.print(f"{len(chosen) - len(wrong)} of {len(chosen)} pass, {spent}", highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
