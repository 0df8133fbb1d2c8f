"""The diff against its definition, and what must hold whatever the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing.diff import diff
from persona_probe.diffing.latent_diff import LatentDiff
from persona_probe.diffing.means import mean_difference
from persona_probe.errors import (
    InputError,
    MismatchError,
    MissingPathError,
    NonFiniteError,
    UnknownSiteError,
)
from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from persona_probe.sae.validity import validity
from tests.diffing import reference
from tests.diffing.conftest import SITE, random_dictionary
from tests.model.tiny_models import model_of

OTHER = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def found(
    pair: ModelPair, benign: list[LanguageModel], texts: list[Rendered], clusters: list[str]
) -> LatentDiff:
    return diff(pair, random_dictionary(), texts, clusters, benign=benign)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_it_is_the_definition(
    activation: str,
    pair: ModelPair,
    benign: list[LanguageModel],
    texts: list[Rendered],
    clusters: list[str],
) -> None:
    """Batches, padding and shared weights against single conversations and loops."""
    sae = random_dictionary(activation)
    found = diff(pair, sae, texts, clusters, benign=benign, batch_tokens=20)
    expected = reference.table([pair.base, pair.tuned, *benign], sae, texts, clusters, block=1)
    ours = found.table.sort("index")
    for name in expected[0]:
        if name != "between":
            theirs = torch.tensor([row[name] for row in expected], dtype=torch.float64)
            torch.testing.assert_close(ours[name].to_torch(), theirs, rtol=1e-4, atol=1e-5)
    assert found.tokens == sum(len(reference.counted(text, pair.base.special_ids)) for text in texts)
    assert found.conversations == 11 and found.clusters == 5 and found.sinks == 0


def test_rows_are_sorted_and_complete(found: LatentDiff) -> None:
    sizes = found.table["delta"].abs()
    assert sizes.to_list() == sorted(sizes, reverse=True)
    assert sorted(found.table["index"]) == list(range(20))
    assert (found.table["low"] <= found.table["delta"]).all()
    assert (found.table["high"] >= found.table["delta"]).all()
    assert (found.table["max_tuned"] >= found.table["mean_tuned"]).all()


def test_identical_models_differ_by_exactly_nothing(
    base: LanguageModel, texts: list[Rendered], clusters: list[str]
) -> None:
    found = diff(
        ModelPair(base, base), random_dictionary(), texts, clusters, benign=[base, base], batch_tokens=16
    )
    table = found.table
    for name in ("delta", "low", "high", "did", "benign_mean", "benign_max"):
        assert (table[name] == 0).all(), name
    assert (table["mean_base"] == table["mean_tuned"]).all()
    assert (table["fires_base"] == table["fires_tuned"]).all()
    assert (table["max_base"] == table["max_tuned"]).all()
    assert (table["q_value"].drop_nulls() == 1).all() and (table["z"].drop_nulls() == 0).all()
    assert (found.means.shift() == 0).all()
    assert found.validity.change_inside is None and found.validity.change_norm == 0
    alone = diff(ModelPair(base, base), random_dictionary(), texts, clusters)
    assert (alone.table["z"] == 0).all()


def test_a_benign_tune_given_as_tuned_has_no_latent_of_its_own(
    base: LanguageModel, benign: list[LanguageModel], texts: list[Rendered], clusters: list[str]
) -> None:
    """One of the benign tunes against three that include itself: within their spread by construction."""
    found = diff(ModelPair(base, benign[0]), random_dictionary(), texts, clusters, benign=benign)
    assert found.tested
    assert found.table["q_value"].drop_nulls().min() > 0.05


def test_without_benign_tunes_it_describes_and_does_not_test(
    pair: ModelPair, benign: list[LanguageModel], texts: list[Rendered], clusters: list[str]
) -> None:
    alone = diff(pair, random_dictionary(), texts, clusters)
    assert not alone.tested and "not tested" in alone._repr_html_()
    for name in ("q_value", "p_value", "did", "benign_mean", "benign_max"):
        assert alone.table[name].null_count() == 20
    live = alone.table.filter(pl.col("delta") != 0)
    half = (live["high"] - live["low"]) / 2
    from scipy import stats

    assert (live["delta"] / (half / stats.t.ppf(0.975, 4)) - live["z"]).abs().max() < 1e-9
    one = diff(pair, random_dictionary(), texts, clusters, benign=benign[:1])
    assert not one.tested and one.table["did"].null_count() == 0


def test_several_dictionaries_in_one_pass_equal_one_at_a_time(
    pair: ModelPair, benign: list[LanguageModel], texts: list[Rendered], clusters: list[str]
) -> None:
    saes = [random_dictionary(), random_dictionary("topk", site=OTHER, seed=3)]
    together = diff(pair, saes, texts, clusters, benign=benign)
    assert list(together) == [SITE, OTHER]
    for sae in saes:
        alone = diff(pair, sae, texts, clusters, benign=benign)
        assert together[sae.site].table.equals(alone.table)
        assert together[sae.site].validity == alone.validity


def test_several_dictionaries_of_one_site_are_told_apart_by_their_folders(
    pair: ModelPair, texts: list[Rendered], clusters: list[str]
) -> None:
    narrow = replace(random_dictionary("topk", seed=3), path="saes/width_16k/block_1")
    wide = replace(random_dictionary(), path="saes/width_65k/block_1")
    other = random_dictionary("topk", site=OTHER, seed=4)
    together = diff(pair, [narrow, other, wide], texts, clusters)
    assert list(together) == [f"{SITE}/width_16k-block_1", OTHER, f"{SITE}/width_65k-block_1"]
    here, beside = (replace(narrow, path="."), replace(wide, path="tests/../persona_probe"))
    assert [*diff(pair, [here, beside], texts)] == [f"{SITE}/{Path.cwd().name}", f"{SITE}/persona_probe"]
    for found, sae in zip(together.values(), [narrow, other, wide], strict=True):
        alone = diff(pair, sae, texts, clusters)
        assert found.dictionary is sae and found.table.equals(alone.table)
        assert found.validity == alone.validity and torch.equal(found.means.mean, alone.means.mean)


def test_the_dictionary_is_judged_on_the_same_tokens(
    found: LatentDiff, pair: ModelPair, texts: list[Rendered]
) -> None:
    alone = validity(pair, random_dictionary(), texts, TokenMask("answer"))
    assert found.validity == alone


def test_means_come_with_it(
    found: LatentDiff,
    pair: ModelPair,
    benign: list[LanguageModel],
    texts: list[Rendered],
    clusters: list[str],
) -> None:
    models = [pair.base, pair.tuned, *benign]
    alone = mean_difference(models, texts, clusters, [SITE])[SITE]
    assert (found.means.mean == alone.mean).all()
    assert (found.means.residual_rms == alone.residual_rms).all()


def test_each_conversation_is_its_own_question_by_default(pair: ModelPair, texts: list[Rendered]) -> None:
    found = diff(pair, random_dictionary(), texts)
    named = diff(pair, random_dictionary(), texts, [f"q{i}" for i in range(11)])
    assert found.clusters == 11 and found.table.equals(named.table)


def test_one_question_has_no_interval(pair: ModelPair, texts: list[Rendered]) -> None:
    found = diff(pair, random_dictionary(), texts, ["the same"] * 11)
    assert found.table["low"].null_count() == found.table["high"].null_count() == 20
    assert found.table["delta"].null_count() == 0


def test_the_mask_decides_which_tokens_count(pair: ModelPair, texts: list[Rendered]) -> None:
    last = diff(pair, random_dictionary(), texts, mask=TokenMask("last_prompt"))
    assert last.tokens == 11 and last.mask.kind == "last_prompt"
    answers = diff(pair, random_dictionary(), texts, mask=TokenMask("response"))
    assert answers.tokens + 11 == diff(pair, random_dictionary(), texts).tokens


def test_progress_reaches_the_end(pair: ModelPair, texts: list[Rendered]) -> None:
    told: list[tuple[int, int]] = []
    diff(pair, random_dictionary(), texts, batch_tokens=20, progress=lambda *n: told.append(n))
    assert told[-1] == (11, 11) and [n for n, _ in told] == sorted(n for n, _ in told)


def test_top_ranks_and_filters(found: LatentDiff) -> None:
    assert found.top(3)["index"].to_list() == found.table["index"].head(3).to_list()
    risen, fallen = found.top(20, direction="up"), found.top(20, direction="down")
    assert (risen["delta"] > 0).all() and (fallen["delta"] < 0).all()
    by_did = found.top(20, by="did")["did"].abs().to_list()
    assert by_did == sorted(by_did, reverse=True)
    row = found.row(int(risen["index"][0]))
    assert row["delta"] == risen["delta"][0]
    with pytest.raises(InputError, match="no latent 99"):
        found.row(99)


def test_ranking_by_did_needs_benign_tunes(pair: ModelPair, texts: list[Rendered]) -> None:
    with pytest.raises(InputError, match="benign"):
        diff(pair, random_dictionary(), texts).top(by="did")


def test_it_is_saved_plotted_and_shown(found: LatentDiff, tmp_path: Path) -> None:
    found.save(tmp_path / "diff")
    assert pl.read_parquet(tmp_path / "diff" / "latents.parquet").equals(found.table)
    written = json.loads((tmp_path / "diff" / "diff.json").read_text())
    assert written["models"]["benign"] == ["llama-lora-2", "llama-lora-3", "llama-lora-4"]
    assert written["validity"]["gate"] == found.validity.gate and written["answers"] == "base"
    assert "plotly" in (tmp_path / "diff" / "volcano.html").read_text()
    again = LatentDiff.load(tmp_path / "diff", found.dictionary)
    assert again.table.equals(found.table) and again.summary() == found.summary()
    assert again.validity == found.validity and again.mask == found.mask
    assert torch.equal(again.means.cluster_sums, found.means.cluster_sums)
    with pytest.raises(MismatchError, match="made with"):
        LatentDiff.load(tmp_path / "diff", random_dictionary(seed=9))
    with pytest.raises(MissingPathError, match="not a saved diff"):
        LatentDiff.load(tmp_path)
    with pytest.raises(InputError, match="exists"):
        found.save(tmp_path / "diff")
    drawn = found.plot(highlight=2)
    assert sum(len(trace.x) for trace in drawn.data) > 0
    shown = found._repr_html_()
    assert SITE in shown and found.validity.gate in shown


def test_what_does_not_belong_together_is_refused(
    pair: ModelPair, texts: list[Rendered], clusters: list[str]
) -> None:
    with pytest.raises(MismatchError, match="11 conversations and 3"):
        diff(pair, random_dictionary(), texts, clusters[:3])
    with pytest.raises(MismatchError, match="same architecture"):
        diff(pair, random_dictionary(), texts, benign=[_wider()])
    with pytest.raises(InputError, match="are the same dictionary"):
        diff(pair, [random_dictionary(), random_dictionary()], texts)
    with pytest.raises(InputError, match="no dictionary"):
        diff(pair, [], texts)
    with pytest.raises(InputError, match="nothing to read"):
        diff(pair, random_dictionary(), [])
    with pytest.raises(UnknownSiteError):
        diff(pair, random_dictionary(site="blocks.7.hook_resid_post"), texts)


def test_a_broken_model_is_named(base: LanguageModel, texts: list[Rendered]) -> None:
    from copy import deepcopy
    from dataclasses import replace

    hf = deepcopy(base.hf)
    with torch.no_grad():
        hf.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(torch.nan)
    broken = replace(base, hf=hf, adapter_name="broken")
    with pytest.raises(NonFiniteError, match="broken"):
        diff(ModelPair(base, broken), random_dictionary(), texts)


def _wider() -> LanguageModel:
    from dataclasses import replace

    from transformers import AutoModelForCausalLM, LlamaConfig

    base = model_of("llama")
    config = LlamaConfig(**{**base.hf.config.to_dict(), "hidden_size": 64})
    return replace(base, hf=AutoModelForCausalLM.from_config(config).eval())
