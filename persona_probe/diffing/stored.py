"""A diff of what `capture` left on the disk: the dictionary alone is computed, no model is loaded.

    capture([base, tuned, *benign], documents, sites, TokenMask("answer"), out="activations")
    diff(ActivationStore.open("activations"), sae)

The store's first model is the base, its second the tuned one, the others are benign; its mask, and the
sinks it left out, are what they were when it was captured. In fp32 the figures are those of a diff that
reads the models, up to the rounding of another batch; in bf16 they are those of rounded activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch

from persona_probe.activations.store import ActivationStore
from persona_probe.activations.stream import Chunk, batch_tokens_for
from persona_probe.diffing.readers import Reader, site_of
from persona_probe.diffing.shards import Counted, ShardSums, add_up, pack
from persona_probe.errors import MismatchError, NonFiniteError
from persona_probe.execution import Worker
from persona_probe.sae.load import Dictionary


@dataclass(frozen=True)
class StoredConversation:
    """What a store holds of one conversation; its length is the tokens that count."""

    shard: int
    """Number of the store's shard that it lies in."""
    start: int
    """Its first row there."""
    tokens: int
    index: int
    """Of the conversation, in the store."""

    def __len__(self) -> int:
        return self.tokens


class StoredConversations(Sequence[StoredConversation]):
    """Every conversation of a store, in order."""

    def __init__(self, store: ActivationStore) -> None:
        self.store = store
        kept = [store.kept(number).numpy() for number in range(len(store.shards))]
        self.lengths = np.concatenate(kept)
        """Counted tokens of each conversation."""
        self._shard = np.repeat(np.arange(len(kept)), [len(each) for each in kept])
        self._start = np.concatenate([each.cumsum() - each for each in kept])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> StoredConversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredConversation]: ...
    def __getitem__(self, index: int | slice) -> StoredConversation | list[StoredConversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        return StoredConversation(int(self._shard[i]), int(self._start[i]), int(self.lengths[i]), i)


@dataclass(frozen=True)
class StoreOpening:
    """Opens a store in whatever process it is called; picklable."""

    path: Path
    readers: Sequence[Reader]

    def __call__(self) -> Worker:
        store = ActivationStore.open(self.path)
        return lambda text: pack(self.read(store, text.shard.clusters, text.conversations))

    def read(
        self, store: ActivationStore, clusters: Sequence[int], conversations: Sequence[StoredConversation]
    ) -> ShardSums:
        """The sums of all models over `conversations`, each of which is of the cluster given."""
        sites = list(dict.fromkeys(map(site_of, self.readers)))
        chunks = _chunks(store, sites, conversations)
        return add_up(chunks, len(store.models), store.d_model, self.readers, clusters)


def check_store(store: ActivationStore, dictionaries: Sequence[Dictionary]) -> None:
    """Raise `MismatchError` unless the store holds a pair of models at the sites of `dictionaries`, the
    first of them the one they were trained on where they record it.
    """
    if len(store.models) < 2:
        raise MismatchError(
            f"{store.path} holds activations of {', '.join(names_of(store))} alone; a diff needs two models",
            fix="capture both: persona-probe capture --base BASE --tuned TUNED",
        )
    for one in dictionaries:
        store.site_of(one.site)
        if one.d_model != store.d_model:
            raise MismatchError(
                f"{one.path} reads activations of width {one.d_model}, and {store.path} holds some of "
                f"width {store.d_model}",
                fix="use a dictionary trained on this model",
            )
        trained_on, stored = one.meta.get("model_digest"), store.models[0]
        if trained_on is not None and stored.weights is not None and trained_on != stored.weights:
            raise MismatchError(
                f"{one.path} was trained on another model than {store.path} holds: on weights with the "
                f"digest {trained_on}, and {stored.name} has {stored.weights}",
                fix="use a dictionary trained on this base model, or capture the one it was trained on",
            )


def _chunks(
    store: ActivationStore, sites: Sequence[str], conversations: Sequence[StoredConversation]
) -> Iterator[Chunk]:
    """Whole conversations, as many at a time as a model would read."""
    size = batch_tokens_for(torch.device("cpu"))
    batch: list[int] = []
    held = 0
    for number, one in enumerate(conversations):
        if batch and held + len(one) > size:
            yield _chunk(store, sites, conversations, batch)
            batch, held = [], 0
        if len(one):
            batch.append(number)
            held += len(one)
    if batch:
        yield _chunk(store, sites, conversations, batch)


def _chunk(
    store: ActivationStore,
    sites: Sequence[str],
    conversations: Sequence[StoredConversation],
    batch: Sequence[int],
) -> Chunk:
    shards = {number: store.shard(number) for number in sorted({conversations[i].shard for i in batch})}
    rows = {i: slice(one.start, one.start + one.tokens) for i in batch for one in [conversations[i]]}
    activations = {
        (model, site): torch.cat(
            [shards[conversations[i].shard].activations[model, site][rows[i]].float() for i in batch]
        )
        for model in range(len(store.models))
        for site in sites
    }
    positions = torch.cat([shards[conversations[i].shard].position[rows[i]] for i in batch])
    documents = torch.tensor(batch).repeat_interleave(torch.tensor([len(conversations[i]) for i in batch]))
    for (model, site), x in activations.items():
        if not torch.isfinite(x).all():
            token = int((~torch.isfinite(x).all(dim=-1)).nonzero()[0])
            index = conversations[int(documents[token])].index
            raise NonFiniteError(
                f"{store.path}: {store.models[model].name} has a NaN or an infinity at {site}, "
                f"conversation {index}, token {int(positions[token])}"
            )
    return Chunk(documents, positions, activations, sinks=0)


def left_out_of(store: ActivationStore) -> Counted:
    """The tokens that its capture left out, which no shard's sums know of."""
    its = store.counts
    return Counted(special=its.special, bos=its.bos, skipped=its.skipped, sinks=its.sinks)


def names_of(store: ActivationStore) -> tuple[str, ...]:
    """Its models' names: base, tuned, benign ones."""
    return tuple(model.name for model in store.models)
