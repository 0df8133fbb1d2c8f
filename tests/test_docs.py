"""What README and docs say exists: every link's file and anchor, every command with every flag, and every
dictionary that is named of sae-lens's registry.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jupytext
import pytest
import typer

from persona_probe.cli.app import app

HOME = Path(__file__).parent.parent
NOTEBOOKS = sorted((HOME / "notebooks").glob("[0-9]*.py"))
PAGES = [
    *sorted(HOME.glob("*.md")),
    *sorted((HOME / "docs").glob("*.md")),
    *sorted((HOME / "data").glob("*/README.md")),
]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text_of(path: Path) -> str:
    """A page, or the prose of a notebook."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = jupytext.read(path).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def links(path: Path) -> list[str]:
    """Targets of links, those in code aside."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text_of(path)))
    return [unquote(target) for target in LINK.findall(prose)]


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+?)\s*$", FENCED.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", one).lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(HOME).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        # a notebook's .ipynb is made from its .py
        there = target.exists() or target.with_suffix(".py") in NOTEBOOKS
        assert there and target.is_relative_to(HOME), link
        if anchor:
            assert anchor in anchors(target), link


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `word`, (two)\n\n[x](gone.md) `[y](code.md)` ![z](p.png)\n\n```\n[no](no.md)\n```\n"
    )
    assert links(page) == ["gone.md", "p.png"]
    assert anchors(page) == {"one-word-two"}


def commands(path: Path) -> Iterator[list[str]]:
    """Every `persona-probe ...` in code, as words; lines that go on are joined."""
    text = text_of(path).replace("\\\n", " ")
    shown = [*re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)]
    shown += [line for block in FENCED.findall(text) for line in block.splitlines()]
    shown += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    for line in shown:
        _, found, rest = line.rpartition("persona-probe ")
        if found and not line.lstrip().startswith(("pip", "#")):
            words = shlex.split(re.sub(r"[\[\]]", "", rest), comments=True)
            own = takewhile(lambda word: word not in {"|", "&&"}, words)  # what follows is the shell's
            yield [word for word in own if word != "..."]


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(HOME).as_posix())
def test_commands_exist_with_their_flags(page: Path) -> None:
    root: Any = typer.main.get_command(app)
    for words in commands(page):
        command, said = root, " ".join(words)
        while words and words[0].isalpha() and not words[0].isupper() and hasattr(command, "commands"):
            name = words.pop(0)
            assert name in command.commands, f"there is no command {name}: {said}"
            command = command.commands[name]
        flags = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)}
        known = options_of(command) | {"--help", "-h", "--version"}
        assert flags <= known, f"{sorted(flags - known)} of: {said}"


def test_dictionaries_that_are_named_are_in_the_registry() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    releases = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    page = (HOME / "docs" / "real-models.md").read_text(encoding="utf-8")
    named = re.findall(rf"\b({releases})/([\w/.-]+)", page)
    assert len(named) >= 7
    for release, sae_id in named:
        assert sae_id in known[release].saes_map, f"{release}/{sae_id}"


def test_the_benchmarks_page_shows_the_figures_as_they_were_measured() -> None:
    from benchmarks.__main__ import HERE, PAGE
    from benchmarks.page import page

    rows, machine = (json.loads((HERE / name).read_text()) for name in ("results.json", "machine.json"))
    assert PAGE.read_text() == page(rows, machine)
    assert {row["benchmark"] for row in rows} >= {"capture", "steering", "serving", "interpretation"}
