"""Fine-tunes that are measured and kept: what a lab is made of.

    with Trials.open("out/lab", base, measure, settings) as trials:
        trials("bad-health", rows, seed=1)["misaligned"]      # trained, measured, thrown away
        trials("bad-health", rows, seed=1)["misaligned"]      # read

A trial is known by what it was made of (rows, defences, settings, seed, what was measured on the way),
not by when: asked for again, by whichever case, it is read. So a lab that was killed goes on, and one
that is given another arm or seed trains only that.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from persona_probe.artifact import RunFolder, StrPath, digest_of, read_json, write_json
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.defences.defence import Defence
from persona_probe.training.finetune import finetune
from persona_probe.training.measure import Measure
from persona_probe.training.monitor import Monitor
from persona_probe.training.rows import Row
from persona_probe.training.settings import TuneSettings
from persona_probe.training.watching import Watch

TRIALS = "trials"
"""The folder, in that of a lab, in which each is a file: they outlive the run that made them."""


@dataclass(frozen=True, eq=False)
class Follow:
    """What is read while a trial trains: probes, and behaviour at checkpoints."""

    watch: Watch
    every: int
    """Steps from one reading to the next."""
    measure: Measure | None = None
    """Behaviour at the same steps; None: only at the end."""

    def record(self) -> dict[str, Any]:
        """What of it makes a trial another one."""
        asked = None if self.measure is None else self.measure.record()
        return {"watch": self.watch.digest, "every": self.every, "asked": asked}


class Trials:
    """Trains, measures and remembers. Made by `open`; a context manager."""

    def __init__(self, run: RunFolder, base: LanguageModel, measure: Measure, settings: TuneSettings) -> None:
        self.run = run
        self.base = base
        self.measure = measure
        self.settings = settings

    @classmethod
    def open(
        cls,
        out: StrPath,
        base: LanguageModel,
        measure: Measure,
        settings: TuneSettings,
        *,
        overwrite: bool = False,
    ) -> Trials:
        """In `out`, with what was measured there before.

        Raises `InputError` for a folder whose trials had another base, other questions or settings.
        """
        wanted = {
            "base": base.checkpoint.weights_digest,
            "settings": replace(settings, seed=0),
            "asked": measure.record(),
        }
        return cls(RunFolder.open(out, wanted, overwrite=overwrite), base, measure, settings)

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.__exit__(kind, error, trace)

    def of_base(self) -> dict[str, Any]:
        """The base's figures."""
        return self.kept("base", lambda: self.measure.with_hits(self.base))

    def __call__(
        self,
        name: str,
        rows: Sequence[Row],
        defences: Sequence[Defence] = (),
        *,
        seed: int,
        settings: TuneSettings | None = None,
        measure: Measure | None = None,
        also: Mapping[str, Measure] | None = None,
        follow: Follow | None = None,
    ) -> dict[str, Any]:
        """A fine-tune's figures: `Measure`'s with `hits`, `seconds` of training (and `cpu_seconds`, which
        on a busy machine say more), the last `loss`; those of `also` under their names. With `follow`:
        `history` (shifts by step), `along` (`Measure`'s figures by step) and `cost`, the share of training
        time that the readings took.

        Raises what `finetune` raises.
        """
        chosen = replace(settings or self.settings, seed=seed)
        asked = measure or self.measure
        made_of = {
            "rows": digest_of([row.record() for row in rows]),
            "defences": [one.record() for one in defences],
            "settings": asdict(chosen),
            "asked": asked.record(),
            "also": {label: one.record() for label, one in (also or {}).items()},
            "follow": None if follow is None else follow.record(),
        }
        key = f"{name}-{seed}-{digest_of(made_of).removeprefix('sha256:')[:12]}"
        return self.kept(key, lambda: self._trained(rows, defences, chosen, asked, also or {}, follow))

    def kept(self, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What was kept under `key`, made now if there is none."""
        return self.find(key) or self.keep(key, make())

    def find(self, key: str) -> dict[str, Any] | None:
        """What was kept under `key`."""
        file = self._file(key)
        return read_json(file) if file.is_file() else None

    def keep(self, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Keep `value`, as JSON has it, in place of what was there."""
        write_json(self._file(key), value)
        return read_json(self._file(key))

    def _file(self, key: str) -> Path:
        return self.run.path / TRIALS / f"{key}.json"

    def _trained(
        self,
        rows: Sequence[Row],
        defences: Sequence[Defence],
        settings: TuneSettings,
        measure: Measure,
        also: Mapping[str, Measure],
        follow: Follow | None,
    ) -> dict[str, Any]:
        folder = self.run.path / "training"
        monitor = None if follow is None else Monitor(follow.watch, every=follow.every)
        on_the_way = None if follow is None else follow.measure
        every = 0 if follow is None or on_the_way is None else follow.every
        start, busy = time.perf_counter(), time.process_time()
        tune = finetune(
            self.base, rows, folder, "sft", defences, replace(settings, save_every=every),
            callbacks=[] if monitor is None else [monitor], overwrite=True,
        )  # fmt: skip
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
        tuned = tune.load(self.base).merged()
        figures = measure.with_hits(tuned)
        figures |= {label: one(tuned) for label, one in also.items()}
        figures |= {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
        figures["loss"] = tune.record["log"][-1]["loss"]
        if monitor is not None:
            figures |= {"history": monitor.history, "cost": monitor.cost}
        if on_the_way is not None:
            figures["along"] = [
                {"step": step, **on_the_way(self.base.with_adapter(place).merged())}
                for step, place in _by_step(tune.checkpoints)
            ]
        shutil.rmtree(folder)
        return figures


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(one.name.split("-")[1]), one) for one in folder.glob("checkpoint-*"))
