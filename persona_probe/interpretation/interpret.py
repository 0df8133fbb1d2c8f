"""Interpret latents: one pass over a corpus, and a look at the weights.

The corpus is never held: what is kept are exact counts and small samples that do not depend on the
order of the documents (`examples`). Only the latents asked for are encoded, except on one document
in sixteen, where the whole dictionary is, to see what fires together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.activations.documents import Conversations, Documents, conversations_of, place_of
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import Chunk, stream
from persona_probe.errors import InputError, MismatchError
from persona_probe.interpretation.examples import Examples, Reading, by_quantile, edges, priority
from persona_probe.interpretation.interpretation import Interpretation, Shown
from persona_probe.interpretation.lexicon import lexicon, strong_above
from persona_probe.interpretation.logit_lens import logit_lens, nearest
from persona_probe.interpretation.sources import SourceSums, labels_of
from persona_probe.interpretation.words import tokens_of, words_of
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.encode import encode, encode_latents
from persona_probe.sae.load import Dictionary, Latent, check_fits

WHOLE_SHARE = 1 / 16
"""Of the documents, those on which the whole dictionary is encoded."""
TOGETHER = 10
HELD_OUT = 60
"""Documents kept for scoring an explanation."""

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
        progress: called with the documents read and to read.

    Raises:
        InputError: a latent never fires (named, with the nearest that does), or nothing to read.
        MismatchError: the dictionary is of another model, or labels do not match the documents.
    """
    if not latents:
        raise InputError("name at least one latent")
    conversations = conversations_of(lm, data)
    if labels is not None and len(labels) != len(conversations):
        raise MismatchError(f"{len(labels)} labels for {len(conversations)} conversations")
    readers: dict[str, _Reader] = {}
    for latent in latents:
        check_fits(latent.sae, lm)
        reader = readers.setdefault(latent.sae.digest, _Reader(latent.sae.to(lm.device), top, sampled, seed))
        reader.want(latent.index)
    for reader in readers.values():
        reader.begin()
    sites = [reader.dictionary.site for reader in readers.values()]
    done = 0
    for chunk in stream([lm], conversations, sites, mask or TokenMask("all"), batch_tokens=batch_tokens):
        numbers = chunk.document.unique().tolist()
        given = {number: _labels(conversations, labels, by, number) for number in numbers}
        for reader in readers.values():
            reader.add(chunk, given)
        done += len(numbers)
        if progress is not None:
            progress(done, len(conversations))
    return tuple(
        readers[latent.sae.digest].result(latent, lm, conversations, quantiles, per_quantile)
        for latent in latents
    )


def _labels(
    conversations: Sequence[Rendered],
    labels: Sequence[Mapping[str, str]] | None,
    by: Sequence[str],
    number: int,
) -> Mapping[str, str]:
    if labels is not None:
        return labels[number]
    if by and isinstance(conversations, Conversations):
        return labels_of(conversations.record(number), by)
    return {}


class _Reader:
    """Reads the latents asked for of one dictionary."""

    def __init__(self, dictionary: Dictionary, top: int, sampled: int, seed: int) -> None:
        self.dictionary = dictionary
        self.indices: list[int] = []
        self._sizes = {"top": top, "sampled": sampled, "seed": seed}

    def want(self, index: int) -> None:
        if index not in self.indices:
            self.indices.append(index)

    def begin(self) -> None:
        n = len(self.indices)
        self.examples = Examples(n, **self._sizes)
        self.sources = SourceSums(n)
        self._alive = torch.zeros(self.dictionary.d_sae, dtype=torch.long)
        self._joint = torch.zeros(n, self.dictionary.d_sae, dtype=torch.long)
        self._fired = torch.zeros(n, dtype=torch.long)
        self._tokens = 0

    def add(self, chunk: Chunk, labels: Mapping[int, Mapping[str, str]]) -> None:
        x = chunk.activations[0, self.dictionary.site]
        values = encode_latents(self.dictionary, x, self.indices)
        self.examples.add(chunk.document, chunk.position, values)
        self._group(chunk.document, values, labels)
        chosen = torch.tensor([priority(n, self._sizes["seed"] + 2) < WHOLE_SHARE for n in labels])
        numbers = torch.tensor(list(labels))[chosen]
        here = torch.isin(chunk.document, numbers).to(x.device)
        if here.any():
            self._whole(x[here], values[here])

    def _group(
        self,
        document: Int[Tensor, " token"],
        values: Float[Tensor, "token latent"],
        labels: Mapping[int, Mapping[str, str]],
    ) -> None:
        if not any(labels.values()):
            return
        numbers, row, counts = document.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(numbers), values.shape[1], dtype=torch.float64)
        sums.index_add_(0, row, values.double().cpu())
        for number, mean in zip(numbers.tolist(), (sums / counts[:, None]).numpy(), strict=True):
            self.sources.add(labels[number], mean)

    def _whole(self, x: Float[Tensor, "token d_model"], values: Float[Tensor, "token latent"]) -> None:
        codes = encode(self.dictionary, x)
        fired = values > 0
        n = self.dictionary.d_sae
        self._tokens += len(x)
        self._alive += codes.latent_index.bincount(minlength=n).cpu()
        self._fired += fired.sum(dim=0).cpu()
        for i in range(len(self.indices)):
            with_it = codes.latent_index[fired[codes.token_index, i]]
            self._joint[i] += with_it.bincount(minlength=n).cpu()

    def result(
        self,
        latent: Latent,
        lm: LanguageModel,
        conversations: Sequence[Rendered],
        quantiles: int,
        per_quantile: int,
    ) -> Interpretation:
        i, kept = self.indices.index(latent.index), self.examples
        if not kept.fires[i]:
            raise self._silent(latent)

        def shown(reading: Reading) -> Shown:
            conversation = conversations[reading.document]
            place = place_of(conversations, reading.document)
            return Shown(
                reading.document, place, reading.maximum, tuple(tokens_of(lm, conversation, reading))
            )

        firing, silent = kept.firing[i].readings(), kept.silent[i].readings()
        top, runs = kept.top[i].readings(), by_quantile(firing, quantiles, per_quantile)
        told = {reading.document for run in (top, *runs) for reading in run}
        worded = [
            (reading.document, words_of(tokens_of(lm, conversations[reading.document], reading)))
            for reading in (*firing, *silent)
        ]
        return Interpretation(
            latent=latent,
            model=lm.name,
            documents=kept.documents,
            documents_fired=int(kept.documents_fired[i]),
            tokens=kept.tokens,
            fires=int(kept.fires[i]),
            top=tuple(map(shown, top)),
            quantiles=tuple(tuple(map(shown, run)) for run in runs),
            histogram=_histogram(kept.histogram[i]),
            places=_places(kept.places, kept.fires_by_place[i]),
            sources=self.sources.table(i),
            lens=logit_lens(lm, self.dictionary.W_dec[latent.index]),
            neighbours=nearest(self.dictionary, latent.index),
            together=self._together(i),
            lexicon=lexicon(worded, seed=self._sizes["seed"]),
            held_out=tuple(map(shown, _held_out((*firing, *silent), told))),
        )

    def _together(self, i: int) -> pl.DataFrame:
        share = self._joint[i].double() / max(1, int(self._fired[i]))
        rate = self._alive.double() / max(1, self._tokens)
        share[self.indices[i]] = 0.0
        order = share.argsort(descending=True, stable=True)[:TOGETHER]
        order = order[share[order] > 0]
        return pl.DataFrame(
            {
                "index": order.tolist(),
                "share": share[order].tolist(),
                "lift": (share[order] / rate[order]).tolist(),
            },
            schema={"index": pl.Int64, "share": pl.Float64, "lift": pl.Float64},
        )

    def _silent(self, latent: Latent) -> InputError:
        like = nearest(self.dictionary, latent.index, self.dictionary.d_sae - 1)
        alive = like.filter(pl.Series(self._alive[like["index"].to_list()].tolist()) > 0)
        fix = None
        if len(alive):
            first = alive.row(0, named=True)
            fix = f"the nearest that does: {first['index']} (cosine {first['cosine']:.2f}); or more documents"
        read = f"{self.examples.tokens:,} tokens"
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
