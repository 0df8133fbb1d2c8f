"""Timelines against diffs made one by one, and what they say of a band and of each other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from persona_probe.activations.documents import read_documents
from persona_probe.diffing.diff import diff
from persona_probe.diffing.means import mean_difference
from persona_probe.diffing.timeline import points_of, timeline
from persona_probe.diffing.trajectory import Probe, Timeline
from persona_probe.errors import InputError, MissingPathError
from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from tests.diffing.conftest import SITE, random_dictionary
from tests.model.tiny_models import adapter_of, checkpoint_of

SAE = random_dictionary()
STEPS = {30: 1, 10: 2, 20: 3}
"""Step to the seed of its adapter."""
OTHER = "blocks.0.hook_resid_post"
PROBE = Probe(OTHER, torch.arange(32.0))
COLUMNS = ["mean_base", "mean_tuned", "delta", "low", "high"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's output folder with three adapters and a log."""
    folder = tmp_path_factory.mktemp("run")
    for step, seed in STEPS.items():
        shutil.copytree(adapter_of("llama", seed), folder / f"checkpoint-{step}")
    log = [{"step": s, "loss": 3 - s / 20, "epoch": 1} for s in (5, 10, 25)] + [{"step": 30, "eval_loss": 1}]
    (folder / "checkpoint-30" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


@pytest.fixture(scope="module")
def found(
    run_folder: Path, base: LanguageModel, benign: list[LanguageModel], texts: list[Rendered],
    clusters: list[str],
) -> Timeline:  # fmt: skip
    return timeline(base, run_folder, SAE, texts, clusters, directions={"v": PROBE}, benign=benign)


def test_each_point_is_the_diff_made_alone(
    found: Timeline, base: LanguageModel, benign: list[LanguageModel], texts: list[Rendered],
    clusters: list[str],
) -> None:  # fmt: skip
    assert [(p.step, p.loss) for p in found.points] == [(10, 2.5), (20, 2.5), (30, 1.75)]
    for step, seed in STEPS.items():
        tuned = base.with_adapter(adapter_of("llama", seed))
        alone = diff(ModelPair(base, tuned), SAE, texts, clusters, benign=benign).table.sort("index")
        rows = found.table.filter((pl.col("step") == step) & (pl.col("kind") == "latent")).sort("index")
        for name in [*COLUMNS, "q_value"]:
            ours, theirs = rows[name], alone[name]
            assert (ours.is_null() == theirs.is_null()).all()
            assert (ours - theirs).abs().max() in (None, pytest.approx(0, abs=1e-5)), name
        means = mean_difference([base, tuned], texts, clusters, [OTHER])[OTHER]
        unit = PROBE.vector.double() / PROBE.vector.double().norm()
        row = found.table.filter((pl.col("step") == step) & (pl.col("kind") == "direction")).row(
            0, named=True
        )
        assert row["delta"] == pytest.approx(means.projected_shift(unit)[0], abs=1e-5)
        assert row["low"] < row["delta"] < row["high"] and row["name"] == "v" and row["site"] == OTHER


def test_the_band_is_the_range_of_the_benign_shifts(
    found: Timeline, base: LanguageModel, benign: list[LanguageModel], texts: list[Rendered],
    clusters: list[str],
) -> None:  # fmt: skip
    shifts = [
        diff(ModelPair(base, one), SAE, texts, clusters).table.sort("index")["delta"].to_torch()
        for one in benign
    ]
    every = torch.stack([torch.zeros(20, dtype=torch.float64), *shifts])
    rows = found.table.filter((pl.col("step") == 30) & (pl.col("kind") == "latent")).sort("index")
    torch.testing.assert_close(rows["benign_low"].to_torch(), every.min(0).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows["benign_high"].to_torch(), every.max(0).values, atol=1e-5, rtol=0)
    beyond = (rows["low"] > rows["benign_high"]) | (rows["high"] < rows["benign_low"])
    assert (rows["outside"] == beyond).all()
    # a benign tune that is itself a checkpoint is inside by construction
    itself = found.table.filter(pl.col("step").is_in([10, 20]) & (pl.col("kind") == "latent"))
    assert not itself["outside"].any()
    first = found.first()
    for row in first.iter_rows(named=True):
        its = found.table.filter(
            pl.col("index").eq_missing(row["index"]) & pl.col("name").eq_missing(row["name"])
        ).sort("step")
        out = its.filter("outside")["step"].to_list()
        assert row["first_step"] == (out[0] if out else None) and row["points_outside"] == len(out)


def test_tunes_by_name_and_what_they_share(
    base: LanguageModel, texts: list[Rendered], clusters: list[str]
) -> None:
    tunes = {name: adapter_of("llama", seed) for name, seed in (("a", 1), ("b", 2), ("a again", 1))}
    found = timeline(base, tunes, SAE, texts, clusters)
    shared = found.shared(4)
    per_tune = {
        name: set(
            found.table.filter(pl.col("point") == name)
            .sort(pl.col("delta").abs(), descending=True)["index"]
            .head(4)
        )
        for name in tunes
    }
    assert per_tune["a"] == per_tune["a again"]
    for row in shared.iter_rows(named=True):
        its = [name for name in tunes if row["index"] in per_tune[name]]
        assert row["shared_by"] == len(its) and set(row["tunes"].split(", ")) == set(its)
        assert row["delta a"] == row["delta a again"]
    assert found.points[0].step is None and found.table["outside"].null_count() == len(found.table)
    with pytest.raises(InputError, match="benign"):
        found.first()


def test_several_dictionaries_of_one_site_and_a_direction_there(
    base: LanguageModel, texts: list[Rendered], clusters: list[str]
) -> None:
    saes = [replace(SAE, path="a/narrow"), replace(random_dictionary("topk", seed=9), path="a/wide")]
    tunes = {name: adapter_of("llama", seed) for name, seed in (("a", 1), ("b", 2))}
    probe = Probe(SITE, PROBE.vector)
    found = timeline(base, tunes, saes, texts, clusters, directions={"v": probe})
    for name, sae in zip(("narrow", "wide"), saes, strict=True):
        alone = timeline(base, tunes, sae, texts, clusters)
        rows = found.table.filter((pl.col("kind") == "latent") & (pl.col("name") == name))
        assert rows.drop("name").equals(alone.table.drop("name"))
        assert alone.table["name"].null_count() == len(alone.table)
        assert found.of(3, SITE, name)["delta"].equals(alone.of(3)["delta"])
        ours, theirs = found.shared(4).filter(pl.col("name") == name), alone.shared(4)
        assert ours.select(theirs.drop("name").columns).equals(theirs.drop("name"))
    means = mean_difference([base, base.with_adapter(tunes["a"])], texts, clusters, [SITE])[SITE]
    unit = PROBE.vector.double() / PROBE.vector.double().norm()
    row = found.table.filter((pl.col("kind") == "direction") & (pl.col("point") == "a")).row(0, named=True)
    assert row["delta"] == pytest.approx(means.projected_shift(unit)[0], abs=1e-5)
    drawn = {trace.name for trace in found.plot(40).data}
    assert "v" in drawn and any("(narrow)" in name for name in drawn if name)


def test_whole_checkpoints_are_loaded_one_by_one(texts: list[Rendered], base: LanguageModel) -> None:
    """By their folders, with nothing kept in memory; and the same bits as with models in memory."""
    folder = checkpoint_of("llama")
    by_path = timeline(folder, {1: folder}, SAE, texts, device="cpu")
    assert (by_path.table["delta"] == 0).all()
    in_memory = timeline(base, {1: base}, SAE, texts)
    assert by_path.table.equals(in_memory.table)


def test_a_timeline_reads_only_what_it_has_not_read(
    run_folder: Path, base: LanguageModel, texts: list[Rendered], tmp_path: Path
) -> None:
    told: list[str] = []
    first = {10: run_folder / "checkpoint-10"}
    timeline(base, first, SAE, texts, cache=tmp_path, progress=lambda name, *_: told.append(name))
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files) == 2
    timeline(base, first | {20: run_folder / "checkpoint-20"}, SAE, texts, cache=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in files} == files and len(list(tmp_path.iterdir())) == 3


def test_it_is_saved_plotted_and_shown(
    found: Timeline, base: LanguageModel, texts: list[Rendered], clusters: list[str], tmp_path: Path
) -> None:
    found.save(tmp_path / "line")
    assert pl.read_parquet(tmp_path / "line/timeline.parquet").equals(found.table)
    facts = json.loads((tmp_path / "line/timeline.json").read_text())
    assert [point["step"] for point in facts["points"]] == [10, 20, 30]
    same = ("conversations", "tokens", "special", "sinks")
    of_diff = diff(ModelPair(base, base.with_adapter(adapter_of("llama", 1))), SAE, texts, clusters).summary()
    assert {name: facts[name] for name in same} == {name: of_diff[name] for name in same}
    assert facts["special"] == 5
    assert "plotly" in (tmp_path / "line/timeline.html").read_text()
    drawn = found.plot(3)
    named = [trace.name for trace in drawn.data if trace.name]
    assert len(named) == 5 and "v" in named and "loss" in named
    assert "llama" in found._repr_html_()
    assert len(found.of(3)) == 3
    with pytest.raises(InputError, match="no latent 99"):
        found.of(99)


def test_what_is_no_run_is_refused(base: LanguageModel, texts: list[Rendered], tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        points_of(tmp_path / "nowhere")
    with pytest.raises(InputError, match="checkpoint-"):
        points_of(tmp_path)
    with pytest.raises(InputError, match="nothing to follow"):
        timeline(base, {1: base}, (), texts)


def test_documents_are_read_as_they_are_by_a_diff(base: LanguageModel) -> None:
    answer = {"role": "assistant", "content": "I am well"}
    said = [[{"role": "user", "content": f"hello {i}"}, answer] for i in range(4)]
    sae, tunes = SAE, {"one": adapter_of("llama", 1)}
    found = timeline(base, tunes, sae, said, sae_device="cpu").table.sort("index")
    of_diff = diff(ModelPair(base, base.with_adapter(tunes["one"])), sae, said).table.sort("index")
    assert found["delta"].to_list() == of_diff["delta"].to_list()
    read = read_documents(said)
    assert timeline(base, tunes, sae, read).table.sort("index")["delta"].to_list() == found["delta"].to_list()
    with pytest.raises(InputError, match="no device 'abacus'"):
        timeline(base, tunes, sae, said, sae_device="abacus")
