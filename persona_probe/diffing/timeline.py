"""When did it start? Many fine-tunes against one pass of their base.

    found = timeline("base", "runs/bad-health", sae, rendered)       # runs/bad-health/checkpoint-*
    found.table                 # a row per latent (or direction) and step
    found.first()               # the step at which each first leaves the benign band

Checkpoints of one run, in the order of their steps, or tunes that have nothing to do with each other
(a mapping by name), of which `shared()` says which latents they have in common. Each is read by itself
on the same token ids and let go before the next; the sums that a pass leaves are kept in files, so that
a timeline that is stopped, or is given one more checkpoint, reads only what it has not read.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from persona_probe.activations.capture_plan import Data
from persona_probe.activations.documents import conversations_of
from persona_probe.activations.masks import TokenMask
from persona_probe.artifact import StrPath, read_json
from persona_probe.artifact.records import nearest
from persona_probe.diffing.means import MeanSums
from persona_probe.diffing.passes import Engine, Placement, Reading, Source, name_of, pass_of
from persona_probe.diffing.readers import Reader, by_name
from persona_probe.diffing.shards import Counted
from persona_probe.diffing.tally import Tally
from persona_probe.diffing.trajectory import Point, Probe, Timeline, direction_rows, latent_rows
from persona_probe.errors import InputError, MissingPathError
from persona_probe.execution import Results, Share, run_local
from persona_probe.model.checkpoint import is_adapter
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.sae.load import Dictionary, check_fits


def timeline(
    base: Source,
    checkpoints: StrPath | Mapping[int, Source] | Mapping[str, Source],
    sae: Dictionary | Sequence[Dictionary] = (),
    data: Data = (),
    clusters: Sequence[str] | None = None,
    *,
    directions: Mapping[str, Probe] | None = None,
    benign: Sequence[Source] = (),
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    device_map: str | None = None,
    sae_device: str | None = None,
    cache: StrPath | None = None,
    share: Share | None = None,
    engine: Engine = run_local,
    progress: Callable[[str, int, int], None] | None = None,
) -> Timeline:
    """How far every latent of `sae`, and every direction, lies from `base` at each checkpoint.

    Args:
        checkpoints: a Trainer's output folder (its `checkpoint-*`, with the loss where it was logged),
            models by step, or unrelated fine-tunes by name.
        data: prompts with answers, rendered, as chats, or as `read_documents` has them; every model
            reads the same ids.
        clusters: the question each belongs to (each its own, by default): the sampling unit.
        directions: by name.
        benign: harmless fine-tunes of the same base: the band (see `Timeline`).
        mask: which tokens count; by default the last prompt token and the answer.
        device_map: accelerate's, for models that are larger than one device.
        sae_device: where the dictionaries are; by default where the models are.
        cache: a folder for what each pass leaves; by default one that is thrown away.
        share: which shards to do, where several processes share `cache`.
        engine: where the passes run; a model that is not this process's to load must be a folder.
        progress: told the model being read, and its conversations read and to read.

    Raises:
        MismatchError: models, dictionary and conversations that do not belong together.
        InputError: nothing to read or to follow, no checkpoint.
        UnfinishedError: others have shards to do.
    """
    points = points_of(checkpoints)
    dictionaries = [sae] if isinstance(sae, Dictionary) else list(sae)
    followed = dict(directions or {})
    if not dictionaries and not followed:
        raise InputError("nothing to follow", fix="give a dictionary, or directions")
    named = by_name(dictionaries) if dictionaries else {}
    readers: list[Reader] = [*dict.fromkeys(probe.site for probe in followed.values()), *dictionaries]
    options: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map}
    first = base if isinstance(base, LanguageModel) else load_model(base, **options)
    for one in dictionaries:
        check_fits(one, first)
    rendered = conversations_of(first, data)
    mask = mask or TokenMask("answer")
    tunes: list[Source] = [*(point.model for point in points), *benign]
    here = engine is run_local and any(isinstance(one, LanguageModel) or is_adapter(one) for one in tunes)
    # whole checkpoints that come by their folders are never in memory together
    shared: Source = first if here or isinstance(base, LanguageModel) else base
    read_in = str(first.dtype).removeprefix("torch.")  # the others too, whoever loads them
    placement = Placement(first.device, read_in, device_map, sae_device)
    width, name = first.d_model, first.name
    del first
    passes = [pass_of(shared, [model], readers, mask, batch_tokens, placement) for model in (shared, *tunes)]
    with tempfile.TemporaryDirectory(prefix="persona-probe-") as thrown_away:
        reading = Reading(passes, rendered, clusters, Results(cache or thrown_away))
        reading.run(share, engine, progress)
        reading.check_any()
        reading.check_finished()
        every = range(1 + len(points), len(passes))
        read = [
            _at(point, [0, 1 + i, *every], reading, named, followed, width, confidence)
            for i, point in enumerate(points)
        ]
    return Timeline(
        table=pl.concat(table for table, _ in read),
        points=tuple(points),
        base=name,
        benign=tuple(map(name_of, benign)),
        mask=mask,
        confidence=confidence,
        counted=read[0][1],
        missing=reading.missing,
    )


def _at(
    point: Point,
    passes: Sequence[int],
    reading: Reading,
    dictionaries: Mapping[str, Dictionary],
    directions: Mapping[str, Probe],
    width: int,
    confidence: float,
) -> tuple[pl.DataFrame, Counted]:
    """The rows of one point, and what they were measured on, which is the same for all; `passes` are the
    base's, its own and the benign tunes'.
    """
    counted = Counted()
    tallies = {name: Tally(len(passes), one) for name, one in dictionaries.items()}
    means = {probe.site: MeanSums(len(passes), width) for probe in directions.values()}
    for _, groups in reading.shards():
        own = [groups[i] for i in passes]
        base = own[0]
        counted += base.counted
        for name, tally in tallies.items():
            tally.add(
                [group.of(dictionaries[name])[0] for group in own], base.conversations, base.tokens, None
            )
        for site, sums in means.items():
            sums.add([group.of(site)[0] for group in own], base.conversations, base.tokens)
    tables = [latent_rows(name, tally, confidence) for name, tally in tallies.items()]
    if directions:
        found = {site: sums.means(site) for site, sums in means.items()}
        tables.append(direction_rows(directions, found, confidence))
    rows = pl.concat(tables).select(
        pl.lit(point.name).alias("point"),
        pl.lit(point.step, dtype=pl.Int64).alias("step"),
        pl.lit(point.loss, dtype=pl.Float64).alias("loss"),
        pl.all(),
    )
    return rows, counted


def points_of(checkpoints: StrPath | Mapping[int, Source] | Mapping[str, Source]) -> list[Point]:
    """The points in training that a `timeline` is asked for, in order.

    Raises `MissingPathError` for no such folder, `InputError` where it holds no `checkpoint-*`.
    """
    if isinstance(checkpoints, Mapping):
        if not checkpoints:
            raise InputError("no checkpoint to read")
        listed = list(checkpoints.items())
        if all(isinstance(key, int) for key, _ in listed):
            listed.sort(key=lambda item: int(item[0]))
        return [Point(str(key), key if isinstance(key, int) else None, None, model) for key, model in listed]
    path = Path(checkpoints)
    if not path.is_dir():
        raise MissingPathError(f"there is no folder {path}", fix=nearest(path))
    found = sorted(
        (int(match[1]), entry)
        for entry in path.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", entry.name)) and entry.is_dir()
    )
    if not found:
        raise InputError(
            f"{path} holds no checkpoint-* folders", fix="give the output folder of a Trainer, or name them"
        )
    logged = _losses(found[-1][1])
    return [
        Point(str(step), step, next((loss for at, loss in reversed(logged) if at <= step), None), entry)
        for step, entry in found
    ]


def _losses(checkpoint: Path) -> list[tuple[int, float]]:
    """(step, loss) as the Trainer logged them, up to its last checkpoint."""
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return []
    history = read_json(state).get("log_history", [])
    return [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row and "step" in row]
