"""Activations of one or several models on the same token ids, batch after batch, never all in memory.

Conversations are sorted by length, so that little is padded; which of them share a batch depends on
the data and `batch_tokens` alone. The forward pass ends behind the deepest site. Padding is on the
right, where no real token of a causal model sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_probe.activations.masks import TokenMask, sinks
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.hooks.capture import capture_at
from persona_probe.hooks.sites import check_site
from persona_probe.model.chat import Padded, Rendered, pad
from persona_probe.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class Chunk:
    """The counted tokens of a batch, or of several; tokens of a document are together and in order."""

    document: Int[Tensor, " token"]
    """Index of the conversation."""
    position: Int[Tensor, " token"]
    """Index of the token in the conversation, without padding."""
    activations: dict[tuple[int, str], Float[Tensor, "token d_model"]]
    """By index of the model and hook name; fp32 or wider."""
    sinks: int
    """Tokens left out because of their norm."""
    sink_tokens: tuple[tuple[int, int], ...] = ()
    """Their conversations and positions, so that another pass can leave out the same."""


def joined(chunks: Iterable[Chunk], tokens: int) -> Iterator[Chunk]:
    """Consecutive chunks put together until they hold at least so many tokens: little padding makes small
    batches, and an encoder that is read once for each of them is read too often.
    """
    held: list[Chunk] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(one.document) for one in held) >= tokens:
            together, held = _one(held), []
            yield together
    if held:
        yield _one(held)


def _one(chunks: Sequence[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        torch.cat([one.document for one in chunks]),
        torch.cat([one.position for one in chunks]),
        {key: torch.cat([one.activations[key] for one in chunks]) for key in chunks[0].activations},
        sum(one.sinks for one in chunks),
        tuple(token for one in chunks for token in one.sink_tokens),
    )


WASTE = 0.05
"""Most of a batch that may be padding, once the batch has a fair size."""


def batch_tokens_for(device: torch.device, asked: int | None = None) -> int:
    """Padded tokens per forward pass: as many as `asked` for, else as keep the device busy: on a CPU few,
    so that they stay in its cache. Raises `InputError` for less than one.
    """
    if asked is not None:
        if asked < 1:
            raise InputError(
                f"batch_tokens must be at least 1, got {asked}", fix="leave it out, or give more"
            )
        return asked
    return 1024 if device.type == "cpu" else 8192


def stream(
    models: Sequence[LanguageModel],
    conversations: Sequence[Rendered],
    sites: Sequence[str],
    mask: TokenMask,
    *,
    batch_tokens: int | None = None,
    sink_factor: float | None = 10.0,
    leave_out: Mapping[int, Sequence[int]] | None = None,
) -> Iterator[Chunk]:
    """Yield the activations of the counted tokens, every model on the same ids and the same tokens.

    Args:
        models: the first is the base: it decides which tokens are sinks, and its tokenizer which
            are special.
        batch_tokens: padded tokens per forward pass (see `batch_tokens_for`); a longer conversation
            is a batch by itself.
        sink_factor: leave out tokens whose norm in the base, at any of the sites, is more than so
            many times their document's median; None keeps them.
        leave_out: positions that do not count, by conversation: the sinks that an earlier pass with
            the base found, when the base is not among the models. No others are looked for.

    Every conversation with a counted token is in exactly one chunk. No gradient is kept.

    Raises:
        UnknownSiteError: a model does not have a site.
        InputError: no model, site, conversation or token to read.
        NonFiniteError: a NaN or infinity at a counted token, naming model, site and conversation.
    """
    if not models or not conversations:
        raise InputError("nothing to read: give at least one model and one conversation")
    names = list(dict.fromkeys(sites))
    if not names:
        raise InputError("no site to read", fix='name one, such as "blocks.1.hook_resid_post"')
    for model in models:
        for name in names:
            check_site(model.hf, name)
    special = models[0].special_ids
    chosen = [mask.select(conversation, special) for conversation in conversations]
    if not any(map(any, chosen)):
        raise InputError(
            f"the mask {mask.kind!r} leaves no token of any conversation",
            fix="give conversations with an assistant turn, or choose another mask",
        )
    for document, positions in (leave_out or {}).items():
        for position in positions:
            chosen[document][position] = False
    size = batch_tokens_for(models[0].device, batch_tokens)
    return _read(models, conversations, names, chosen, size, None if leave_out is not None else sink_factor)


def buckets(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that a group's padded size is at most `batch_tokens`, longest first.

    A group of at least a quarter of that is also closed where one more would make more than `WASTE`
    of it padding. Longest first, so that the largest allocation comes at the beginning. Depends on
    its arguments alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    real = 0
    for i in order:
        if groups:
            width, rows = lengths[groups[-1][0]], len(groups[-1])
            size = width * (rows + 1)
            wasteful = size - real - lengths[i] > WASTE * size and 4 * width * rows >= batch_tokens
            if size <= batch_tokens and not wasteful:
                groups[-1].append(i)
                real += lengths[i]
                continue
        groups.append([i])
        real = lengths[i]
    return groups


@torch.no_grad()
def _read(
    models: Sequence[LanguageModel],
    conversations: Sequence[Rendered],
    sites: Sequence[str],
    chosen: Sequence[Sequence[bool]],
    batch_tokens: int,
    sink_factor: float | None,
) -> Iterator[Chunk]:
    used = [i for i, marks in enumerate(chosen) if any(marks)]
    for group in buckets([len(conversations[i]) for i in used], batch_tokens):
        documents = [used[i] for i in group]
        batch = pad([conversations[i] for i in documents], models[0].pad_id, side="right")
        counted = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for row, document in enumerate(documents):
            counted[row, : len(chosen[document])] = torch.tensor(chosen[document])
        dropped: list[tuple[int, int]] = []
        activations: dict[tuple[int, str], Tensor] = {}
        for index, model in enumerate(models):
            read = _forward(model, batch, sites)
            if index == 0 and sink_factor is not None:
                loud = _loud(read, batch.attention_mask, sink_factor)
                dropped = [(documents[row], place) for row, place in (counted & loud).nonzero().tolist()]
                counted &= ~loud
            for site in sites:
                kept = read[site][counted.to(read[site].device)]
                kept = kept if kept.dtype == torch.float64 else kept.float()
                activations[index, site] = kept
                if not torch.isfinite(kept.sum()) and not torch.isfinite(kept).all():
                    raise _non_finite(kept, counted, documents, model, site)
        row, position = counted.nonzero(as_tuple=True)
        yield Chunk(torch.tensor(documents)[row], position, activations, len(dropped), tuple(dropped))


def _forward(model: LanguageModel, batch: Padded, sites: Sequence[str]) -> dict[str, Tensor]:
    ids, mask, positions = batch.to(model.device)
    with model.active() as hf, capture_at(hf, sites) as captured:
        captured.run(lambda: hf(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False))
        return dict(captured)


def _loud(
    read: dict[str, Tensor], attention_mask: Int[Tensor, "batch pos"], factor: float
) -> Bool[Tensor, "batch pos"]:
    loud = torch.zeros_like(attention_mask, dtype=torch.bool)
    for activation in read.values():
        norms = activation.float().norm(dim=-1).to(attention_mask.device)
        loud |= sinks(norms, attention_mask, factor)
    return loud


def _non_finite(
    kept: Tensor, counted: Tensor, documents: Sequence[int], model: LanguageModel, site: str
) -> NonFiniteError:
    token = int((~torch.isfinite(kept).all(dim=-1)).nonzero()[0])
    row, position = (int(i) for i in counted.nonzero()[token])
    error = NonFiniteError(
        f"{model.name} has a NaN or an infinity at {site}, conversation {documents[row]}, token {position}",
        fix="load the model in a wider type (dtype='float32'), or check its weights",
    )
    error.conversation = documents[row]
    return error
