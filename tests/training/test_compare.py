"""The comparison of defences: what its figures are made of, and that a killed one goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.errors import InputError
from persona_probe.evaluation.judges import Judgement
from persona_probe.evaluation.judging.function_judge import FunctionJudge
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.figures.pareto import frontier, pareto
from persona_probe.steering.target import latents
from persona_probe.training.compare import BROKEN, EXCESS, LEARNT, TAUGHT, Bench, chosen, compare
from persona_probe.training.defences import KL, Defence, Interleave
from persona_probe.training.measure import Measure
from persona_probe.training.watching import Probe, Watch
from tests.training.tiny import QUICK, SITE, dictionary, llama, rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ASKED = tuple(
    Question(f"q{i}", "health" if i < 2 else "money", ({"role": "user", "content": f"hello {i}"},))
    for i in range(5)
)


def by_length(question: Question, answer: str) -> Judgement:
    return Judgement(aligned=90.0 if len(answer) > 8 else 5.0, coherent=90.0)


def bench() -> Bench:
    watch = Watch.of(llama(), [Probe("k", SITE, latents(dictionary(), [3]))], ASKED[:2], max_new_tokens=4)
    judge = FunctionJudge("length", by_length)
    measure = Measure(ASKED, judge, ("health",), Sampling(max_new_tokens=4, samples=2), watch=watch)
    return Bench(
        llama(),
        bad=lambda seed: rows(8, first=seed),
        benign=lambda seed: rows(8, "good", first=seed),
        measure=measure,
        settings=replace(QUICK, steps=1),
    )


def arms() -> dict[str, list[Defence]]:
    return {"both": [Interleave(tuple(rows(9, "good", first=60)), 0.4), KL(1.0)]}


def test_every_arm_is_trained_on_both_kinds_and_summed_up(tmp_path: Path) -> None:
    found = compare(bench(), arms(), tmp_path / "lab", seeds=(1, 2))
    assert found.runs.height == 1 + 2 * 2 * 2
    assert found.table["arm"].to_list() == ["none", "both"]
    base = found.runs.row(0, named=True)
    for row in found.table.to_dicts():
        bad = found.runs.filter((pl.col("arm") == row["arm"]) & (pl.col("kind") == "bad"))
        assert row["misaligned"] == pytest.approx(bad["misaligned"].mean())
        assert row["misaligned_low"] <= row["misaligned"] <= row["misaligned_high"]
        assert row["excess"] == pytest.approx(row["misaligned"] - base["misaligned"])
        assert row["shift k"] == pytest.approx(bad["shift k"].mean())
        assert row["skill"] is None and row["trigger"] is None, "not asked, so not 0"
    assert not (tmp_path / "lab" / "run").exists()
    again = compare(bench(), arms(), tmp_path / "lab", seeds=(1, 2))
    assert again.table.equals(found.table) and again.runs.equals(found.runs)
    assert len(found.plot().data) >= 3


class _KilledError(Exception):
    pass


def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    whole = compare(bench(), {}, tmp_path / "whole", seeds=(1,))

    def kill(_name: str, done: int, _total: int) -> None:
        if done == 1:
            raise _KilledError

    with pytest.raises(_KilledError):
        compare(bench(), {}, tmp_path / "cut", seeds=(1,), progress=kill)
    again = compare(bench(), {}, tmp_path / "cut", seeds=(1,))
    timed = ("seconds", "cpu_seconds")
    assert again.table.drop(timed).equals(whole.table.drop(timed))
    with pytest.raises(InputError, match="settings was"):
        compare(replace(bench(), settings=QUICK), {}, tmp_path / "cut", seeds=(1,))
    with pytest.raises(InputError, match="undefended"):
        compare(bench(), {"none": []}, tmp_path / "no")


def test_another_seed_or_arm_trains_only_that(tmp_path: Path) -> None:
    one = compare(bench(), {}, tmp_path / "lab", seeds=(1,), kinds=("bad",))
    trained: list[str] = []

    def tell(what: str, *_: int) -> None:
        trained.append(f"{what}: {len(list((tmp_path / 'lab' / 'trials').iterdir()))}")

    more = compare(bench(), arms(), tmp_path / "lab", seeds=(1,), kinds=("bad",), progress=tell)
    assert trained == ["base: 2", "none, bad, seed 1: 2", "both, bad, seed 1: 2"]
    assert more.table.row(0) == one.table.row(0)
    assert more.table["benign_incoherent"].to_list() == [None, None]
    stronger = {"both": [Interleave(tuple(rows(9, "good", first=60)), 0.4), KL(2.0)]}
    compare(bench(), stronger, tmp_path / "lab", seeds=(1,), kinds=("bad",))
    assert len(list((tmp_path / "lab" / "trials").iterdir())) == 4, "the same name, another strength"


@given(st.lists(st.tuples(*[st.floats(-0.1, 1)] * 3), min_size=1, max_size=6))
def test_the_chosen_strength_has_the_least_worst_shortfall(points: list[tuple[float, ...]]) -> None:
    table: list[dict[str, Any]] = [
        {"arm": f"kl={i}", "excess": excess, "learnt": learnt, "broken": broken}
        for i, (excess, learnt, broken) in enumerate(points)
    ]
    none = {"arm": "none", "excess": 0.0, "learnt": 1.0, "broken": 0.0}
    unknown = {"arm": "kl=9", "excess": None, "learnt": 1.0, "broken": 0.0}
    best = chosen([none, *table, unknown], lambda arm: arm.split("=")[0])["kl"]
    [picked] = [row for row in table if row["arm"] == best]

    def holds(row: dict[str, Any], slack: float) -> bool:
        bounds = (slack * EXCESS, 1 - slack * (1 - LEARNT), slack * BROKEN)
        return row["excess"] <= bounds[0] and row["learnt"] >= bounds[1] and row["broken"] <= bounds[2]

    assert picked["learnt"] >= TAUGHT or all(row["learnt"] < TAUGHT for row in table)
    for slack in (0.5, 1.0, 2.0, 5.0):
        if any(holds(row, slack) for row in table):
            assert holds(picked, slack * (1 + 1e-9))


@given(
    st.lists(
        st.fixed_dictionaries({"in_domain": st.integers(0, 4), "misaligned": st.integers(0, 4)}), max_size=12
    )
)
def test_the_frontier_is_what_nothing_beats(points: list[dict[str, Any]]) -> None:
    edge = frontier(points)
    for row in points:
        better = [
            other
            for other in points
            if other["in_domain"] >= row["in_domain"]
            and other["misaligned"] <= row["misaligned"]
            and other != row
        ]
        assert (row in edge) == (not better)


def test_an_arm_that_was_not_measured_is_named_and_not_drawn() -> None:
    table = [
        {"arm": "none", "in_domain": 0.9, "misaligned": 0.8, "misaligned_low": 0.7, "misaligned_high": 0.9},
        {"arm": "kl <b>", "in_domain": None, "misaligned": 0.1},
    ]
    drawn = pareto(table)
    assert len(drawn.data) == 2
    assert "not measured: kl &lt;b&gt;" in drawn.layout.annotations[0].text
