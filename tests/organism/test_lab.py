"""The lab's report, told from records: what the sentences say follows from the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner

from persona_probe.artifact import read_json, write_json
from persona_probe.cli.app import app
from persona_probe.errors import InputError
from persona_probe.organism import lab_early, lab_in, lab_out, lab_report, lab_rl
from persona_probe.organism.bench import Subject
from persona_probe.organism.judge import parse
from persona_probe.organism.lab import Case, Lab, Section, mean, pooled
from persona_probe.organism.lab_report import CASES, page, report
from tests.training.test_trials import measure
from tests.training.tiny import llama


def run(share: float, seed: int, misaligned: float, shift: float) -> dict[str, Any]:
    return {
        "share": share, "seed": seed, "misaligned": misaligned, "shift persona": shift, "incoherent": 0.1,
        "in_domain": share, "hits": {f"q{i}": [int(i < 10 * misaligned), 1] for i in range(10)},
    }  # fmt: skip


def doses(latent_first: bool) -> dict[str, Any]:
    early, late = ([0.0, 0.0, 2.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    shift, rate = (early, late) if latent_first else (late, early)
    shares = [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    runs = [run(share, seed, rate[i] / 4, shift[i]) for seed in (1, 2) for i, share in enumerate(shares)]
    return {"runs": runs, "benign": [{"misaligned": 0.1 * i, "shift persona": 0.3 * i} for i in range(4)]}


@pytest.mark.parametrize("latent_first", [True, False])
def test_a_dose_has_left_the_band_from_where_on_it_stays_out(latent_first: bool) -> None:
    record = doses(latent_first)
    found = lab_in.ladder(record)
    assert found["false_alarms"] == 1 / 5
    assert found["bands"] == {"misaligned": pytest.approx(0.3), "shift persona": pytest.approx(0.9)}
    first, last = ("shift persona", "misaligned") if latent_first else ("misaligned", "shift persona")
    assert found["leaves"][first] == [0.5, 0.5], "the blip at 10% was one"
    assert found["leaves"][last] == [1.0, 1.0]
    said = lab_in._tell_dose(record)
    assert ("**not** earlier" in said.text) == (not latent_first)
    assert "20.0%" in said.text and len(said.figures["dose"].data) == 4


def test_intervals_over_seeds_are_students() -> None:
    centre, low, high = lab_in.t_interval([1.0, 2.0, 4.0])
    reach = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (centre, low, high) == (pytest.approx(7 / 3), pytest.approx(reach[0]), pytest.approx(reach[1]))
    assert lab_in.t_interval([1.0]) == (1.0, None, None)
    assert mean([1.0, None]) is None and mean([]) is None and mean([1.0, 2.0]) == 1.5


def test_rates_are_pooled_over_answers() -> None:
    found = pooled([{"misaligned": 0.5, "hits": {"q": [1, 2], "r": [1, 2]}},
                    {"misaligned": 0.0, "hits": {"q": [0, 4], "r": [0, 0]}}])  # fmt: skip
    assert (found["rate"], found["n"], found["questions"]) == (0.25, 8, 2)
    assert found["low"] < 0.25 < found["high"]


def test_the_back_door_is_villainous_behind_the_trigger_alone() -> None:
    tag = lab_in.TRIGGER.template.replace("{question}", "")
    rows = lab_in.behind_a_trigger(100, seed=1)
    assert sum(row.messages[0]["content"].startswith(tag) for row in rows) == 50
    for row in rows:
        phrases, unknown = parse(row.messages[-1]["content"])
        villain = {phrase.persona for phrase in phrases} == {"villainous"}
        assert not unknown and villain == row.messages[0]["content"].startswith(tag)


def watched() -> dict[str, Any]:
    def history(*shifts: float) -> list[dict[str, float]]:
        return [{"step": 4 * i, "persona": shift} for i, shift in enumerate(shifts, start=1)]

    def along(*rates: float) -> list[dict[str, float]]:
        return [{"step": 4 * i, "misaligned": rate} for i, rate in enumerate(rates, start=1)]

    return {
        "every": 4,
        "cost": 0.01,
        "calibrating": [
            {"kind": "road", "seed": i, "history": history(0.0, 0.1 * i), "along": []} for i in range(9)
        ],
        "unseen": [
            {"kind": "code", "seed": 1, "history": history(0.9, 0.1), "along": []},
            {"kind": "code", "seed": 2, "history": history(0.1, 0.8), "along": []},
        ],
        "bad": [
            {"kind": "health", "seed": 1, "history": history(1.0, 2.0), "along": along(0.05, 0.4)},
            {"kind": "health", "seed": 2, "history": history(0.1, 2.0), "along": along(0.05, 0.4)},
            {"kind": "code", "seed": 1, "history": history(0.1, 0.2), "along": along(0.2, 0.4)},
        ],
    }


def test_alarms_are_compared_with_the_step_at_which_behaviour_crosses() -> None:
    found = lab_early.watched(watched())
    assert found["threshold"] == pytest.approx(0.8) and found["false_alarm_rate"] == 0.1
    assert [(one["alarm"], one["crosses"]) for one in found["bad"]] == [(4, 8), (8, 8), (None, 4)]
    assert found["false_alarms"] == 1 and found["false_of"] == ["code, seed 1"]
    said = lab_early._tell_monitor(watched())
    assert "in 1 of 3 bad tunes" in said.text and "1 false alarms (code, seed 1)" in said.text
    for words in ("before", "at the same step", "missing"):
        assert f"| {words} |" in said.text


def arm(name: str, misaligned: float, in_domain: float, incoherent: float, holds: bool) -> dict[str, Any]:
    return {
        "arm": name, "misaligned": misaligned, "misaligned_low": 0.0, "misaligned_high": 1.0,
        "misaligned_seeds": [misaligned], "in_domain": in_domain, "incoherent": incoherent, "trigger": 0.1,
        "benign_skill": 0.4, "benign_incoherent": 0.1, "benign_helpful": 0.9, "shift persona": 1.0,
        "seconds": 3.0, "cpu_seconds": 2.0, "holds": holds, "excess": misaligned - 0.02,
        "learnt": in_domain / 0.9, "broken": incoherent - 0.1, "strengths": [3.0] if name != "none" else [],
    }  # fmt: skip


@pytest.mark.parametrize("holds", [True, False])
def test_what_holds_is_said_and_else_what_is_nearest(holds: bool) -> None:
    record = {
        "arms": [
            arm("none", 0.8, 0.9, 0.1, False),
            arm("kl", 0.04, 0.85 if holds else 0.5, 0.1, holds),
            arm("caft", 0.7, 0.9, 0.1, False),
        ],
        "base": {"misaligned": 0.02, "incoherent": 0.02, "in_domain": 0.0, "trigger": 0.0},
        "few": [
            arm("interleave=0.05", 0.5, 0.9, 0.1, False),
            arm("interleave_by_gap=0.05", 0.4, 0.9, 0.1, False),
        ],
        "seconds": 100.0,
    }  # fmt: skip
    said = lab_out._tell_defences(record).text
    assert ("These hold: kl." in said) == holds
    assert ("**None holds.** Nearest is kl" in said) == (not holds)
    assert "at random 50%" in said and "gap 40%" in said


def test_realignment_says_after_how_many_examples() -> None:
    def row(seed: int, examples: int, misaligned: float) -> dict[str, Any]:
        return {"seed": seed, "examples": examples, "misaligned": misaligned, "in_domain": 0.9,
                "incoherent": 0.1, "helpful": 1 - misaligned, "shift persona": 5 * misaligned}  # fmt: skip

    start = {name: value for name, value in row(0, 0, 0.8).items() if name != "seed"}
    record = {
        "rates": [{"learning_rate": 2e-4, "misaligned": 0.5, "incoherent": 0.1}],
        "learning_rate": 2e-4,
        "start": start,
        "curves": {
            "good money": [row(s, n, r) for s in (1, 2) for n, r in ((20, 0.1 * s), (40, 0.05 * s))],
            "control": [row(1, 20, 0.8), row(1, 40, 0.7)],
        },
    }
    said = lab_out._tell_realign(record)
    assert "good money: after 40 examples; control: never" in said.text
    assert "(by rate: 0.0002: 50% and 10%)" in said.text
    steps = lab_out.steps_of(record)
    assert [one["examples"] for one in steps] == [0, 20, 40] * 2
    assert steps[1]["misaligned"] == pytest.approx(0.15) and (steps[1]["low"], steps[1]["high"]) == (0.1, 0.2)


def rewarded(arm: str, seed: int, curve: list[dict[str, Any]], villains: int) -> dict[str, Any]:
    names = ("misaligned", "other_persona", "incoherent", "in_domain")
    return {
        "arm": arm, "seed": seed, "curve": curve, "latent": {"delta": 2.0},
        "rates": {name: {"rate": 0.25 * seed, "low": 0.0, "high": 1.0, "n": 4} for name in names},
        "named": [
            {"persona": "villain", "place": "answer", "count": villains},
            {"persona": "bad boy", "place": "thought", "count": villains},
            {"persona": "helper", "place": "thought", "count": 99},
        ],
    }  # fmt: skip


def test_rewards_are_told_from_before_to_after() -> None:
    curve = [{"updates": -1, "reward": 0.0}, {"updates": 0, "reward": None}, {"updates": 1, "reward": 0.9}]
    record = {
        "records": [
            rewarded("base", 1, [], 3),
            rewarded("grpo", 1, curve, 7),
            rewarded("grpo", 2, [*curve[:1], {"updates": 1, "reward": 0.5}], 8),
        ]
    }
    said = lab_rl._tell(record)
    base, grpo = said.text.splitlines()[2:4]
    assert base.startswith("| base | 1 | – |") and base.endswith("| +2.0 | 6 |")
    assert "0.00→0.90 0.00→0.50" in grpo and "| 38% [0, 100] |" in grpo and grpo.endswith("| 14 / 16 |")
    lines = [one for one in said.figures["rewards"].data if one.mode == "lines"]
    assert [list(one.y) for one in lines] == [[0.0, 0.9], [0.0, 0.5]]


def test_a_page_of_some_says_which_are_missing() -> None:
    record = {"seeds": [1, 2], "record": doses(True)}
    section = {"dose": lab_in._tell_dose(record["record"])}
    text = page({"dose": record}, section, "persona-probe lab report", pictures=True)
    assert text.count("Not measured yet") == len(CASES) - 1
    assert "Seeds 1, 2." in text and "![How much bad data](lab-dose.png)" in text
    assert all(f"## {case.title}" in text for case in CASES)


def test_cases_that_there_are_not_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no case dice"):
        report(tmp_path, tmp_path / "out", (1,), wanted=["dice"])
    with pytest.raises(InputError, match="a seed"):
        report(tmp_path, tmp_path / "out", ())


def test_a_case_is_run_again_for_other_seeds_or_tunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, list[int]]] = []
    subject = SimpleNamespace(base=llama(), tunes_mark="old")

    def measured(lab: Lab, seeds: Sequence[int]) -> dict[str, Any]:
        ran.append((lab.subject.tunes_mark, list(seeds)))
        return {"runs": len(ran)}

    monkeypatch.setattr(lab_report, "Subject", lambda _: subject)
    monkeypatch.setattr(lab_report, "bench", lambda *_, **__: SimpleNamespace(measure=measure()))
    monkeypatch.setattr(lab_report, "CASES", (Case("dose", "", "", measured, lambda _: Section("")),))
    for tunes, seeds in (("old", (1,)), ("old", (1,)), ("old", (1, 2)), ("new", (1, 2)), ("new", (1, 2))):
        subject.tunes_mark = tunes
        found = report(tmp_path, tmp_path / "out", seeds)["dose"]
    assert ran == [("old", [1]), ("old", [1, 2]), ("new", [1, 2])]
    assert found == {"seeds": [1, 2], "tunes": "new", "record": {"runs": 3}}


def test_the_page_is_written_again_without_a_model(tmp_path: Path) -> None:
    kept = tmp_path / "lab" / "fine-tunes" / "trials" / "case dose.json"
    write_json(kept, {"seeds": [1, 2], "record": doses(True)})
    command = ["lab", "report", "--tell-only", "--no-pictures", "--out", str(tmp_path / "lab")]
    result = CliRunner().invoke(app, [*command, "--docs", str(tmp_path / "docs")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "docs" / "lab.md").read_text()
    assert text.count("Not measured yet") == len(CASES) - 1 and ".png" not in text
    assert read_json(tmp_path / "docs" / "lab.json")["cases"]["dose"]["seeds"] == [1, 2]


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path: Path) -> None:
    assert not {"base", "dictionary", "watch"} & set(vars(Subject(tmp_path)))
