"""Shards: fixed by the data, whole clusters, written and read back bit for bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing.readers import key_of
from persona_probe.diffing.shards import Counted, cut, pack, read_shard, unpack
from persona_probe.model import ModelPair
from persona_probe.model.chat import Rendered
from tests.diffing.conftest import random_dictionary


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.sampled_from("abcdef")), min_size=1, max_size=20),
    tokens=st.integers(1, 40),
)
def test_a_shard_holds_whole_clusters(lengths: list[tuple[int, str]], tokens: int) -> None:
    data = [Rendered((5,) * n, (False,) * n, n) for n, _ in lengths]
    names = [name for _, name in lengths]
    shards = cut(data, names, tokens)
    assert sorted(i for shard in shards for i in shard.indices) == list(range(len(data)))
    for shard in shards:
        assert {names[i] for i in shard.indices}.isdisjoint(
            names[i] for other in shards if other is not shard for i in other.indices
        )
        numbers = dict(zip((names[i] for i in shard.indices), shard.clusters, strict=True))
        assert [numbers[names[i]] for i in shard.indices] == list(shard.clusters)
        assert set(shard.clusters) == set(range(len(numbers)))
        assert list(shard.conversations(data)) == [data[i] for i in shard.indices]
    assert all(sum(len(data[i]) for i in shard.indices) >= tokens for shard in shards[:-1])


def test_what_is_packed_is_unpacked_bit_for_bit(pair: ModelPair, texts: list[Rendered]) -> None:
    shard = cut(texts, None, 1000)[0]
    sae = random_dictionary()
    read = read_shard([pair.base, pair.tuned], [sae], texts, shard, TokenMask("all"))
    again = unpack(pack(read))
    assert pack(again) == pack(read)
    assert torch.equal(again.conversations, read.conversations)
    assert (again.tokens, again.sinks, again.change) == (read.tokens, read.sinks, read.change)
    whole = sum(map(len, texts))
    assert again.counted == read.counted == Counted(11, whole - 5, special=5)
    for key, sums in read.sums.items():
        for name, tensor in sums.tensors():
            assert torch.equal(getattr(again.sums[key], name), tensor), name


def test_one_after_the_other_leaves_what_together_leaves(pair: ModelPair, texts: list[Rendered]) -> None:
    """The same batches, so the same bits; only how far single tokens moved is not known."""
    shard = cut(texts, None, 1000)[0]
    dictionary = random_dictionary()
    sae = [dictionary]
    both = read_shard([pair.base, pair.tuned], sae, texts, shard)
    first = read_shard([pair.base], sae, texts, shard)
    second = read_shard([pair.tuned], sae, texts, shard, leave_out=first.sinks)
    assert first.change == {} and both.change.keys() == {key_of(dictionary)}
    each = [*first.of(dictionary), *second.of(dictionary)]
    for together, alone in zip(both.of(dictionary), each, strict=True):
        for name, tensor in together.tensors():
            assert torch.equal(tensor, getattr(alone, name)), name


def test_a_shard_in_which_nothing_counts_is_empty(pair: ModelPair) -> None:
    data = [Rendered((5, 6, 7), (False,) * 3, 3)]
    (shard,) = cut(data, None, 1000)
    read = read_shard([pair.base], [random_dictionary()], data, shard, TokenMask("response"))
    assert read.tokens == 0 and read.conversations.tolist() == [0]
    assert not len(read.of(random_dictionary())[0].latent)
