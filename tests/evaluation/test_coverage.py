"""The page of simulated coverage, and the simulation behind it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.coverage import FLOOR, PAGE, PAIRS, QUESTIONS, RATES, Cell, differences, page, rates, run

ROW = re.compile(
    r"^\| (\d+) \| ([\d.]+) \| ([\d. and]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE
)


def test_no_interval_in_the_docs_falls_below_the_floor() -> None:
    text = Path(PAGE).read_text(encoding="utf-8")
    rows = ROW.findall(text)
    assert len(rows) == len(QUESTIONS) * 2 * (len(RATES) + len(PAIRS))
    assert min(float(row[3]) for row in rows) >= FLOOR
    assert min(float(row[5]) for row in rows) < 0.85  # the peer's


@pytest.fixture(scope="module")
def few() -> tuple[list[Cell], list[Cell]]:
    return list(rates(40)), list(differences(20))


def test_the_page_says_what_was_simulated(few: tuple[list[Cell], list[Cell]]) -> None:
    rows = ROW.findall(page(*few, runs=40))
    assert [row[:4] for row in rows] == [
        (str(c.questions), str(c.correlation), c.rate, f"{c.covered:.3f}") for part in few for c in part
    ]
    assert all(0.8 <= c.covered <= 1 and 0 < c.width < 1 for part in few for c in part)


def test_more_questions_give_narrower_intervals(few: tuple[list[Cell], list[Cell]]) -> None:
    for part in few:
        for cell in part:
            wider = [c for c in part if (c.correlation, c.rate) == (cell.correlation, cell.rate)]
            assert [c.questions for c in wider] == list(QUESTIONS)
            assert wider[0].width > wider[1].width > wider[2].width


def test_the_benchmark_reports_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell(8, 0.1, "0.2", covered, 0.5, 0.7) for covered in (0.97, 0.91)]
    monkeypatch.setattr("benchmarks.coverage.rates", lambda _: iter(cells))
    monkeypatch.setattr("benchmarks.coverage.differences", lambda _: iter(cells[:1]))
    rate, difference = run(quick=True)
    assert (rate.value, rate.holds, difference.value, difference.holds) == (0.91, False, 0.97, True)
