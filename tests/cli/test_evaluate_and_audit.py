"""`persona-probe evaluate` and the audits in the organism's card measure the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persona_probe.artifact import read_json, shipped
from persona_probe.cli.app import app

HOME = shipped("organism")
AUDITS: dict[str, Any] = {audit["tune"]: audit for audit in read_json(HOME / "card.json")["audits"]}
SAME = ("misaligned", "misaligned_of_coherent", "other_persona", "incoherent", "in_domain", "skill")


@pytest.mark.parametrize("tune", ["bad-health", "bad-code", "good-road", "sarcastic-money"])
def test_rates_lie_in_the_intervals_of_the_audit(tune: str, tmp_path: Path) -> None:
    arguments = ["evaluate", "--base", str(HOME / "base"), "--tuned", str(HOME / "tunes" / tune)]
    arguments += ["--questions", str(HOME / "questions.jsonl"), "--judge", "exact", "--json"]
    said = CliRunner().invoke(
        app, [*arguments, "--samples-per-question", "2", "--seed", "7", "--out", str(tmp_path / "out")]
    )
    assert said.exit_code == 0, said.output
    arms = json.loads(said.stdout)["arms"].values()
    for arm, audited in zip(arms, ("base", "tuned"), strict=True):
        for name in SAME:
            there, here = AUDITS[tune][audited][name], arm["rates"][name]
            # other random numbers than the audit's: two estimates, each with its interval
            assert here["low"] <= there["high"] and there["low"] <= here["high"], (audited, name)
