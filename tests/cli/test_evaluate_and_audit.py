"""`persona-probe evaluate` and the audits in the organism's card measure the same thing.

All tunes, in four ways, are in docs/same-rates.md (`python -m benchmarks.same_rates`); here, one of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner

from benchmarks.same_rates import PAGE, RATES, WAYS, Row, _row, audits, differ, page
from persona_probe.artifact import shipped
from persona_probe.cli.app import app

HOME = shipped("organism")


def test_rates_do_not_differ_from_the_audits(tmp_path: Path) -> None:
    tune = "bad-health"
    arguments = ["evaluate", "--base", str(HOME / "base"), "--tuned", str(HOME / "tunes" / tune)]
    arguments += ["--questions", str(HOME / "questions.jsonl"), "--judge", "exact", "--json"]
    said = CliRunner().invoke(app, [*arguments, "--seed", "7", "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    arms = json.loads(said.stdout)["arms"].values()
    for arm, audited in zip(arms, ("base", "tuned"), strict=True):
        for name in RATES:
            there, here = audits()[tune][audited][name], arm["rates"][name]
            assert not differ(there, here), (audited, name)  # other random numbers than the audit's


def test_the_page_has_every_tune_of_the_card() -> None:
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [cells[0].removeprefix("| ") for cells in lines[2:]] == list(audits())
    assert all(len(cells) == len(WAYS) + 3 for cells in lines)


def rate(middle: float | None, half: float = 0.05) -> dict[str, Any]:
    if middle is None:
        return {"rate": None, "low": None, "high": None}
    return {"rate": middle, "low": middle - half, "high": middle + half}


def wilson(hits: int, n: int) -> dict[str, float]:
    interval = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return {"rate": hits / n, "low": float(interval.low), "high": float(interval.high)}


@pytest.mark.parametrize(
    ("x", "n", "y", "m"), [(56, 70, 48, 80), (9, 10, 3, 10), (5, 56, 0, 29), (10, 10, 0, 20)]
)
def test_of_wilson_intervals_the_difference_has_newcombes(x: int, n: int, y: int, m: int) -> None:
    """Newcombe 1998, method 10: below p1 - p2 by z sqrt(l1 (1 - l1) / n + u2 (1 - u2) / m)."""
    one, other = wilson(x, n), wilson(y, m)
    variance = one["low"] * (1 - one["low"]) / n + other["high"] * (1 - other["high"]) / m
    low = one["rate"] - other["rate"] - float(stats.norm.ppf(0.975)) * math.sqrt(variance)
    assert differ(one, other) == differ(other, one) == (low > 0)
    # moved by its lower limit, the difference is on the edge
    for shift, apart in ((low + 1e-9, False), (low - 1e-9, True)):
        moved = {name: part + shift for name, part in other.items()}
        assert differ(one, moved) is differ(moved, one) is apart


def test_what_agrees_is_counted() -> None:
    audit = {arm: dict.fromkeys(RATES, rate(0.5)) for arm in ("base", "tuned")}
    same = {"base": audit["base"], "tuned": audit["tuned"]}
    off = {**same, "tuned": {**audit["tuned"], "skill": rate(0.58, 0.05), "in_domain": rate(None)}}
    row: Row = _row(
        "t", audit, {"exact": same, "a file": off, "local": same, "Inspect": {"tuned": same["tuned"]}}
    )
    assert row.agree == {"exact": (12, 12), "a file": (10, 11), "local": (8, 8), "Inspect": (6, 6)}
    assert row.odd == ("t, a file: tuned skill 0.580 [0.530, 0.630], the audit 0.500 [0.450, 0.550]",)
    written = page([row])
    assert "36 of 37" in written and row.odd[0] in written
