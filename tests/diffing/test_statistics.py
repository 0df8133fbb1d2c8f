"""Sums that merge: however they are split, the same bits; and the estimates made of them."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing import means as means_module
from persona_probe.diffing.cluster_sums import ClusterSums, Counting
from persona_probe.diffing.means import MeanSums, mean_difference
from persona_probe.diffing.moments import Moments
from persona_probe.diffing.statistics import cluster_mean, number_clusters
from persona_probe.errors import InputError, MismatchError, UnknownSiteError
from persona_probe.model import LanguageModel, ModelPair
from persona_probe.model.chat import Rendered
from persona_probe.sae.encode import encode_dense
from tests.diffing import reference
from tests.diffing.conftest import random_dictionary

N, MODELS = 9, 3
CLUSTERS = [0, 1, 0, 2, 1, 3, 0, 2, 1]
SAE = random_dictionary()


def drawn(seed: int = 0) -> list[Tensor]:
    """Per conversation: model x token x d_model activations."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (N,), generator=generator).tolist()
    return [torch.randn(MODELS, n, 32, generator=generator) for n in lengths]


def counted(texts: list[Tensor], model: int, names: list[int], batches: list[list[int]]) -> ClusterSums:
    """The conversations `names` as a shard; `batches` (of places in it) are read one after another."""
    place = {c: i for i, c in enumerate(dict.fromkeys(CLUSTERS[name] for name in names))}
    counting = Counting(SAE, 32, torch.tensor([place[CLUSTERS[name]] for name in names]))
    for batch in batches:
        document = torch.cat([torch.full((texts[names[i]].shape[1],), i) for i in batch])
        counting.add(document, torch.cat([texts[names[i]][model] for i in batch]))
    return counting.sums()


def whole(texts: list[Tensor], model: int) -> ClusterSums:
    return counted(texts, model, list(range(N)), [list(range(N))])


def moments(texts: list[Tensor], shards: list[list[int]]) -> Moments:
    found = Moments(MODELS, SAE.d_sae)
    for names in shards:
        read = [counted(texts, model, names, [list(range(len(names)))]) for model in range(MODELS)]
        sizes = [CLUSTERS[name] for name in names]
        found.add(read, torch.tensor([sizes.count(cluster) for cluster in dict.fromkeys(sizes)]))
    return found


def codes_of(texts: list[Tensor], model: int) -> list[Tensor]:
    return [encode_dense(SAE, each[model]).double() for each in texts]


def test_cluster_sums_are_sums_of_conversation_means() -> None:
    texts = drawn()
    for model in range(MODELS):
        sums = whole(texts, model)
        codes = codes_of(texts, model)
        dense = torch.zeros(2, 4, SAE.d_sae, dtype=torch.float64)
        dense[0, sums.cluster, sums.latent] = sums.activation
        dense[1, sums.cluster, sums.latent] = sums.fires
        for cluster in range(4):
            own = [i for i in range(N) if CLUSTERS[i] == cluster]
            for latent in range(SAE.d_sae):
                total = sum(fmean(codes[i][:, latent].tolist()) for i in own)
                share = sum(fmean((codes[i][:, latent] > 0).double().tolist()) for i in own)
                # the dense encoding rounds its fp32 products in another order
                assert float(dense[0, cluster, latent]) == pytest.approx(total, abs=1e-6)
                assert float(dense[1, cluster, latent]) == pytest.approx(share, abs=1e-12)
            mean = sum(texts[i][model].double().mean(dim=0) for i in own)
            torch.testing.assert_close(sums.mean[cluster], mean)
        joined = torch.cat(codes)
        torch.testing.assert_close(sums.maximum.double(), joined.max(dim=0).values, atol=1e-6, rtol=1e-6)
        assert torch.equal(sums.fired, (joined > 0).sum(dim=0))
        torch.testing.assert_close(sums.token_sum, torch.cat([t[model] for t in texts]).double().sum(dim=0))


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(N)), cut=st.integers(1, N - 1))
def test_the_order_of_batches_leaves_the_same_bits(order: list[int], cut: int) -> None:
    """A conversation's entries are added up in the order of conversations, not of batches."""
    texts = drawn()
    once = whole(texts, 0)
    again = counted(texts, 0, list(range(N)), [order[:cut], order[cut:]])
    assert torch.equal(once.cluster, again.cluster) and torch.equal(once.latent, again.latent)
    torch.testing.assert_close(once.activation, again.activation, rtol=1e-6, atol=1e-7)
    assert torch.equal(once.fires, again.fires)
    assert torch.equal(once.mean, again.mean)


def test_moments_give_the_clustered_mean_and_error() -> None:
    texts = drawn()
    found = moments(texts, [[0, 2, 6, 1, 4, 8], [3, 7, 5]])
    codes = [codes_of(texts, model) for model in range(MODELS)]
    names = [str(cluster) for cluster in CLUSTERS]
    for latent in range(SAE.d_sae):
        levels = [[fmean(one[:, latent].tolist()) for one in its] for its in codes]
        shift = [[b - a for a, b in zip(levels[0], level, strict=True)] for level in levels]
        did = [a - b for a, b in zip(shift[1], shift[2], strict=True)]
        for values, estimate in (
            (levels[0], found.level(0)), (levels[2], found.level(2)), (shift[1], found.shift(1)),
            (did, found.estimate([0.0, 1.0, -1.0])),
        ):  # fmt: skip
            expected = reference.clustered(values, names)
            got = float(estimate.mean[latent]), float(estimate.error[latent])
            assert got == pytest.approx(expected, abs=1e-6)
        everywhere = {
            c for c in range(4) for its in codes for i in range(N)
            if CLUSTERS[i] == c and bool((its[i][:, latent] > 0).any())
        }  # fmt: skip
        assert int(found.spread[latent]) == len(everywhere)
    assert found.clusters == 4 and found.conversations == N


def test_models_that_read_the_same_differ_by_exactly_nothing() -> None:
    same = [each[:1].expand(MODELS, -1, -1) for each in drawn()]
    found = moments(same, [[0, 2, 6, 1, 4, 8], [3, 7, 5]])
    for estimate in (found.shift(1), found.estimate([0.0, 1.0, -1.0])):
        assert (estimate.mean == 0).all() and (estimate.error == 0).all()


def test_moments_refuse_what_does_not_belong() -> None:
    found = Moments(2, SAE.d_sae)
    with pytest.raises(InputError, match="no conversation"):
        found.shift(1)
    with pytest.raises(MismatchError, match="2 models and 20 latents"):
        found.add([whole(drawn(), 0)], torch.ones(4, dtype=torch.long))


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


def test_means_are_over_tokens_then_conversations_and_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = drawn()
    sizes = torch.tensor([CLUSTERS.count(cluster) for cluster in range(4)])
    sums = MeanSums(MODELS, 32)
    sums.add([whole(texts, model) for model in range(MODELS)], sizes, sum(t.shape[1] for t in texts))
    found = sums.means("blocks.0.hook_resid_post")
    expected = torch.stack([each.double().mean(dim=1) for each in texts]).mean(dim=0)
    torch.testing.assert_close(found.mean, expected)
    everything = torch.cat(texts, dim=1).double()
    torch.testing.assert_close(found.residual_rms, everything.square().mean(dim=(1, 2)).sqrt())
    unit = torch.eye(32, dtype=torch.float64)[2]
    values = [float(each[1, :, 2].double().mean() - each[0, :, 2].double().mean()) for each in texts]
    expected_shift = reference.clustered(values, [str(c) for c in CLUSTERS])
    assert found.projected_shift(unit) == pytest.approx(expected_shift)

    monkeypatch.setattr(means_module, "GROUPS", 2)
    few = MeanSums(MODELS, 32)
    few.add([whole(texts, model) for model in range(MODELS)], sizes, sum(t.shape[1] for t in texts))
    grouped = few.means("blocks.0.hook_resid_post")
    torch.testing.assert_close(grouped.mean, found.mean)
    halves = reference.clustered(values, [str(c % 2) for c in CLUSTERS])
    assert grouped.projected_shift(unit) == pytest.approx(halves)


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
