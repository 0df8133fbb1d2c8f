"""Sums that merge: however they are split, the same bits."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing import statistics as module
from persona_probe.diffing.means import mean_difference, site_means
from persona_probe.diffing.statistics import (
    LatentSums,
    MeanSums,
    cluster_mean,
    number_clusters,
)
from persona_probe.errors import InputError, MismatchError, UnknownSiteError
from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from persona_probe.sae.encode import SparseCodes
from tests.diffing import reference

N, D_SAE, MODELS = 9, 7, 3
CLUSTERS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 2, 1])


def sparse(dense: Tensor) -> SparseCodes:
    token, latent = dense.nonzero(as_tuple=True)
    return SparseCodes(token, latent, dense[token, latent], tuple(dense.shape))  # type: ignore[arg-type]


def drawn(seed: int = 0) -> list[Tensor]:
    """Per conversation: model x token x latent activations, most of them 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (N,), generator=generator).tolist()
    codes = [torch.randn(MODELS, n, D_SAE, generator=generator) for n in lengths]
    return [each.relu() * (torch.rand(each.shape, generator=generator) < 0.5) for each in codes]


def summed(codes: list[Tensor], names: list[int]) -> LatentSums:
    sums = LatentSums(MODELS, D_SAE)
    if names:
        document = torch.cat([torch.full((codes[i].shape[1],), i) for i in names])
        dense = torch.cat([codes[i] for i in names], dim=1)
        sums.add(document, [sparse(each) for each in dense])
    return sums


def dense_of(sums: LatentSums) -> tuple[Tensor, Tensor]:
    blocks = list(sums.blocks(CLUSTERS, 4))
    return (
        torch.cat([block.activation for block in blocks], dim=2),
        torch.cat([block.fires for block in blocks], dim=2),
    )


def test_cluster_sums_are_sums_of_conversation_means() -> None:
    codes = drawn()
    activation, fires = dense_of(summed(codes, list(range(N))))
    for model in range(MODELS):
        for cluster in range(4):
            for latent in range(D_SAE):
                own = [codes[i][model, :, latent] for i in range(N) if CLUSTERS[i] == cluster]
                total = sum(fmean(each.double().tolist()) for each in own)
                assert float(activation[model, cluster, latent]) == pytest.approx(total, abs=1e-12)
                share = sum(fmean((each > 0).double().tolist()) for each in own)
                assert float(fires[model, cluster, latent]) == pytest.approx(share, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_and_any_order_of_merging_give_the_same_bits(data: st.DataObject) -> None:
    codes = drawn(data.draw(st.integers(0, 3)))
    order = data.draw(st.permutations(range(N)))
    cuts = sorted(data.draw(st.lists(st.integers(0, N), max_size=4)))
    edges = [0, *cuts, N]
    shards = [summed(codes, list(order[a:b])) for a, b in pairwise(edges)]
    merged = LatentSums(MODELS, D_SAE)
    for shard in data.draw(st.permutations(shards)):
        merged.merge(shard)
    whole = summed(codes, list(range(N)))
    for ours, theirs in zip(dense_of(merged), dense_of(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(merged.maximum, whole.maximum)
    assert merged.tokens == whole.tokens


def test_blocks_of_latents_cover_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = summed(drawn(), list(range(N)))
    whole = dense_of(sums)
    monkeypatch.setattr(module, "BLOCK", 3)
    assert [block.start for block in sums.blocks(CLUSTERS, 4)] == [0, 3, 6]
    for ours, theirs in zip(dense_of(sums), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_the_maximum_is_over_tokens() -> None:
    codes = drawn()
    expected = torch.cat(codes, dim=1).max(dim=1).values
    assert torch.equal(summed(codes, list(range(N))).maximum, expected)


def test_nothing_is_counted_twice() -> None:
    codes = drawn()
    sums = summed(codes, [0, 1])
    with pytest.raises(MismatchError, match="conversation 1 was counted twice"):
        sums.merge(summed(codes, [1, 2]))
    with pytest.raises(MismatchError, match="3 models and 7 latents"):
        summed(codes, [0]).merge(LatentSums(2, D_SAE))
    with pytest.raises(InputError, match="codes of 3 models, got 1"):
        sums.add(torch.tensor([5]), [sparse(codes[5][0, :1])])


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcd")), min_size=2, max_size=12).filter(
        lambda rows: len({c for _, c in rows}) > 1
    )
)
def test_the_clustered_error_is_the_reference(values: list[tuple[float, str]]) -> None:
    numbers, names = number_clusters([c for _, c in values])
    sums = torch.zeros(len(names), 1, dtype=torch.float64)
    sums.index_add_(0, numbers, torch.tensor([[v] for v, _ in values], dtype=torch.float64))
    found = cluster_mean(sums, numbers.bincount())
    mean, error = reference.clustered([v for v, _ in values], [c for _, c in values])
    assert float(found.mean) == pytest.approx(mean, abs=1e-9)
    assert float(found.error) == pytest.approx(error, abs=1e-9)


def test_with_a_conversation_each_it_is_the_usual_standard_error() -> None:
    values = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = cluster_mean(values, torch.ones(30, dtype=torch.long))
    torch.testing.assert_close(found.error, values.std(dim=0) / 30**0.5)


def test_repeating_the_conversations_of_a_question_adds_no_certainty() -> None:
    values = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = cluster_mean(values, torch.ones(8, dtype=torch.long))
    ten = cluster_mean(10 * values, torch.full((8,), 10))
    torch.testing.assert_close(once.mean, ten.mean)
    torch.testing.assert_close(once.error, ten.error)


def test_clusters_without_conversations_do_not_count() -> None:
    values = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)
    found = cluster_mean(values, torch.tensor([1, 0, 1]))
    assert float(found.mean) == 2.0 and float(found.error) == pytest.approx(1.0)
    assert cluster_mean(values[:1], torch.tensor([1])).error.isnan().all()


def test_means_are_over_tokens_then_conversations_and_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(2, n, 5, generator=generator) for n in (1, 4, 2, 3)]
    clusters = torch.tensor([0, 1, 0, 1])

    def sums(names: list[int]) -> MeanSums:
        found = MeanSums(2, 2, 5)
        document = torch.cat([torch.full((texts[i].shape[1],), i) for i in names])
        found.add(document, clusters, list(torch.cat([texts[i] for i in names], dim=1)))
        return found

    found = site_means("blocks.0.hook_resid_post", sums([0, 1, 2, 3]))
    expected = torch.stack([each.double().mean(dim=1) for each in texts]).mean(dim=0)
    torch.testing.assert_close(found.mean, expected)
    everything = torch.cat(texts, dim=1).double()
    torch.testing.assert_close(found.residual_rms, everything.square().mean(dim=(1, 2)).sqrt())
    merged = site_means("blocks.0.hook_resid_post", sums([0, 2]).merge(sums([3, 1])))
    torch.testing.assert_close(merged.mean, found.mean)
    unit = torch.eye(5, dtype=torch.float64)[2]
    shift, error = found.projected_shift(unit)
    values = [float(each[1, :, 2].double().mean() - each[0, :, 2].double().mean()) for each in texts]
    assert (shift, error) == pytest.approx(reference.clustered(values, ["0", "1", "0", "1"]))


def test_mean_difference_reads_the_models(
    pair: ModelPair, texts: list[Rendered], clusters: list[str]
) -> None:
    sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    found = mean_difference([pair.base, pair.tuned], texts, clusters, sites, batch_tokens=24)
    assert list(found) == sites
    for block, site in enumerate(sites):
        for i, model in enumerate((pair.base, pair.tuned)):
            means = [
                reference.activations(model, text, block)[reference.counted(text, model.special_ids)].mean(
                    dim=0
                )
                for text in texts
            ]
            expected = torch.stack(means).mean(dim=0)
            torch.testing.assert_close(found[site].mean[i], expected, rtol=1e-4, atol=1e-5)
        shift = found[site].mean[1] - found[site].mean[0]
        assert torch.equal(found[site].shift(), shift)


def test_mean_difference_refuses(base: LanguageModel, texts: list[Rendered]) -> None:
    with pytest.raises(InputError, match="no site"):
        mean_difference([base], texts)
    with pytest.raises(UnknownSiteError):
        mean_difference([base], texts, sites=["blocks.1.nowhere"])
    with pytest.raises(MismatchError, match="one each"):
        mean_difference([base], texts, ["a"], sites=["blocks.1.hook_resid_post"])
    only = mean_difference([base], texts, sites=["blocks.1.hook_resid_post"], mask=TokenMask("last_prompt"))
    assert only["blocks.1.hook_resid_post"].tokens == len(texts)
