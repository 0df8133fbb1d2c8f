"""Shards to the disk, one after the other, and the manifest last; what is there already is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
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


def write_store(
    out: Path,
    plan: CapturePlan,
    compute: Callable[[int], Shard],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ActivationStore:
    """Write what `compute` gives for each of the plan's shards, and open the store.

    `progress` is called with the number of shards that are done. Raises `DiskFullError` before
    anything is written where it will not fit, and `InputError` where `out` holds something else or a
    shard of an earlier run that was changed since.
    """
    held = 0 if overwrite else sum(file.stat().st_size for file in out.glob(f"{SHARDS}/*.safetensors"))
    check_disk(out, plan.bytes - held)
    settings = plan.settings()
    with closing(RunFolder.open(out, settings, overwrite)) as run:
        if run.complete:
            return ActivationStore.open(out)
        folder = run.path / SHARDS
        folder.mkdir(exist_ok=True)
        remove_partials(folder)
        records: list[dict[str, Any]] = []
        for number, bounds in enumerate(plan.bounds):
            file = folder / f"{number:05d}.safetensors"
            note = file.with_suffix(".json")
            if note.is_file():
                record = cast("dict[str, Any]", read_json(note))
                check_shard(file, shard_file(record))
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
            records.append(record)
            if progress is not None:
                progress(number + 1)
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
    return ActivationStore.open(out, verify=False)  # every shard was just written or compared
