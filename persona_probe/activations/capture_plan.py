"""What a capture will do, settled before the first forward pass; and one shard of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from persona_probe.activations.documents import Conversations, Documents, conversations_of, place_of
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.shard import Shard
from persona_probe.activations.store import KIND, Counts, StoredModel, StoredType
from persona_probe.activations.stream import Chunk, batch_tokens_for, stream
from persona_probe.activations.survey import SHARD_BYTES, Survey, shard_bounds, survey
from persona_probe.artifact import digest_of
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.hooks.sites import check_site
from persona_probe.model.chat import Rendered
from persona_probe.model.chat_template import Message
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair, check_same_shape, check_same_vocabulary

Data = Documents | Sequence[Rendered] | Sequence[str] | Sequence[Sequence[Message]]
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, eq=False)
class CapturePlan:
    """Everything that is known about a capture before it begins. Made by `plan_capture`."""

    models: tuple[LanguageModel, ...]
    conversations: Sequence[Rendered]
    sites: tuple[str, ...]
    mask: TokenMask
    dtype: StoredType
    batch_tokens: int
    sink_factor: float | None
    shard_tokens: int
    survey: Survey
    bounds: tuple[tuple[int, int], ...]
    """The conversations of each shard, from and up to."""

    @property
    def bytes(self) -> int:
        """On the disk (or in memory), at most: sinks are not known yet."""
        per_token = len(self.models) * len(self.sites) * self.models[0].d_model * _BYTES[self.dtype] + 24
        per_conversation = 8 + 8 * len(self.models) * len(self.sites)
        headers = 4096 * (1 + len(self.bounds))
        return (
            int(self.survey.selected.sum()) * per_token + len(self.conversations) * per_conversation + headers
        )

    @cached_property
    def stored_models(self) -> tuple[StoredModel, ...]:
        """Names and digests; computed when first asked for, because it reads every weight file."""
        return tuple(
            StoredModel(lm.name, lm.checkpoint.digest, lm.checkpoint.weights_digest) for lm in self.models
        )

    def settings(self) -> dict[str, Any]:
        """What decides the bits of the result."""
        return {
            "kind": KIND,
            "models": [model.name for model in self.stored_models],
            "checkpoints": [model.digest for model in self.stored_models],
            "sites": self.sites,
            "mask": asdict(self.mask),
            "dtype": self.dtype,
            "weights_dtype": [str(lm.dtype).removeprefix("torch.") for lm in self.models],
            "batch_tokens": self.batch_tokens,
            "sink_factor": self.sink_factor,
            "shard_tokens": self.shard_tokens,
            "data": self.survey.digest,
        }

    @cached_property
    def digest(self) -> str:
        """`"sha256:..."` of the settings."""
        return digest_of(self.settings())

    def counts(self, counted: int) -> Counts:
        """The account of all tokens, `counted` of which were kept."""
        found = self.survey
        covered, special, selected = (int(x.sum()) for x in (found.covered, found.special, found.selected))
        return Counts(
            conversations=len(found.tokens),
            tokens=int(found.tokens.sum()),
            covered=covered,
            special=special,
            bos=found.bos,
            skipped=covered - special - selected,
            sinks=selected - counted,
            counted=counted,
        )

    @property
    def source(self) -> str:
        """Where the conversations come from."""
        conversations = self.conversations
        return conversations.documents.name if isinstance(conversations, Conversations) else "memory"

    def compute(self, number: int) -> Shard:
        """Read the conversations of one shard with every model."""
        first, last = self.bounds[number]
        texts = self.conversations[first:last]
        parts: list[Chunk] = []
        try:
            if self.survey.selected[first:last].any():
                parts = list(
                    stream(
                        self.models, texts, self.sites, self.mask,
                        batch_tokens=self.batch_tokens, sink_factor=self.sink_factor,
                    )
                )  # fmt: skip
        except NonFiniteError as error:
            if error.conversation is None:
                raise
            place = place_of(self.conversations, first + error.conversation)
            named = error.message.replace(f"conversation {error.conversation}", place)
            raise NonFiniteError(named, fix=error.fix) from error
        return _in_order(parts, texts, first, self)


def plan_capture(
    models: LanguageModel | ModelPair | Sequence[LanguageModel],
    data: Data,
    sites: Sequence[str],
    mask: TokenMask | None = None,
    *,
    dtype: StoredType = "float32",
    batch_tokens: int | None = None,
    sink_factor: float | None = 10.0,
    shard_tokens: int | None = None,
) -> CapturePlan:
    """What `capture` would do, without a forward pass. Takes and raises what it does."""
    if dtype not in get_args(StoredType):
        raise InputError(f"activations are kept as {' or '.join(get_args(StoredType))}, not {dtype!r}")
    several = _models(models)
    names = tuple(dict.fromkeys(sites))
    if not names:
        raise InputError("no site to read", fix='name one, such as "blocks.1.hook_resid_post"')
    for lm in several:
        for name in names:
            check_site(lm.hf, name)
    conversations = conversations_of(several[0], data)
    for lm in several[1:]:
        check_same_shape(several[0], lm)
        if isinstance(conversations, Conversations):
            conversations.check_same_ids(lm)
        check_same_vocabulary(several[0], lm)
    mask = mask or TokenMask("all")
    counted = survey(several[0], conversations, mask)
    per_token = several[0].d_model * _BYTES[dtype] * len(several) * len(names)
    shard_tokens = shard_tokens or max(1024, SHARD_BYTES // per_token)
    return CapturePlan(
        models=several,
        conversations=conversations,
        sites=names,
        mask=mask,
        dtype=dtype,
        batch_tokens=batch_tokens_for(several[0].device, batch_tokens),
        sink_factor=sink_factor,
        shard_tokens=shard_tokens,
        survey=counted,
        bounds=tuple(shard_bounds(counted.selected, shard_tokens)),
    )


def _in_order(parts: Sequence[Chunk], texts: Sequence[Rendered], first: int, plan: CapturePlan) -> Shard:
    """The batches of a shard as one, by conversation and position."""
    documents = torch.cat([part.document for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
    order = documents.argsort(stable=True)
    documents = documents[order]
    if parts:
        positions = torch.cat([part.position for part in parts])[order]
    else:
        positions = torch.zeros(0, dtype=torch.long)
    ids = [texts[d].ids[p] for d, p in zip(documents.tolist(), positions.tolist(), strict=True)]
    kept = documents.bincount(minlength=len(texts))
    activations: dict[tuple[int, str], Tensor] = {}
    norm = torch.full((len(plan.models), len(plan.sites), len(texts)), torch.nan, dtype=torch.float64)
    for index in range(len(plan.models)):
        for place, site in enumerate(plan.sites):
            read = [part.activations[index, site].cpu() for part in parts]
            whole = torch.cat(read)[order] if read else torch.zeros(0, plan.models[index].d_model)
            sums = torch.zeros(len(texts), dtype=torch.float64)
            sums.index_add_(0, documents, whole.norm(dim=-1).double())
            norm[index, place] = torch.where(kept > 0, sums / kept, torch.nan)
            activations[index, site] = whole.to(getattr(torch, plan.dtype))
    return Shard(
        first=first,
        document=documents + first,
        position=positions,
        token=torch.tensor(ids, dtype=torch.long),
        activations=activations,
        kept=kept,
        norm=norm,
    )


def _models(
    models: LanguageModel | ModelPair | Sequence[LanguageModel],
) -> tuple[LanguageModel, ...]:
    if isinstance(models, LanguageModel):
        return (models,)
    several = (models.base, models.tuned) if isinstance(models, ModelPair) else tuple(models)
    if not several:
        raise InputError("no model to read with")
    names = [lm.name for lm in several]
    return tuple(
        lm if names.count(lm.name) == 1 else replace(lm, adapter_name=f"{lm.name} ({i})")
        for i, lm in enumerate(several)
    )
