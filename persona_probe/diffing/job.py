"""A diff by shards: for data too large for one process, and pairs too large to stand side by side.

The table is that of `diff`, to the bit where batches are the same. Read one after another, two models
are never in memory together; what needs both at one token (the share of the change that lies in the
dictionary) is then missing, and said to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.store import ActivationStore
from persona_probe.diffing.diff import Differences
from persona_probe.diffing.latent_diff import LatentDiff
from persona_probe.diffing.passes import Engine, Placement, Reading, Source, name_of, pass_of, pass_of_store
from persona_probe.diffing.readers import by_name
from persona_probe.diffing.stored import StoredConversations, check_store, left_out_of
from persona_probe.errors import InputError
from persona_probe.execution import Results, Share, run_local
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary, check_fits
from persona_probe.sae.validity import Limits


def diff_by_shards(
    base: Source,
    tuned: Source,
    dictionaries: Sequence[Dictionary],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None,
    results: Results,
    *,
    benign: Sequence[Source] = (),
    together: bool = True,
    answers: str = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    device: torch.device | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    sae_device: str | None = None,
    share: Share | None = None,
    engine: Engine = run_local,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, LatentDiff]:
    """Each dictionary's diff, by name.

    Args:
        results: where each shard's sums are kept; the same folder for every process.
        base: its folder, where passes load it themselves (in other processes, or one after the other);
            then that dictionaries fit it is checked when they do, and `device` must be given.
        device_map: accelerate's, for models that are larger than one device.
        together: read all models in one pass; else each in one of its own.
        sae_device: where dictionaries encode; by default where the models are.
        share, engine: see `persona_probe.execution`.
        progress: told what is read, and the conversations read and to read.

    The other arguments, and what it raises, are those of `diff`; a document that cannot be read
    fails its shard, which `missing` of the result names. Raises `UnfinishedError` while other processes
    have shards to do.
    """
    named = by_name(dictionaries)
    if isinstance(base, LanguageModel):
        device = base.device
        for one in dictionaries:
            check_fits(one, base)
    if device is None:
        raise InputError("a base that comes by its folder needs a device", fix='device=torch.device("cpu")')
    mask = mask or TokenMask("answer")
    models: list[Source] = [base, tuned, *benign]
    groups = [models] if together else [[model] for model in models]
    placement = Placement(device, dtype, device_map, sae_device)
    passes = [pass_of(base, group, dictionaries, mask, batch_tokens, placement) for group in groups]
    names = tuple(map(name_of, models))
    reading = Reading(passes, rendered, clusters, results)
    return _results(
        reading,
        Differences(named, names, answers, mask, confidence, limits),
        share,
        engine,
        progress,
    )


def store_by_shards(
    store: ActivationStore,
    dictionaries: Sequence[Dictionary],
    results: Results,
    clusters: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    limits: Limits | None = None,
    sae_device: str | None = None,
    share: Share | None = None,
    engine: Engine = run_local,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, LatentDiff]:
    """`diff` of a store, likewise. A shard of the store that was changed fails those that need it."""
    named = by_name(dictionaries)
    check_store(store, dictionaries)
    one = pass_of_store(store, dictionaries, sae_device or "cpu")
    reading = Reading([one], StoredConversations(store), clusters, results)
    found = Differences(named, one.names, "data", store.mask, confidence, limits, left_out=left_out_of(store))
    return _results(reading, found, share, engine, progress)


def _results(
    reading: Reading,
    found: Differences,
    share: Share | None,
    engine: Engine,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, LatentDiff]:
    reading.run(share, engine, progress)
    reading.check_any()
    reading.check_finished()
    for _, left in reading.shards():
        found.add(*left)
    return found.results(reading.missing)
