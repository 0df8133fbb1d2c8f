"""Rank latents by how far a fine-tune moved them.

Wang et al. 2025 ("Persona features control emergent misalignment", section 3): mean latent
activation after fine-tuning minus before, on the same token ids. Each conversation is a prompt with
an answer (by convention the base model's own greedy one: `answers` records whose); counted are the
last prompt token, which produces the first word of the answer, and the answer. Mean over tokens,
then over conversations.

Departures: an interval from questions, and benign fine-tunes as the null. Without them the shift is
    described and not tested, because every fine-tune moves a large part of all latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, overload

import torch

from persona_probe.activations.capture_plan import Data
from persona_probe.activations.documents import conversations_of
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.store import ActivationStore
from persona_probe.diffing.latent_diff import LatentDiff, Missing
from persona_probe.diffing.readers import by_name, key_of, placed
from persona_probe.diffing.shards import Counted, Shard, ShardSums, cut, named, read_shard, shard_tokens
from persona_probe.diffing.stored import StoredConversations, StoreOpening, check_store, left_out_of, names_of
from persona_probe.diffing.tally import Tally
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.sae.load import Dictionary, check_fits
from persona_probe.sae.validity import Limits

Answers = Literal["base", "tuned", "both", "none"]


@overload
def diff(
    models: ModelPair | ActivationStore,
    dictionary: Dictionary,
    data: Data | None = None,
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    sae_device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentDiff: ...


@overload
def diff(
    models: ModelPair | ActivationStore,
    dictionary: Sequence[Dictionary],
    data: Data | None = None,
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    sae_device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LatentDiff]: ...


def diff(
    models: ModelPair | ActivationStore,
    dictionary: Dictionary | Sequence[Dictionary],
    data: Data | None = None,
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    sae_device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentDiff | dict[str, LatentDiff]:
    """Compare the latents of a pair (and of `benign` fine-tunes of the same base) on conversations.

    Args:
        models: a pair, which reads `data`; or a store of a pair's activations, which were read before.
        dictionary: one, or several: all are read in one pass, and a dict by site is returned (by site and
            folder, where several are of one site: see `readers`).
        data: prompts with answers; every model reads the base's token ids. Already rendered, or
            documents (`read_documents`), texts or chats.
        clusters: the question each conversation belongs to (each its own, by default): the sampling
            unit.
        benign: two or more make q-values; one gives a difference in differences without. A store has
            its own: every model but the first two.
        answers: whose answers these are. Recorded; sets with different answers may rank
            differently.
        mask: which tokens count; by default the last prompt token and the answer. A store has its own.
        confidence: of `low` and `high`.
        limits: where the dictionary's gate closes.
        batch_tokens: padded tokens per forward pass; by default what suits the device.
        sae_device: where dictionaries encode; by default where the base is.
        progress: called with the conversations read and to read.

    Raises:
        MismatchError: models (or a store), dictionary and conversations that do not belong together.
        UnknownSiteError: a dictionary's site is not in the models.
        InputError: nothing to read, or one dictionary twice.
        NonFiniteError: a NaN or infinity in an activation.
    """
    dictionaries = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    named = by_name(dictionaries)
    if isinstance(models, ActivationStore):
        if data is not None or benign or mask not in (None, models.mask):
            raise InputError(
                f"{models.path} was captured with its own data, benign tunes and mask ({models.mask.kind})",
                fix="give the store and the dictionary alone, or capture it anew",
            )
        job = _of_store(models, dictionaries, clusters, sae_device)
        found = Differences(
            named, job.names, "data", job.mask, confidence, limits, left_out=left_out_of(models)
        )
    else:
        if data is None:
            raise InputError("no conversations to read", fix="diff(pair, dictionary, conversations)")
        job = _of_pair(models, dictionaries, data, clusters, benign, mask, batch_tokens, sae_device)
        found = Differences(named, job.names, answers, job.mask, confidence, limits)
    read, total = 0, sum(len(shard.clusters) for shard in job.shards)
    for shard in job.shards:
        found.add(job.read(shard))
        read += len(shard.clusters)
        if progress is not None:
            progress(read, total)
    every = found.results()
    return every[dictionary.site] if isinstance(dictionary, Dictionary) else every


class _Job(NamedTuple):
    """What is read, shard by shard."""

    names: tuple[str, ...]
    mask: TokenMask
    shards: Sequence[Shard]
    read: Callable[[Shard], ShardSums]


def _of_pair(
    pair: ModelPair,
    dictionaries: Sequence[Dictionary],
    data: Data,
    clusters: Sequence[str] | None,
    benign: Sequence[LanguageModel],
    mask: TokenMask | None,
    batch_tokens: int | None,
    sae_device: str | None,
) -> _Job:
    models = (pair.base, pair.tuned, *benign)
    for model in benign:
        ModelPair(pair.base, model)
    for one in dictionaries:
        check_fits(one, pair.base)  # it was trained on the base; the others have other weights
    rendered = conversations_of(pair.base, data)
    there = placed(dictionaries, sae_device or pair.base.device)
    mask = mask or TokenMask("answer")

    def read(shard: Shard) -> ShardSums:
        texts = shard.conversations(rendered)
        try:
            return read_shard(models, there, texts, shard, mask, batch_tokens=batch_tokens)
        except NonFiniteError as error:
            raise named(error, shard.names(rendered)) from error

    shards = cut(rendered, clusters, shard_tokens(pair.base.device, batch_tokens))
    return _Job(tuple(model.name for model in models), mask, shards, read)


def _of_store(
    store: ActivationStore,
    dictionaries: Sequence[Dictionary],
    clusters: Sequence[str] | None,
    sae_device: str | None,
) -> _Job:
    check_store(store, dictionaries)
    conversations = StoredConversations(store)
    opening = StoreOpening(store.path, placed(dictionaries, sae_device or "cpu"))

    def read(shard: Shard) -> ShardSums:
        return opening.read(store, shard.clusters, shard.conversations(conversations))

    shards = cut(conversations, clusters, shard_tokens(torch.device("cpu")))
    return _Job(names_of(store), store.mask, shards, read)


class Differences:
    """Diffs of every dictionary, as shards come in (in their order)."""

    def __init__(
        self,
        dictionaries: Mapping[str, Dictionary],
        models: Sequence[str],
        answers: str,
        mask: TokenMask,
        confidence: float = 0.95,
        limits: Limits | None = None,
        *,
        left_out: Counted | None = None,
    ) -> None:
        """`dictionaries` by name (see `readers`); `left_out` has the tokens left out before any is added."""
        self._dictionaries = dictionaries
        self._models = tuple(models)
        self._answers = answers
        self._mask = mask
        self._confidence = confidence
        self._limits = limits
        self._tallies = {name: Tally(len(models), one) for name, one in dictionaries.items()}
        self._counted = left_out or Counted()

    def add(self, *groups: ShardSums) -> None:
        """Take in one shard: of all models together, or of groups that were read one after another."""
        first = groups[0]
        self._counted += first.counted
        for name, tally in self._tallies.items():
            one = self._dictionaries[name]
            read = [sums for group in groups for sums in group.of(one)]
            tally.add(read, first.conversations, first.tokens, first.change.get(key_of(one)))

    def results(self, missing: Sequence[Missing] = ()) -> dict[str, LatentDiff]:
        """Each dictionary's diff. Raises `InputError` where no token at all was counted."""
        return {
            name: self._result(one, self._tallies[name], missing) for name, one in self._dictionaries.items()
        }

    def _result(self, dictionary: Dictionary, tally: Tally, missing: Sequence[Missing]) -> LatentDiff:
        if not tally.tokens:
            raise InputError(
                f"the mask {self._mask.kind!r} leaves no token of any conversation",
                fix="give conversations with an assistant turn, or choose another mask",
            )
        return LatentDiff(
            table=tally.table(self._confidence),
            dictionary=dictionary,
            validity=tally.validity(self._limits),
            means=tally.means(),
            models=self._models,
            answers=self._answers,
            mask=self._mask,
            confidence=self._confidence,
            conversations=tally.conversations,
            clusters=tally.clusters,
            tokens=tally.tokens,
            special=self._counted.special,
            bos=self._counted.bos,
            skipped=self._counted.skipped,
            sinks=self._counted.sinks,
            missing=tuple(missing),
        )
