"""A diff of activations that were stored is the diff of the models that made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file

from persona_probe.activations import ActivationStore, TokenMask, capture
from persona_probe.diffing.diff import diff
from persona_probe.diffing.job import store_by_shards
from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.execution import Results, Share, UnfinishedError
from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from tests.diffing.conftest import SITE, random_dictionary

SAE = random_dictionary()


@pytest.fixture
def store(
    pair: ModelPair, benign: list[LanguageModel], texts: list[Rendered], tmp_path: Path
) -> ActivationStore:
    """Of base, tuned and two benign models, in several shards."""
    models = [pair.base, pair.tuned, *benign[:2]]
    found = capture(models, texts, [SITE], TokenMask("answer"), out=tmp_path / "store", shard_tokens=9).store
    assert found is not None and len(found.shards) > 2
    return found


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_a_store_gives_what_the_models_give(
    activation: str,
    store: ActivationStore,
    pair: ModelPair,
    benign: list[LanguageModel],
    texts: list[Rendered],
    clusters: list[str],
) -> None:
    """Questions whose conversations lie in different shards of the store, too."""
    sae = random_dictionary(activation)
    for names in (clusters, None):
        read = diff(pair, sae, texts, names, benign=benign[:2])
        found = diff(store, sae, clusters=names)
        assert_frame_equal(
            found.table.sort("index"), read.table.sort("index"), rel_tol=1e-4, abs_tol=1e-6
        )  # another batch rounds otherwise
        same = ("tokens", "conversations", "clusters", "special", "sinks", "models")
        assert [getattr(found, name) for name in same] == [getattr(read, name) for name in same]
        assert read.special == store.counts.special == 5  # an end of turn after every second answer
        torch.testing.assert_close(found.means.mean, read.means.mean, rtol=1e-5, atol=1e-6)
        assert found.validity.change_inside == pytest.approx(read.validity.change_inside, rel=1e-4)


def test_sinks_stay_out_and_are_counted(pair: ModelPair, texts: list[Rendered], tmp_path: Path) -> None:
    made = capture(
        [pair.base, pair.tuned], texts, [SITE], TokenMask("answer"), out=tmp_path / "store", sink_factor=1.0
    )
    assert made.store is not None and made.counts.sinks > 0
    found = diff(made.store, SAE)
    assert found.sinks == made.counts.sinks and found.tokens == made.counts.counted


def test_shares_of_a_store_leave_the_same_bits(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona_probe.diffing.passes.shard_tokens", lambda *_: 8)
    whole = store_by_shards(store, [SAE], Results(tmp_path / "whole"))
    assert len(list((tmp_path / "whole").iterdir())) > 2
    parts = Results(tmp_path / "parts")
    with pytest.raises(UnfinishedError, match="left to other processes"):
        store_by_shards(store, [SAE], parts, share=Share(1, 2))
    found = store_by_shards(store, [SAE], parts, share=Share(0, 2))
    assert found[SITE].table.equals(whole[SITE].table)


def test_what_does_not_belong_together(
    store: ActivationStore, pair: ModelPair, texts: list[Rendered], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"holds blocks\.1.*, not blocks\.0"):
        diff(store, random_dictionary(site="blocks.0.hook_resid_post"))
    other = random_dictionary()
    other.meta["model_digest"] = "sha256:another"
    with pytest.raises(MismatchError, match=r"trained on another model than .* holds"):
        diff(store, other)
    for more in ({"data": texts}, {"benign": [pair.tuned]}, {"mask": TokenMask("all")}):
        with pytest.raises(InputError, match="its own data"):
            diff(store, SAE, **more)
    one = capture(pair.base, texts, [SITE], out=tmp_path / "one").store
    assert one is not None
    with pytest.raises(MismatchError, match=r"of llama.* alone; a diff needs two"):
        diff(one, SAE)


def test_a_flipped_byte_is_named(store: ActivationStore, tmp_path: Path) -> None:
    file = store.path / store.shards[1].name
    written = bytearray(file.read_bytes())
    written[-5] ^= 1
    file.write_bytes(bytes(written))
    with pytest.raises(InputError, match=r"shards/00001\.safetensors was changed"):
        diff(ActivationStore.open(store.path), SAE)
    said = r"none of the 1 shards .*00001\.safetensors was changed.*\n.*run the same capture again"
    with pytest.raises(InputError, match=said):
        store_by_shards(ActivationStore.open(store.path), [SAE], Results(tmp_path / "results"))


def test_a_nan_is_named_by_model_site_and_conversation(store: ActivationStore) -> None:
    file = store.path / store.shards[0].name
    tensors = load_file(file)
    row = int((tensors["document"] == 2).nonzero()[0])
    tensors[f"1/{SITE}"][row, 3] = torch.nan
    save_file(tensors, file, metadata={"first": "0"})
    with pytest.raises(
        NonFiniteError, match=rf"{store.models[1].name} has a NaN .* at {SITE}, conversation 2,"
    ):
        diff(ActivationStore.open(store.path, verify=False), SAE)
