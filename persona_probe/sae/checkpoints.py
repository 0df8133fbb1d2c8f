"""Where a training run stands, on disk, so that a killed one goes on bit for bit as if nothing had been.

A hidden folder beside the dictionary's: settings and lock (`RunFolder`), and one checkpoint of three
files: the weights, sae-lens's own trainer state (optimiser, schedules, dead latents; read without
running code from it), and the feed's cursor. It is removed when the dictionary is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from persona_probe.artifact import RunFolder, atomic_folder, plain, read_json, write_json
from persona_probe.artifact.atomic import remove
from persona_probe.artifact.run_folder import SETTINGS
from persona_probe.errors import InputError
from persona_probe.sae.pools import Cursor, PooledFeed

_WEIGHTS, _PLACE = "weights.safetensors", "place.json"


class Checkpoints:
    """The checkpoint of one run; a context manager. Made by `Checkpoints.open`."""

    def __init__(self, run: RunFolder, seconds: float) -> None:
        self._run = run
        self._folder = run.path / "checkpoint"
        self._seconds = seconds
        self._saved = time.monotonic()

    @classmethod
    def open(
        cls, out: Path, settings: Mapping[str, object], seconds: float, overwrite: bool = False
    ) -> Checkpoints:
        """Take up the run towards `out`, or begin one.

        Raises `InputError` where `out` is there already or a run with other settings was begun (the
        first that differs is named), unless `overwrite`; `BusyError` where it is still going on.
        """
        out = out.absolute()
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} exists and is not empty", fix="choose another place, or overwrite it")
        folder = out.with_name(f".{out.name}.training")
        file = folder / SETTINGS
        same = file.is_file() and read_json(file).get("settings") == plain(settings)
        return cls(RunFolder.open(folder, settings, overwrite and not same), seconds)

    def restore(self, trainer: SAETrainer[Any, Any], feed: PooledFeed | Any) -> int:
        """Set trainer and feed to the checkpoint, where there is one. Returns the steps that are done."""
        if not (self._folder / _PLACE).is_file():
            return 0
        place: dict[str, Any] = read_json(self._folder / _PLACE)
        trainer.sae.load_state_dict(load_file(self._folder / _WEIGHTS, device=str(trainer.sae.device)))
        trainer.load_trainer_state(self._folder)
        feed.seek(Cursor(*place["cursor"]))
        return int(place["step"])

    def save_if_due(self, trainer: SAETrainer[Any, Any], feed: PooledFeed | Any, step: int) -> None:
        """Write a checkpoint when the last is old enough; it takes the last one's place whole."""
        if time.monotonic() - self._saved < self._seconds:
            return
        with atomic_folder(self._folder, overwrite=True) as folder:
            state = {name: tensor.contiguous() for name, tensor in trainer.sae.state_dict().items()}
            save_file(state, folder / _WEIGHTS)
            trainer.save_trainer_state(folder)
            write_json(folder / _PLACE, {"step": step, "cursor": feed.cursor})
        self._saved = time.monotonic()

    def discard(self) -> None:
        """Remove the checkpoint and its folder: the run is done."""
        remove(self._run.path)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.__exit__(kind, error, trace)
