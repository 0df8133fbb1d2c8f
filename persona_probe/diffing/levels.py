"""How active each latent of one model is on a corpus: a diff with nothing to differ from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from persona_probe.activations.masks import TokenMask
from persona_probe.diffing.moments import Moments
from persona_probe.diffing.shards import cut, named, read_shard, shard_tokens
from persona_probe.diffing.tally import t_quantile
from persona_probe.errors import NonFiniteError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary
from persona_probe.sae.validity import check_reads


def latent_means(
    lm: LanguageModel,
    dictionary: Dictionary,
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    batch_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """One row per latent, most active first: `index`, `mean` with `low` and `high` over questions,
    `fires` (share of the counted tokens, averaged like the mean) and `max`.

    `mask` counts every token but special ones by default. Raises what `diff` raises.
    """
    check_reads(dictionary, lm)
    here = dictionary.to(lm.device)
    moments = Moments(1, dictionary.d_sae)
    read = 0
    for shard in cut(rendered, clusters, shard_tokens(lm.device, batch_tokens)):
        texts = shard.conversations(rendered)
        try:
            sums = read_shard([lm], [here], texts, shard, mask or TokenMask("all"), batch_tokens=batch_tokens)
        except NonFiniteError as error:
            raise named(error, shard.names(rendered)) from error
        moments.add(sums.of(dictionary), sums.conversations)
        read += len(texts)
        if progress is not None:
            progress(read, len(rendered))
    mean, error = moments.level(0)
    half = error * t_quantile(moments.clusters, confidence)
    columns = {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "fires": moments.fires[0] / moments.conversations,
        "max": moments.maximum[0].double(),
    }
    data = {name: column.numpy() for name, column in columns.items()}
    table = pl.DataFrame({"index": np.arange(dictionary.d_sae), **data}, nan_to_null=True)
    return table.sort("mean", descending=True, maintain_order=True)
