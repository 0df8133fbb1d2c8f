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
from persona_probe.training.compare import Bench, compare
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
    assert again.table.drop("seconds").equals(whole.table.drop("seconds"))
    with pytest.raises(InputError, match="seeds was"):
        compare(bench(), {}, tmp_path / "cut", seeds=(2,))
    with pytest.raises(InputError, match="undefended"):
        compare(bench(), {"none": []}, tmp_path / "no")


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
