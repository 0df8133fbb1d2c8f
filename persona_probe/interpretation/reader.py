"""A corpus read once: the runs of documents that are in memory together, and what is kept of each.

A run is a few dozen batches: enough to sort by length, few enough that its token ids and labels are
small. Of a run nothing stays but what `Examples` and `SourceSums` keep, so a corpus may be of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.activations.documents import Conversations
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import Chunk, batch_tokens_for, stream
from persona_probe.errors import InputError, MismatchError
from persona_probe.interpretation.examples import Examples, priority
from persona_probe.interpretation.sources import SourceSums, labels_of
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.encode import encode, encode_latents
from persona_probe.sae.load import Dictionary

RUN_BATCHES = 32
WHOLE_SHARE = 1 / 16
"""Of the documents, those on which the whole dictionary is encoded."""
TOGETHER = 10

Labels = Mapping[str, str]


def runs(conversations: Sequence[Rendered], tokens: int) -> Iterator[range]:
    """Conversations in their order, in runs of at least `tokens` tokens but the last."""
    lengths = (
        conversations.lengths.tolist()
        if isinstance(conversations, Conversations)
        else map(len, conversations)
    )
    start = count = 0
    for i, length in enumerate(lengths):
        count += length
        if count >= tokens:
            yield range(start, i + 1)
            start, count = i + 1, 0
    if start < len(conversations):
        yield range(start, len(conversations))


class Corpus:
    """Conversations with their labels, read a run at a time."""

    def __init__(
        self, conversations: Sequence[Rendered], labels: Sequence[Labels] | None, by: Sequence[str]
    ) -> None:
        """`labels` say of each conversation what it is; or `by` names fields of the rows they come from.

        Raises `MismatchError` for another number of labels, `InputError` for fields without rows.
        """
        if labels is not None and len(labels) != len(conversations):
            raise MismatchError(f"{len(labels)} labels for {len(conversations)} conversations")
        if by and labels is None and not isinstance(conversations, Conversations):
            raise InputError(f"by={list(by)} names fields of rows, and these documents have none",
                             fix="give labels=, one mapping per document")  # fmt: skip
        self.conversations = conversations
        self._labels = labels
        self._by = by
        self.unlabelled: Counter[str] = Counter()
        """Documents without a field that `by` names."""
        self._known: set[str] = set()

    def __len__(self) -> int:
        return len(self.conversations)

    def chunks(
        self, lm: LanguageModel, sites: Sequence[str], mask: TokenMask, batch_tokens: int | None
    ) -> Iterator[tuple[Chunk, dict[int, Labels]]]:
        """The activations of the counted tokens, and the labels of the documents they are of.

        Raises `InputError` when no token counts, or no row has a field that `by` names.
        """
        size = batch_tokens_for(lm.device, batch_tokens)
        read = False
        for run, held, labels in self._held(RUN_BATCHES * size):
            if not any(any(mask.select(one, lm.special_ids)) for one in held):
                continue
            read = True
            for chunk in stream([lm], held, sites, mask, batch_tokens=size):
                numbers = chunk.document.unique().tolist()
                yield (
                    replace(chunk, document=chunk.document + run.start),
                    {run.start + number: labels[number] for number in numbers},
                )
        if not read:
            raise InputError(f"the mask {mask.kind!r} leaves no token of any document")
        for name in self._by:
            if self.unlabelled[name] == len(self):
                raise InputError(
                    f"no row has a field {name!r}",
                    fix=f"fields there are: {', '.join(sorted(self._known)) or 'none'}",
                )

    def _held(self, tokens: int) -> Iterator[tuple[range, Sequence[Rendered], Sequence[Labels]]]:
        """Runs with what is in memory of them; while the model reads one, the next is rendered."""

        def read(run: range) -> tuple[range, Sequence[Rendered], Sequence[Labels]]:
            return run, self.conversations[run.start : run.stop], self._labels_of(run)

        with ThreadPoolExecutor(1) as pool:
            coming = None
            for run in runs(self.conversations, tokens):
                ahead = pool.submit(read, run)
                if coming is not None:
                    yield coming.result()
                coming = ahead
            if coming is not None:
                yield coming.result()

    def _labels_of(self, run: range) -> Sequence[Labels]:
        if self._labels is not None:
            return self._labels[run.start : run.stop]
        if not self._by or not isinstance(self.conversations, Conversations):
            return [{}] * len(run)
        found: list[Labels] = []
        for record in self.conversations.records(run.start, run.stop):
            labels = labels_of(record, self._by)
            self.unlabelled.update(name for name in self._by if name not in labels)
            self._known |= record.keys() if isinstance(record, dict) else set()
            found.append(labels)
        return found


class Reader:
    """Reads the latents asked for of one dictionary."""

    def __init__(self, dictionary: Dictionary, indices: Sequence[int], **sizes: int) -> None:
        """`sizes` as `Examples` takes them."""
        self.dictionary = dictionary
        self.indices = list(indices)
        n, self._seed = len(self.indices), sizes["seed"]
        self.examples = Examples(n, **sizes)
        self.sources = SourceSums(n)
        self._alive = torch.zeros(dictionary.d_sae, dtype=torch.long)
        self._joint = torch.zeros(n, dictionary.d_sae, dtype=torch.long)
        self._fired = torch.zeros(n, dtype=torch.long)
        self._tokens = 0

    def add(self, chunk: Chunk, labels: Mapping[int, Labels]) -> None:
        """Read the documents of a chunk; `labels` of each, in the order of their numbers."""
        x = chunk.activations[0, self.dictionary.site]
        values = encode_latents(self.dictionary, x, self.indices)
        self.examples.add(chunk.document, chunk.position, values)
        self._group(chunk.document, values, labels)
        whole = [number for number in labels if priority(number, self._seed + 2) < WHOLE_SHARE]
        if whole:
            here = torch.isin(chunk.document, torch.tensor(whole)).to(x.device)
            self._whole(x[here], values[here])

    def fires(self, index: int) -> int:
        """Tokens at which a latent fired."""
        return int(self.examples.fires[self.indices.index(index)])

    def together(self, i: int) -> pl.DataFrame:
        """The latents that fire most often where latent number `i` of those asked for does."""
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

    def _group(
        self,
        document: Int[Tensor, " token"],
        values: Float[Tensor, "token latent"],
        labels: Mapping[int, Labels],
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
