"""What is kept of a stream is what a look at everything at once would keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.errors import InputError
from persona_probe.interpretation.examples import N_PLACES, Examples, by_quantile, edges, priority

LATENTS = 2


def corpus(seed: int, n: int) -> list[torch.Tensor]:
    """Documents of 1 to 9 tokens, activations token x latent, half of them silent."""
    rng = torch.Generator().manual_seed(seed)
    documents = []
    for _ in range(n):
        length = int(torch.randint(1, 10, (1,), generator=rng))
        values = torch.randn(length, LATENTS, generator=rng).relu()
        documents.append(values * (torch.rand(LATENTS, generator=rng) < 0.6))
    return documents


def read(documents: list[torch.Tensor], numbers: list[int], size: int = 3) -> Examples:
    kept = Examples(LATENTS, top=size, sampled=size)
    if numbers:
        document = torch.cat([torch.full((len(documents[i]),), i) for i in numbers])
        position = torch.cat([torch.arange(len(documents[i])) for i in numbers])
        kept.add(document, position, torch.cat([documents[i] for i in numbers]))
    return kept


def same(one: Examples, other: Examples) -> None:
    for name in ("tokens", "documents"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("fires", "documents_fired", "histogram", "places", "fires_by_place"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("top", "firing", "silent"):
        for mine, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            assert [r.document for r in mine.readings()] == [r.document for r in theirs.readings()]


@pytest.mark.parametrize("size", [{"top": -1}, {"top": 0}, {"sampled": 0}])
def test_nothing_to_keep_is_refused(size: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1 document, got"):
        Examples(LATENTS, **size)


@given(seed=st.integers(0, 999), n=st.integers(1, 25), data=st.data())
def test_however_it_is_cut_and_merged_the_same_is_kept(seed: int, n: int, data: st.DataObject) -> None:
    documents = corpus(seed, n)
    order = data.draw(st.permutations(range(n)))
    cut = data.draw(st.integers(0, n))
    whole = read(documents, list(range(n)))
    same(read(documents, order[:cut]).merge(read(documents, order[cut:])), whole)


@given(seed=st.integers(0, 999), n=st.integers(1, 25))
def test_it_is_what_a_look_at_everything_keeps(seed: int, n: int) -> None:
    documents = corpus(seed, n)
    kept = read(documents, list(range(n)))
    for latent in range(LATENTS):
        maxima = {i: float(values[:, latent].max()) for i, values in enumerate(documents)}
        fired = [i for i in maxima if maxima[i] > 0]
        silent = [i for i in maxima if maxima[i] == 0]
        assert [r.document for r in kept.top[latent].readings()] == sorted(
            fired, key=lambda i: (-maxima[i], i)
        )[:3]
        for sample, among in ((kept.firing, fired), (kept.silent, silent)):
            expected = sorted(among, key=lambda i: priority(i, 0))[:3]
            assert [r.document for r in sample[latent].readings()] == expected
        flat = torch.cat([values[:, latent] for values in documents]).numpy()
        assert kept.fires[latent] == (flat > 0).sum() == kept.histogram[latent].sum()
        np.testing.assert_array_equal(
            np.histogram(flat[flat > 0], edges())[0][1:-1], kept.histogram[latent][1:-1]
        )
        places = [int(np.log2(p + 1)) for values in documents for p in range(len(values))]
        np.testing.assert_array_equal(np.bincount(places, minlength=N_PLACES), kept.places)
        for reading in kept.top[latent].readings():
            np.testing.assert_array_equal(reading.values, documents[reading.document][:, latent].numpy())


def test_priorities_are_uniform_and_differ_between_seeds() -> None:
    drawn = np.array([priority(i, 0) for i in range(4000)])
    assert abs(drawn.mean() - 0.5) < 0.02 and abs((drawn < 0.1).mean() - 0.1) < 0.02
    other = np.array([priority(i, 1) for i in range(4000)])
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.05


def test_quantiles_run_from_the_weakest_to_the_strongest() -> None:
    documents = [torch.full((1, LATENTS), float(i + 1)) for i in range(20)]
    readings = read(documents, list(range(20)), size=20).firing[0].readings()
    runs = by_quantile(readings, quantiles=5, per_quantile=2)
    assert [[r.maximum for r in run] for run in runs] == [[4 * i + 1, 4 * i + 3] for i in range(5)]
    assert by_quantile([], 2, 2) == [[], []]
