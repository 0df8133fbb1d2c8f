"""Shards of a job: fixed by the data, read by any process, written as one file each.

A shard is a run of whole clusters of about `SHARD_BATCHES` batches. Which conversations it holds depends
on the data alone, and what is added up over it on those, so that shards merged in their order give the
same bits whoever read them. Conversations are token ids, which models read, or what a store holds of them
(`persona_probe.diffing.stored`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Sized
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from safetensors.torch import load, save
from torch import Tensor

from persona_probe.activations.documents import place_of
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import Chunk, batch_tokens_for, joined, stream
from persona_probe.diffing.cluster_sums import ClusterSums, Counting
from persona_probe.diffing.readers import Reader, key_of, site_of
from persona_probe.diffing.statistics import number_clusters
from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel

SHARD_BATCHES = 16
"""A shard is of so many batches: enough to sort by length, few enough that its sums are small."""

ENCODED_TOGETHER = 1024
"""Tokens that are encoded together, at least, as long as there are so many."""

Places = dict[int, list[int]]
"""Positions of tokens, by conversation."""

Read = TypeVar("Read", bound=Sized)
"""A conversation, in whatever form; its length is its tokens."""


@dataclass(frozen=True)
class Shard:
    """Which conversations are read together."""

    number: int
    indices: range | tuple[int, ...]
    """Of the conversations in the data."""
    clusters: tuple[int, ...]
    """Of each conversation, numbered within the shard."""

    def conversations(self, data: Sequence[Read]) -> Sequence[Read]:
        """Its conversations, read now."""
        if isinstance(self.indices, range):
            return data[self.indices.start : self.indices.stop]
        return [data[i] for i in self.indices]

    def names(self, data: Sequence[Sized]) -> list[str]:
        """How to name its conversations to a user: by file and line where they have one."""
        return [place_of(data, i) for i in self.indices]


def cut(data: Sequence[Sized], clusters: Sequence[str] | None, tokens: int) -> list[Shard]:
    """Shards of whole clusters, each of at least `tokens` tokens but the last.

    `clusters` names each conversation's question; by default each is its own. Conversations of a
    cluster need not stand together; the shard of a cluster is where its first one falls.
    Raises `MismatchError` when there are more or fewer names than conversations, `InputError`
    without any.
    """
    if not len(data):
        raise InputError("nothing to read: give at least one conversation")
    lengths = lengths_of(data)
    if clusters is None:
        members: Sequence[Sequence[int]] = [range(i, i + 1) for i in range(len(data))]
    else:
        if len(clusters) != len(data):
            raise MismatchError(
                f"{len(data)} conversations and {len(clusters)} cluster names: one each is needed"
            )
        numbers, names = number_clusters(clusters)
        grouped: list[list[int]] = [[] for _ in names]
        for i, number in enumerate(numbers.tolist()):
            grouped[number].append(i)
        members = grouped
    shards: list[Shard] = []
    held: list[tuple[int, int]] = []
    count = 0
    for cluster, its in enumerate(members):
        held += [(i, cluster) for i in its]
        count += sum(lengths[i] for i in its)
        if count >= tokens:
            shards.append(_shard(len(shards), held))
            held, count = [], 0
    return [*shards, _shard(len(shards), held)] if held else shards


def lengths_of(data: Sequence[Sized]) -> list[int]:
    """Tokens of each conversation, without reading any where the data know them."""
    known: Any = getattr(data, "lengths", None)  # of data that is longer than memory
    return [len(one) for one in data] if known is None else known.tolist()


def shard_tokens(device: torch.device, batch_tokens: int | None = None) -> int:
    """How many tokens a shard holds, at least."""
    return SHARD_BATCHES * batch_tokens_for(device, batch_tokens)


@dataclass(frozen=True)
class Counted:
    """What went into a result, and what was left out of it."""

    conversations: int = 0
    """With a counted token."""
    tokens: int = 0
    """That count: under the mask, neither special nor sinks."""
    special: int = 0
    """Tokens in the place that the mask names, left out as special."""
    bos: int = 0
    """Of those, how many are BOS."""
    skipped: int = 0
    """Tokens left out by the mask's `first_k` and `skip_first`."""
    sinks: int = 0
    """Tokens left out because of their norm."""

    def __add__(self, more: Counted) -> Counted:
        return Counted(*(a + b for a, b in zip(astuple(self), astuple(more), strict=True)))


@dataclass(frozen=True, eq=False)
class ShardSums:
    """What a group of models, read together, left of one shard."""

    conversations: Int[Tensor, " cluster"]
    """With a counted token, by cluster."""
    tokens: int
    sinks: Places
    """Tokens left out because of their norm in the base."""
    sums: dict[tuple[int, str], ClusterSums]
    """By number of the model in the group, and key of the reader."""
    change: dict[str, tuple[float, float]]
    """For the first two models, by reader: sum over tokens of the squared length of how far the
    activation moved, and of how far what the dictionary leaves unexplained moved.
    """
    left_out: Counted = Counted()
    """Tokens that the mask left out; none where they were left out before, as from a store."""

    @property
    def counted(self) -> Counted:
        """Conversations and tokens that count, and tokens that were left out."""
        sinks = sum(map(len, self.sinks.values()))
        return self.left_out + Counted(int(self.conversations.sum()), self.tokens, sinks=sinks)

    def of(self, reader: Reader) -> list[ClusterSums]:
        """Every model's sums of one reader."""
        return [sums for (_, key), sums in self.sums.items() if key == key_of(reader)]


def read_shard(
    models: Sequence[LanguageModel],
    readers: Sequence[Reader],
    conversations: Sequence[Rendered],
    shard: Shard,
    mask: TokenMask | None = None,
    *,
    batch_tokens: int | None = None,
    leave_out: Places | None = None,
) -> ShardSums:
    """Read one shard with every model, in one pass for all readers.

    `leave_out` are the sinks of a pass with the base, for models that are read without it. A shard
    in which no token counts comes to empty sums. Raises what `stream` raises.
    """
    mask = mask or TokenMask("answer")
    special, bos = models[0].special_ids, models[0].tokenizer.bos_token_id
    accounts = [mask.account(one, special, bos) for one in conversations]
    sites = [site_of(reader) for reader in readers]
    chunks = (
        stream(models, conversations, sites, mask, batch_tokens=batch_tokens, leave_out=leave_out)
        if any(any(its.chosen) for its in accounts)
        else ()
    )
    sums = add_up(chunks, len(models), models[0].d_model, readers, shard.clusters, leave_out)
    left_out = (Counted(special=its.special, bos=its.bos, skipped=its.skipped) for its in accounts)
    return replace(sums, left_out=sum(left_out, Counted()))


@torch.no_grad()
def add_up(
    chunks: Iterable[Chunk],
    n_models: int,
    d_model: int,
    readers: Sequence[Reader],
    clusters: Sequence[int],
    leave_out: Places | None = None,
) -> ShardSums:
    """The sums over `chunks`, in which conversations are numbered as in `clusters`, the cluster of each."""
    numbers = torch.tensor(clusters)
    counting = {
        (i, key_of(reader)): Counting(None if isinstance(reader, str) else reader, d_model, numbers)
        for i in range(n_models)
        for reader in readers
    }
    counted = torch.zeros(len(numbers), dtype=torch.long)
    sinks: Places = dict(leave_out or {})
    moved = {key_of(reader): [0.0, 0.0] for reader in readers}
    for chunk in joined(chunks, ENCODED_TOGETHER):
        counted += chunk.document.bincount(minlength=len(numbers))
        for document, position in chunk.sink_tokens:
            sinks.setdefault(document, []).append(position)
        for reader in readers:
            key, site = key_of(reader), site_of(reader)
            device = torch.device("cpu") if isinstance(reader, str) else reader.W_enc.device
            read = [chunk.activations[i, site].to(device) for i in range(n_models)]
            errors = [counting[i, key].add(chunk.document, h) for i, h in enumerate(read)]
            if len(read) > 1:
                moved[key][0] += float((read[1].double() - read[0].double()).square().sum())
                if errors[0] is not None and errors[1] is not None:
                    # the difference of the reconstruction errors: b_dec cancels
                    moved[key][1] += float((errors[1] - errors[0]).square().sum())
    used = numbers[counted > 0].bincount(minlength=int(numbers.max()) + 1)
    return ShardSums(
        conversations=used,
        tokens=int(counted.sum()),
        sinks=sinks,
        sums={key: its.sums() for key, its in counting.items()},
        change={key: (a, b) for key, (a, b) in moved.items()} if n_models > 1 else {},
    )


def named(error: NonFiniteError, names: Sequence[str]) -> NonFiniteError:
    """The error with the conversation's own name in it, not its number in the shard."""
    if error.conversation is None:
        return error
    said = error.message.replace(f"conversation {error.conversation}", names[error.conversation])
    return NonFiniteError(said, fix=error.fix, command=error.command)


def pack(read: ShardSums) -> bytes:
    """A shard's result as the bytes of a safetensors file."""
    tensors = {"conversations": read.conversations}
    for (model, key), sums in read.sums.items():
        tensors |= {f"{model}|{name}|{key}": tensor.contiguous() for name, tensor in sums.tensors()}
    facts = {
        "tokens": read.tokens,
        "left_out": astuple(read.left_out),
        "sinks": list(read.sinks.items()),
        "change": read.change,
    }
    return save(tensors, {"facts": json.dumps(facts)})


def unpack(data: bytes) -> ShardSums:
    """What `pack` packed, bit for bit."""
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = json.loads(header["__metadata__"]["facts"])
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name != "conversations":
            model, field, key = name.split("|", 2)
            parts.setdefault((int(model), key), {})[field] = tensor
    return ShardSums(
        conversations=tensors["conversations"],
        tokens=facts["tokens"],
        sinks={document: positions for document, positions in facts["sinks"]},
        sums={key: ClusterSums(**parts[key]) for key in sorted(parts)},
        change={key: (a, b) for key, (a, b) in facts["change"].items()},
        left_out=Counted(*facts["left_out"]),
    )


def _shard(number: int, held: Sequence[tuple[int, int]]) -> Shard:
    """Conversations in the order of the data; clusters numbered by first appearance."""
    held = sorted(held)
    place = {cluster: i for i, cluster in enumerate(dict.fromkeys(cluster for _, cluster in held))}
    indices = tuple(i for i, _ in held)
    run = range(indices[0], indices[-1] + 1)
    return Shard(
        number,
        run if len(run) == len(indices) else indices,
        tuple(place[cluster] for _, cluster in held),
    )
