"""Notebooks as files: short, a question first, a next step last, and what runs them.

They are run whole by `make notebooks` (notebooks/run.py), not here: that takes minutes.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import jupytext
import pytest
from nbformat.v4 import new_code_cell, new_notebook

HOME = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(HOME.glob("[0-9]*.py"))
MOST_BYTES = 300_000


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_run", HOME / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_it_opens_with_its_question_and_ends_with_what_to_try_next(path: Path, runner: ModuleType) -> None:
    cells = runner.read(path).cells
    assert 8 <= len(cells) <= runner.CELLS
    first, last = cells[0], cells[-1]
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith("# ") and re.search(
        r"^\*\*.*\?\*\*", first.source, re.MULTILINE | re.DOTALL
    )
    assert last.source.startswith("## Next") and last.source.count("\n- ") >= 2


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_what_it_imports_of_ours_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("persona_probe"):
            module: Any = importlib.import_module(node.module or "")
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                there = hasattr(module, alias.name) or importlib.util.find_spec(inside)
                assert there, f"there is no {inside}"


@pytest.mark.parametrize("path", SOURCES, ids=names)
def test_what_is_shown_was_made_from_the_source(path: Path) -> None:
    shown = path.with_suffix(".ipynb")
    assert shown.is_file(), f"python notebooks/run.py {path.stem} --write"
    assert shown.stat().st_size < MOST_BYTES
    made = json.loads(shown.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", ())]
    assert not [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"]
    assert sum("image/png" in one.get("data", {}) for one in outputs) >= 2


def test_a_notebook_runs_in_its_folder(tmp_path: Path, runner: ModuleType) -> None:
    notebook = new_notebook(cells=[new_code_cell("from pathlib import Path\nPath('made').touch()\n1 + 1")])
    assert runner.execute(notebook, tmp_path) > 0
    assert (tmp_path / "made").exists()
    assert notebook.cells[0].outputs[0]["data"]["text/plain"] == "2"


@pytest.mark.parametrize(
    ("source", "seconds", "why"),
    [
        ("1 / 0", 60, "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('dubious')", 60, "cell 0 warns: .*dubious"),
        ("import time\ntime.sleep(30)", 2, "not done within 2 s"),
    ],
)
def test_an_error_a_warning_and_dawdling_fail(
    source: str, seconds: float, why: str, tmp_path: Path, runner: ModuleType
) -> None:
    notebook = new_notebook(cells=[new_code_cell(source)])
    with pytest.raises(runner.BadNotebookError, match=re.compile(why, re.DOTALL)):
        runner.execute(notebook, tmp_path, seconds)


def test_too_many_cells_are_too_many(tmp_path: Path, runner: ModuleType) -> None:
    long = tmp_path / "long.py"
    long.write_text("\n\n".join(f"# %%\n{n}" for n in range(runner.CELLS + 1)))
    with pytest.raises(runner.BadNotebookError, match=f"{runner.CELLS + 1} cells"):
        runner.read(long)
