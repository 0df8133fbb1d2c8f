"""Rank latents by how far a fine-tune moved them.

Wang et al. 2025 ("Persona features control emergent misalignment", section 3): mean latent
activation after fine-tuning minus before, on the same token ids. Each conversation is a prompt with
an answer (by convention the base model's own greedy one: `answers` records whose); counted are the
last prompt token, which produces the first word of the answer, and the answer. Mean over tokens,
then over conversations.

Departures: an interval from questions, and benign fine-tunes as the null. Without them the shift is
    described and not tested, because every fine-tune moves a large part of all latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing.latent_diff import LatentDiff, Missing
from persona_probe.diffing.shards import ShardSums, cut, named, read_shard, shard_tokens
from persona_probe.diffing.tally import Tally
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.sae.load import Dictionary, check_fits
from persona_probe.sae.validity import Limits

Answers = Literal["base", "tuned", "both", "none"]


@overload
def diff(
    pair: ModelPair,
    dictionary: Dictionary,
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentDiff: ...


@overload
def diff(
    pair: ModelPair,
    dictionary: Sequence[Dictionary],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LatentDiff]: ...


def diff(
    pair: ModelPair,
    dictionary: Dictionary | Sequence[Dictionary],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LatentDiff | dict[str, LatentDiff]:
    """Compare the latents of `pair` (and of `benign` fine-tunes of the same base) on `rendered`
    conversations.

    Args:
        dictionary: one, or several of different sites: all are read in one pass, and a dict by site
            is returned.
        rendered: prompts with answers; every model reads these ids.
        clusters: the question each conversation belongs to (each its own, by default): the sampling
            unit.
        benign: two or more make q-values; one gives a difference in differences without.
        answers: whose answers these are. Recorded; sets with different answers may rank
            differently.
        mask: which tokens count; by default the last prompt token and the answer.
        confidence: of `low` and `high`.
        limits: where the dictionary's gate closes.
        batch_tokens: padded tokens per forward pass; by default what suits the device.
        progress: called with the conversations read and to read.

    Raises:
        MismatchError: models, dictionary and conversations that do not belong together.
        UnknownSiteError: a dictionary's site is not in the models.
        InputError: nothing to read, or two dictionaries of one site.
        NonFiniteError: a NaN or infinity in an activation.
    """
    dictionaries = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    models = (pair.base, pair.tuned, *benign)
    _check(pair, dictionaries, benign)
    mask = mask or TokenMask("answer")
    on_device = {one.site: one.to(pair.base.device) for one in dictionaries}
    found = Differences(dictionaries, models, answers, mask, confidence, limits)
    read = 0
    for shard in cut(rendered, clusters, shard_tokens(pair.base.device, batch_tokens)):
        texts = shard.conversations(rendered)
        try:
            found.add(read_shard(models, on_device, texts, shard, mask, batch_tokens=batch_tokens))
        except NonFiniteError as error:
            raise named(error, shard.names(rendered)) from error
        read += len(texts)
        if progress is not None:
            progress(read, len(rendered))
    every = found.results()
    return every[dictionary.site] if isinstance(dictionary, Dictionary) else every


class Differences:
    """Diffs at every site, as shards come in (in their order)."""

    def __init__(
        self,
        dictionaries: Sequence[Dictionary],
        models: Sequence[LanguageModel] | Sequence[str],
        answers: str,
        mask: TokenMask,
        confidence: float = 0.95,
        limits: Limits | None = None,
    ) -> None:
        self._dictionaries = dictionaries
        self._models = tuple(one if isinstance(one, str) else one.name for one in models)
        self._answers = answers
        self._mask = mask
        self._confidence = confidence
        self._limits = limits
        self._tallies = {one.site: Tally(len(models), one) for one in dictionaries}
        self._sinks = 0

    def add(self, *groups: ShardSums) -> None:
        """Take in one shard: of all models together, or of groups that were read one after another."""
        first = groups[0]
        self._sinks += sum(map(len, first.sinks.values()))
        for site, tally in self._tallies.items():
            read = [sums for group in groups for sums in group.of(site)]
            tally.add(read, first.conversations, first.tokens, first.change.get(site))

    def results(self, missing: Sequence[Missing] = ()) -> dict[str, LatentDiff]:
        """The diff at each site. Raises `InputError` where no token at all was counted."""
        return {one.site: self._result(one, self._tallies[one.site], missing) for one in self._dictionaries}

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
            sinks=self._sinks,
            missing=tuple(missing),
        )


def _check(pair: ModelPair, dictionaries: Sequence[Dictionary], benign: Sequence[LanguageModel]) -> None:
    if not dictionaries:
        raise InputError("no dictionary given", fix="without one, use mean_difference")
    for model in benign:
        ModelPair(pair.base, model)
    seen: dict[str, str] = {}
    for one in dictionaries:
        if one.site in seen:
            raise InputError(
                f"two dictionaries read {one.site}: {seen[one.site]} and {one.path}",
                fix="compare them in two calls",
            )
        seen[one.site] = one.path
        check_fits(one, pair.base)  # it was trained on the base; the others have other weights
