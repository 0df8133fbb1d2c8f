"""Interpret latents: one pass over a corpus, and a look at the weights.

The corpus is never held: what is kept are exact counts and small samples that do not depend on the
order of the documents (`examples`, `reader`). Only the latents asked for are encoded, except on one
document in sixteen, where the whole dictionary is, to see what fires together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from persona_probe.activations.documents import Conversations, Documents, conversations_of, place_of
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.errors import InputError
from persona_probe.interpretation.examples import Reading, by_quantile, edges
from persona_probe.interpretation.interpretation import Interpretation, Shown
from persona_probe.interpretation.lexicon import lexicon, strong_above
from persona_probe.interpretation.logit_lens import logit_lens, nearest
from persona_probe.interpretation.reader import Corpus, Reader
from persona_probe.interpretation.words import tokens_of, words_of
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.encode import encode
from persona_probe.sae.load import Dictionary, Latent
from persona_probe.sae.validity import check_reads

HELD_OUT = 60
"""Documents kept for scoring an explanation."""
LOOKED_AT = 40
"""Documents on which a latent that does not fire is compared with those that do."""

Data = Documents | Sequence[Rendered] | Sequence[str | Sequence[Any]]


def interpret(lm: LanguageModel, latent: Latent, data: Data, **options: Any) -> Interpretation:
    """What one latent fires on in `data`, read with `lm`; `options` and errors as `interpret_all`."""
    return interpret_all(lm, [latent], data, **options)[0]


def interpret_all(
    lm: LanguageModel,
    latents: Sequence[Latent],
    data: Data,
    *,
    by: Sequence[str] = (),
    labels: Sequence[Mapping[str, str]] | None = None,
    mask: TokenMask | None = None,
    top: int = 20,
    sampled: int = 400,
    quantiles: int = 5,
    per_quantile: int = 3,
    seed: int = 0,
    silent: Literal["error", "leave out"] = "error",
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Interpretation, ...]:
    """What `latents` (of one dictionary or several) fire on, in one pass over `data`.

    Args:
        data: documents (`read_documents`), texts, chats, or rendered conversations.
        by: fields of the documents' rows by which to group them: *where does the latent come from?*
        labels: the same for data in memory: one mapping per conversation.
        mask: which tokens count; by default all that are not special.
        top: strongest documents kept per latent.
        sampled: documents in each uniform sample, of those that fire and of those that do not.
        quantiles: into how many runs of equal size the sample is shown; `per_quantile` of each.
        seed: of the samples.
        silent: what becomes of a latent that never fires.
        progress: called with the documents read and to read.

    Raises:
        InputError: a latent never fires (named, with the nearest that does), or nothing to read.
        MismatchError: the dictionary is of another width, or labels do not match the documents.
    """
    if not latents:
        raise InputError("name at least one latent")
    corpus = Corpus(conversations_of(lm, data), labels, by)
    wanted: dict[str, tuple[Dictionary, list[int]]] = {}
    for latent in latents:
        check_reads(latent.sae, lm)
        _, indices = wanted.setdefault(latent.sae.digest, (latent.sae.to(lm.device), []))
        if latent.index not in indices:
            indices.append(latent.index)
    readers = {
        digest: Reader(dictionary, indices, top=top, sampled=sampled, seed=seed)
        for digest, (dictionary, indices) in wanted.items()
    }
    sites = [dictionary.site for dictionary, _ in wanted.values()]
    mask, done = mask or TokenMask("all"), 0
    for chunk, given in corpus.chunks(lm, sites, mask, batch_tokens):
        for reader in readers.values():
            reader.add(chunk, given)
        done += len(given)
        if progress is not None:
            progress(done, len(corpus))
    found: list[Interpretation] = []
    for latent in latents:
        reader = readers[latent.sae.digest]
        if reader.fires(latent.index):
            found.append(_result(lm, latent, reader, corpus, quantiles, per_quantile))
        elif silent == "error":
            raise _silent(lm, latent, reader, corpus.conversations, mask)
    return tuple(found)


def _result(
    lm: LanguageModel, latent: Latent, reader: Reader, corpus: Corpus, quantiles: int, per_quantile: int
) -> Interpretation:
    i, kept, conversations = reader.indices.index(latent.index), reader.examples, corpus.conversations

    def shown(reading: Reading) -> Shown:
        place = place_of(conversations, reading.document)
        tokens = tokens_of(lm, conversations[reading.document], reading)
        return Shown(reading.document, place, reading.maximum, tuple(tokens))

    firing, silent = kept.firing[i].readings(), kept.silent[i].readings()
    top, chosen = kept.top[i].readings(), by_quantile(firing, quantiles, per_quantile)
    told = {reading.document for run in (top, *chosen) for reading in run}
    worded = [
        (reading.document, words_of(tokens_of(lm, conversations[reading.document], reading)))
        for reading in (*firing, *silent)
    ]
    reading = conversations.reading if isinstance(conversations, Conversations) else None
    return Interpretation(
        latent=latent,
        model=lm.name,
        documents=kept.documents,
        documents_fired=int(kept.documents_fired[i]),
        tokens=kept.tokens,
        fires=int(kept.fires[i]),
        top=tuple(map(shown, top)),
        quantiles=tuple(tuple(map(shown, run)) for run in chosen),
        histogram=_histogram(kept.histogram[i]),
        places=_places(kept.places, kept.fires_by_place[i]),
        sources=reader.sources.table(i),
        lens=logit_lens(lm, reader.dictionary.W_dec[latent.index]),
        neighbours=nearest(reader.dictionary, latent.index),
        together=reader.together(i),
        lexicon=lexicon(worded, seed=kept.seed),
        held_out=tuple(map(shown, _held_out((*firing, *silent), told))),
        left_out=reading.bad if reading else 0,
        problems=tuple(map(str, reading.problems)) if reading else (),
        unlabelled=dict(corpus.unlabelled),
    )


@torch.no_grad()
def _silent(
    lm: LanguageModel, latent: Latent, reader: Reader, conversations: Sequence[Rendered], mask: TokenMask
) -> InputError:
    """The error that names the latent most like this one among those that fire on these documents."""
    dictionary, kept = reader.dictionary, reader.examples
    silent = kept.silent[reader.indices.index(latent.index)].readings()[:LOOKED_AT]
    fires = torch.zeros(dictionary.d_sae, dtype=torch.bool)
    looked_at = [conversations[reading.document] for reading in silent]
    for chunk in stream([lm], looked_at, [dictionary.site], mask):
        fires[encode(dictionary, chunk.activations[0, dictionary.site]).latent_index.cpu()] = True
    like = nearest(dictionary, latent.index, dictionary.d_sae - 1)
    alive = like.filter(pl.Series(fires[like["index"].to_list()].tolist()))
    fix = None
    if len(alive):
        first = alive.row(0, named=True)
        fix = f"the nearest that does: {first['index']} (cosine {first['cosine']:.2f}); or more documents"
    read = f"{kept.tokens:,} tokens of {kept.documents:,} documents"
    return InputError(f"latent {latent.index} of {latent.sae.path} never fires on these {read}", fix=fix)


def _held_out(readings: Sequence[Reading], told: Collection[int]) -> list[Reading]:
    """As many strong documents as others, of those not yet told of; `readings` are uniform samples."""
    above = strong_above(np.array([reading.maximum for reading in readings]))
    left = [reading for reading in readings if reading.document not in told]
    strong = [reading for reading in left if reading.maximum > above]
    # evenly over the corpus: some on which it fires weakly, some on which it is silent
    rest = sorted((reading for reading in left if reading.maximum <= above), key=lambda one: one.document)
    n = min(HELD_OUT // 2, len(strong), len(rest))
    return [*strong[:n], *rest[:: max(1, len(rest) // max(1, n))][:n]]


def _histogram(counts: np.ndarray) -> pl.DataFrame:
    bounds, used = edges(), np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1]) + 1
    return pl.DataFrame(
        {"low": bounds[first:last], "high": bounds[first + 1 : last + 1], "tokens": counts[first:last]}
    )


def _places(tokens: np.ndarray, fires: np.ndarray) -> pl.DataFrame:
    used = np.flatnonzero(tokens)
    return pl.DataFrame(
        {
            "first": 2**used - 1,
            "last": 2 ** (used + 1) - 2,
            "tokens": tokens[used],
            "rate": fires[used] / tokens[used],
        }
    )
