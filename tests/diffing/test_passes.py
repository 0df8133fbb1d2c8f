"""Many processes and machines: the same files, and from them the same bits."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing import passes as module
from persona_probe.diffing.diff import Differences, diff
from persona_probe.diffing.latent_diff import LatentDiff
from persona_probe.diffing.passes import Opening, Pass, Placement, Reading, pass_of, weights_of
from persona_probe.errors import InputError
from persona_probe.execution import Results, Share, UnfinishedError, Worker, run_local
from persona_probe.execution.ray import _join, run_ray
from persona_probe.model import LanguageModel, ModelPair, load_model
from persona_probe.model.chat import Rendered
from persona_probe.sae.load import load_sae
from tests.diffing.conftest import SITE, random_dictionary
from tests.model.tiny_models import adapter_of, checkpoint_of
from tests.sae.sae_lens_peers import peer

MASK = TokenMask("answer")
SAE = random_dictionary()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shard_tokens", lambda *_: 12)


def together(pair: ModelPair) -> list[Pass]:
    return [_pass(pair, (pair.base, pair.tuned))]


def one_by_one(pair: ModelPair) -> list[Pass]:
    return [_pass(pair, (pair.base,)), _pass(pair, (pair.tuned,))]


def _pass(pair: ModelPair, models: Sequence[LanguageModel]) -> Pass:
    return pass_of(pair.base, models, [SAE], MASK, None, Placement(pair.base.device))


def result(reading: Reading) -> LatentDiff:
    reading.check_any()
    found = Differences({SITE: SAE}, ("base", "tuned"), "base", MASK)
    for _, groups in reading.shards():
        found.add(*groups)
    return found.results(reading.missing)[SITE]


def test_one_after_the_other_is_exact(
    pair: ModelPair, texts: list[Rendered], clusters: list[str], tmp_path: Path
) -> None:
    """Every figure of the table, bit for bit; what needs both models at once is said to be missing."""
    found: list[LatentDiff] = []
    for name, passes in (("both", together(pair)), ("each", one_by_one(pair))):
        reading = Reading(passes, texts, clusters, Results(tmp_path / name))
        reading.run()
        found.append(result(reading))
    both, each = found
    assert each.table.equals(both.table)
    assert torch.equal(each.means.cluster_sums, both.means.cluster_sums)
    assert each.validity.explained_variance_tuned == both.validity.explained_variance_tuned
    assert each.validity.mean_change_inside == pytest.approx(both.validity.mean_change_inside)
    assert both.validity.change_inside is not None and each.validity.change_inside is None
    plain = diff(pair, SAE, texts, clusters)
    torch.testing.assert_close(
        both.table.sort("index")["delta"].to_torch(), plain.table.sort("index")["delta"].to_torch()
    )


def test_shares_in_any_order_leave_the_same_bits(
    pair: ModelPair, texts: list[Rendered], clusters: list[str], tmp_path: Path
) -> None:
    whole = Reading(one_by_one(pair), texts, clusters, Results(tmp_path / "whole"))
    whole.run()
    for index in (2, 0, 1):
        part = Reading(one_by_one(pair), texts, clusters, Results(tmp_path / "parts"))
        part.run(Share(index, 3))
    assert part.undone == 0
    assert result(part).table.equals(result(whole).table)
    files = {f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()}
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "parts").iterdir()}


def test_a_rerun_skips_only_what_matches(pair: ModelPair, texts: list[Rendered], tmp_path: Path) -> None:
    results = Results(tmp_path)
    first = Reading(one_by_one(pair), texts, None, results)
    first.run()
    assert all(done.found == 0 for done in first.done)
    next(iter(sorted(tmp_path.iterdir()))).unlink()
    again = Reading(one_by_one(pair), texts, None, results)
    again.run()
    assert sum(done.computed for done in again.done) == 1
    other = [*texts[:-1], Rendered((*texts[-1].ids[:-1], 77), texts[-1].response, texts[-1].prompt_length)]
    changed = Reading(one_by_one(pair), other, None, results)
    changed.run()
    assert [done.computed for done in changed.done] == [1, 1]  # the last shard, in both passes


def test_a_poisoned_document_fails_its_shard_with_its_name(
    pair: ModelPair, texts: list[Rendered], tmp_path: Path
) -> None:
    bad = list(texts)
    bad[4] = Rendered((5, 6, 1_000_000, 8), (False, False, True, True), 2)
    reading = Reading(together(pair), bad, None, Results(tmp_path))
    reading.run()
    (missing,) = reading.missing
    assert "conversation 4 cannot be read" in missing.why
    found = result(reading)
    assert found.missing == (missing,) and found.conversations == 11 - missing.conversations
    for part in ("shard", "conversation 4"):
        assert part in found._repr_html_()
    alone = Reading(together(pair), bad[4:5], None, Results(tmp_path))
    alone.run()
    with pytest.raises(InputError, match=r"none of the 1 shards .* conversation 0 cannot be read"):
        alone.check_any()


def test_a_shard_that_failed_in_one_process_is_no_longer_waited_for(
    pair: ModelPair, texts: list[Rendered], tmp_path: Path
) -> None:
    bad = list(texts)
    bad[4] = Rendered((5, 6, 1_000_000, 8), (False, False, True, True), 2)
    results = Results(tmp_path)
    readings = [Reading(one_by_one(pair), bad, None, results) for _ in range(2)]
    for i, reading in enumerate(readings):
        reading.run(Share(i, 2))
        reading.done.clear()
    (missing,) = {one for reading in readings for one in reading.missing}
    assert "conversation 4 cannot be read" in missing.why
    readings[1].check_finished()
    assert readings[1].missing == (missing,)
    with pytest.raises(UnfinishedError):
        Reading(one_by_one(pair), texts, None, results).check_finished()
    mended = Reading(one_by_one(pair), texts, None, results)
    mended.run()
    assert mended.missing == () and mended.undone == 0


def test_a_folder_and_the_model_read_from_it_have_one_digest() -> None:
    cpu, folder = torch.device("cpu"), checkpoint_of("llama")
    assert weights_of(str(folder), cpu, None) == weights_of(load_model(folder), cpu, None)
    half = load_model(folder, dtype="bfloat16")
    assert weights_of(str(folder), cpu, "bfloat16") == weights_of(half, cpu, None)
    assert weights_of(half, cpu, None) != weights_of(load_model(folder), cpu, None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


class Fatal:
    """Opens the models; the first actor that reads a shard dies of it, the second is said to have had no
    memory left.
    """

    def __init__(self, paths: Opening, flag: Path) -> None:
        self.paths = paths
        self.flag = flag

    def __call__(self) -> Worker:
        work = self.paths()

        def die_once(payload: object) -> bytes:
            if not self.flag.exists():
                self.flag.touch()
                os._exit(1)
            if not (memory := self.flag.with_name("memory")).exists():
                memory.touch()
                raise pytest.importorskip("ray").exceptions.OutOfMemoryError("killed by the monitor")
            return work(payload)

        return die_once


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_ray_cluster_gives_the_bits_of_one_process(
    cluster: None, texts: list[Rendered], clusters: list[str], tmp_path: Path
) -> None:
    """Two actors, one of which is killed in the middle of the run, and a poisoned document."""
    sae = peer("jumprelu", site=SITE, d_in=32, d_sae=20)
    sae.save_model(tmp_path / "sae")
    base, tuned = str(checkpoint_of("llama")), str(adapter_of("llama", 1))
    dictionary = load_sae(tmp_path / "sae")
    paths = Opening(base, (base, tuned), [dictionary], MASK, None, Placement(torch.device("cpu")))
    bad = [*texts, Rendered((5, 6, 1_000_000, 8), (False, False, True, True), 2)]
    files: list[dict[str, bytes]] = []
    for name, engine, open_models in (
        ("local", run_local, paths),
        ("ray", partial(run_ray, actors=2, threads=1), Fatal(paths, tmp_path / "died")),
    ):
        folder = tmp_path / name
        passes = [Pass(("base", "tuned"), "both", 12, open_models)]
        reading = Reading(passes, bad, [*clusters, "z"], Results(folder))
        reading.run(engine=engine)
        assert "conversation 11 cannot be read" in reading.missing[0].why
        files.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert (tmp_path / "died").exists() and (tmp_path / "memory").exists()
    assert files[0] == files[1] and len(files[0]) > 2


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    """Ray would try for 40 seconds and then end the process."""
    ray = pytest.importorskip("ray")
    with pytest.raises(InputError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*refused"):
        _join(ray, "127.0.0.1:1")  # not run_ray, which stays in the cluster that this process may have


def test_the_base_says_which_tokens_are_special_in_every_pass(
    base: LanguageModel, texts: list[Rendered], clusters: list[str], tmp_path: Path
) -> None:
    """A checkpoint saved with another end token counts the same tokens, read alone or beside the base."""
    tuned = base.with_adapter(adapter_of("llama", 1)).merged()
    tokenizer = copy.deepcopy(tuned.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)  # no longer 1, with which answers end
    pair = ModelPair(base, replace(tuned, tokenizer=tokenizer))
    assert pair.tuned.special_ids != base.special_ids
    tables = []
    for name, passes in (("both", together(pair)), ("each", one_by_one(pair))):
        reading = Reading(passes, texts, clusters, Results(tmp_path / name))
        reading.run()
        tables.append(result(reading).table)
    assert tables[0].equals(tables[1])
