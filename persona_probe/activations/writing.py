"""Shards to the disk, one after the other, and the manifest last; what is there already is kept.

Several processes may do it together, each its share of the shards; the one that finishes last writes
the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from persona_probe.activations.capture_plan import CapturePlan
from persona_probe.activations.shard import Shard, write_shard
from persona_probe.activations.store import (
    MANIFEST,
    SHARDS,
    ActivationStore,
    check_shard,
    sealed,
    shard_file,
)
from persona_probe.activations.survey import check_disk
from persona_probe.artifact import RunFolder, read_json, versions, write_json
from persona_probe.artifact.atomic import remove_partials
from persona_probe.errors import InputError
from persona_probe.execution import Share, UnfinishedError


def write_store(
    out: Path,
    plan: CapturePlan,
    compute: Callable[[int], Shard],
    *,
    overwrite: bool = False,
    share: Share | None = None,
    progress: Callable[[int], None] | None = None,
) -> ActivationStore:
    """Write what `compute` gives for each of the plan's shards, and open the store.

    With `share`, only for its shards, beside other processes. `progress` is called with the number of
    each shard that is done. Raises `DiskFullError` before anything is written where it will not fit,
    `InputError` where `out` holds something else or a shard of an earlier run that was changed since,
    and `UnfinishedError` when others have shards to do.
    """
    together = share is not None and share.of > 1
    if together and overwrite:
        raise InputError(
            "--overwrite would throw away what the other shares have written",
            fix=f"remove {out} before the first of them begins",
        )
    held = 0 if overwrite else sum(file.stat().st_size for file in out.glob(f"{SHARDS}/*.safetensors"))
    check_disk(out, plan.bytes - held)
    settings = plan.settings()
    with RunFolder.open(out, settings, overwrite, together=together) as run:
        if run.complete:
            return ActivationStore.open(out)
        folder = run.path / SHARDS
        remove_partials(folder)
        files = [folder / f"{number:05d}.safetensors" for number in range(len(plan.bounds))]
        for number, (file, bounds) in enumerate(zip(files, plan.bounds, strict=True)):
            if share is not None and number not in share:
                continue
            note = file.with_suffix(".json")
            if note.is_file():
                check_shard(file, shard_file(cast("dict[str, Any]", read_json(note))))
            else:
                shard = compute(number)
                size, digest = write_shard(file, shard)
                record: dict[str, Any] = {
                    "name": f"{SHARDS}/{file.name}",
                    "conversations": list(bounds),
                    "tokens": len(shard),
                    "bytes": size,
                    "digest": digest,
                }
                write_json(note, record)
            if progress is not None:
                progress(number)
        notes = [file.with_suffix(".json") for file in files]
        left = sum(not note.is_file() for note in notes)
        if left:
            raise UnfinishedError.of(left, len(notes))
        records = [cast("dict[str, Any]", read_json(note)) for note in notes]
        facts = {
            **settings,
            "models": [asdict(model) for model in plan.stored_models],
            "d_model": plan.models[0].d_model,
            "counts": asdict(plan.counts(sum(record["tokens"] for record in records))),
            "source": plan.source,
            "shards": records,
            "versions": versions(),
        }
        write_json(run.path / MANIFEST, sealed(facts))
    # every shard was just written or compared, unless by another process
    return ActivationStore.open(out, verify=together)
