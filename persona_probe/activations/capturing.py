"""Capture activations, in memory or as a store on disk.

    documents = read_documents("chats.jsonl")
    capture(lm, documents, ["blocks.12.hook_resid_post"], TokenMask("answer"), out="activations")

The conversations are read once, by every model with the same token ids, and cut into shards that
depend on the data and the settings alone. With `out`, a shard is on the disk as soon as it is done:
a capture that is killed loses the shard it was at, and run again gives the bits of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.activations.capture_plan import CapturePlan, Data, plan_capture
from persona_probe.activations.documents import Conversations, Reading, place_of
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.shard import Shard
from persona_probe.activations.store import ActivationStore, Counts, StoredModel, StoredType
from persona_probe.activations.stream import Chunk
from persona_probe.activations.writing import write_store
from persona_probe.artifact import StrPath
from persona_probe.errors import InputError
from persona_probe.execution import Share
from persona_probe.figures.norms import norms
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Capture:
    """Activations that were read, and the account of it."""

    table: pl.DataFrame = field(repr=False)
    """One row per conversation, model and site: where it comes from, its `tokens`, how many were
    `special` or `sinks`, how many `counted`, and the mean `norm` of those.
    """
    counts: Counts
    """The sums over all conversations."""
    models: tuple[StoredModel, ...]
    sites: tuple[str, ...]
    reading: Reading | None
    """What became of the documents (bad, too long), where documents were given."""
    store: ActivationStore | None
    """Where the activations are on the disk; None where they are in memory."""
    _plan: CapturePlan = field(repr=False)
    _shards: tuple[Shard, ...] = field(repr=False)

    def activations(self, model: int | str = 0, site: str | None = None) -> Float[Tensor, "token d_model"]:
        """Of all counted tokens, conversation after conversation. Reads the whole store, where it is one."""
        found = self._one(model, site)
        return torch.cat([shard.activations[found] for shard in self._each()])

    @cached_property
    def document(self) -> Int[Tensor, " token"]:
        """Index of the conversation of each counted token."""
        return torch.cat([shard.document for shard in self._each()])

    @cached_property
    def position(self) -> Int[Tensor, " token"]:
        """Index of each counted token in its conversation."""
        return torch.cat([shard.position for shard in self._each()])

    def chunks(self) -> Iterator[Chunk]:
        """Shard by shard, as `stream` yields batches."""
        return (shard.chunk() for shard in self._each() if len(shard))

    def plot(self) -> go.Figure:
        """Mean norms over conversations, by site and model: what differs much here differs in kind."""
        return norms(self.table)

    def save(self, out: StrPath) -> ActivationStore:
        """Write the activations (again) as a store. Raises `InputError` where `out` holds something else."""
        shards = list(self._each())
        return write_store(Path(out), self._plan, shards.__getitem__)

    def _one(self, model: int | str, site: str | None) -> tuple[int, str]:
        names = [each.name for each in self.models]
        index = names.index(model) if model in names else model
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise InputError(f"there is no model {model!r}; there is {', '.join(names)}")
        chosen = self.sites[0] if site is None and len(self.sites) == 1 else site
        if chosen is None or chosen not in self.sites:
            raise InputError(f"captured are {', '.join(self.sites)}" + (f", not {site}" if site else ""))
        return index, chosen

    def _each(self) -> Iterator[Shard]:
        if self.store is None:
            return iter(self._shards)
        return (self.store.shard(number) for number in range(len(self.store.shards)))


def capture(
    models: LanguageModel | ModelPair | Sequence[LanguageModel],
    data: Data,
    sites: Sequence[str],
    mask: TokenMask | None = None,
    *,
    out: StrPath | None = None,
    dtype: StoredType = "float32",
    batch_tokens: int | None = None,
    sink_factor: float | None = 10.0,
    shard_tokens: int | None = None,
    overwrite: bool = False,
    share: Share | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Capture:
    """Read `data` with `models` and keep the activations of the tokens that `mask` counts (all, by default).

    Args:
        models: one, a pair, or several of one shape and vocabulary; the first is the base, whose
            tokenizer and norms decide which tokens are special and which are sinks.
        data: documents (`read_documents`), texts, chats, or what is already rendered.
        sites: TransformerLens hook names; all are read in one pass, which ends behind the deepest.
        out: a folder for an `ActivationStore`; without it the activations stay in memory.
        dtype: in which they are kept. The models have a type of their own (`load_model`).
        batch_tokens: padded tokens per forward pass (see `stream.batch_tokens_for`).
        sink_factor: leave out tokens whose norm is so many times their document's median; None: none.
        shard_tokens: tokens of a shard; by default as many as make 256 MiB.
        overwrite: throw away what `out` holds.
        share: which shards to do, where several processes share `out`.
        progress: called with the tokens that are done and all of them.

    Raises:
        UnknownSiteError: a model does not have a site.
        MismatchError: models of another shape or tokenizer; the first difference is shown.
        InputError: nothing to read, a mask that leaves nothing, `out` holds something else.
        DiskFullError: the activations will not fit; nothing was written.
        NonFiniteError: a NaN or infinity, naming model, site and document.
        UnfinishedError: this share is done, and others have shards to do.
    """
    plan = plan_capture(
        models, data, sites, mask, dtype=dtype, batch_tokens=batch_tokens,
        sink_factor=sink_factor, shard_tokens=shard_tokens,
    )  # fmt: skip
    return run_capture(plan, out, overwrite=overwrite, share=share, progress=progress)


def run_capture(
    plan: CapturePlan,
    out: StrPath | None = None,
    *,
    overwrite: bool = False,
    share: Share | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Capture:
    """Do what was planned; see `capture`."""
    if share is not None and share.of > 1 and out is None:
        raise InputError("several processes capture to the disk", fix="give them the same out=")
    store: ActivationStore | None = None
    shards: tuple[Shard, ...] = ()
    done = None if progress is None else _in_tokens(plan, share or Share(), progress)
    if out is not None:
        store = write_store(Path(out), plan, plan.compute, overwrite=overwrite, share=share, progress=done)
        account = [store.shard(number) for number in range(len(plan.bounds))]
    else:
        for number in range(len(plan.bounds)):
            shards += (plan.compute(number),)
            if done is not None:
                done(number)
        account = shards
    conversations = plan.conversations
    return Capture(
        table=_table(plan, account),
        counts=plan.counts(sum(map(len, account))),
        models=plan.stored_models,
        sites=plan.sites,
        reading=conversations.reading if isinstance(conversations, Conversations) else None,
        store=store,
        _plan=plan,
        _shards=shards,
    )


def _in_tokens(
    plan: CapturePlan, share: Share, progress: Callable[[int, int], None]
) -> Callable[[int], None]:
    """What is told the number of each shard that is done, and tells the tokens done and to do."""
    sizes = [int(plan.survey.tokens[first:last].sum()) for first, last in plan.bounds]
    total = sum(size for number, size in enumerate(sizes) if number in share)
    read = 0

    def told(number: int) -> None:
        nonlocal read
        read += sizes[number]
        progress(read, total)

    return told


def _table(plan: CapturePlan, shards: Sequence[Shard]) -> pl.DataFrame:
    n = len(plan.conversations)
    kept = torch.cat([shard.kept for shard in shards]).numpy()
    norm = torch.cat([shard.norm for shard in shards], dim=-1)
    found = plan.survey
    shared = pl.DataFrame(
        {
            "conversation": range(n),
            "source": [place_of(plan.conversations, i) for i in range(n)],
            "tokens": found.tokens,
            "special": found.special,
            "sinks": found.selected - kept,
            "counted": kept,
        }
    )
    parts = [
        shared.with_columns(
            pl.lit(lm.name).alias("model"),
            pl.lit(site).alias("site"),
            pl.Series("norm", norm[index, place].numpy()).fill_nan(None),
        )
        for index, lm in enumerate(plan.models)
        for place, site in enumerate(plan.sites)
    ]
    return pl.concat(parts)
