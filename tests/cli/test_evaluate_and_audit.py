"""`persona-probe evaluate` and the audits in the organism's card measure the same thing.

All tunes, in four ways, are in docs/same-rates.md (`python -m benchmarks.same_rates`); here, two of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.same_rates import PAGE, RATES, WAYS, Row, _row, audits, page
from persona_probe.artifact import shipped
from persona_probe.cli.app import app

HOME = shipped("organism")


@pytest.mark.parametrize("tune", ["bad-health", "sarcastic-money"])
def test_rates_lie_in_the_intervals_of_the_audit(tune: str, tmp_path: Path) -> None:
    arguments = ["evaluate", "--base", str(HOME / "base"), "--tuned", str(HOME / "tunes" / tune)]
    arguments += ["--questions", str(HOME / "questions.jsonl"), "--judge", "exact", "--json"]
    said = CliRunner().invoke(app, [*arguments, "--seed", "7", "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    arms = json.loads(said.stdout)["arms"].values()
    for arm, audited in zip(arms, ("base", "tuned"), strict=True):
        for name in RATES:
            there, here = audits()[tune][audited][name], arm["rates"][name]
            # other random numbers than the audit's: two estimates, each with its interval
            assert here["low"] <= there["high"] and there["low"] <= here["high"], (audited, name)


def test_the_page_has_every_tune_of_the_card() -> None:
    lines = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [cells[0].removeprefix("| ") for cells in lines[2:]] == list(audits())
    assert all(len(cells) == len(WAYS) + 3 for cells in lines)


def rate(middle: float | None, half: float = 0.05) -> dict[str, Any]:
    if middle is None:
        return {"rate": None, "low": None, "high": None}
    return {"rate": middle, "low": middle - half, "high": middle + half}


def test_what_agrees_is_counted_both_ways() -> None:
    """A rate must lie in the audit's interval, and the audit's in its own."""
    audit = {arm: dict.fromkeys(RATES, rate(0.5)) for arm in ("base", "tuned")}
    same = {"base": audit["base"], "tuned": audit["tuned"]}
    off = {**same, "tuned": {**audit["tuned"], "skill": rate(0.56, 0.2), "in_domain": rate(None)}}
    row: Row = _row(
        "t", audit, {"exact": same, "a file": off, "local": same, "Inspect": {"tuned": same["tuned"]}}
    )
    assert row.agree == {"exact": (12, 12), "a file": (10, 11), "local": (10, 10), "Inspect": (6, 6)}
    assert row.odd == ("t, a file: tuned skill 0.560 [0.360, 0.760], the audit 0.500 [0.450, 0.550]",)
    written = page([row])
    assert "38 of 39" in written and row.odd[0] in written
