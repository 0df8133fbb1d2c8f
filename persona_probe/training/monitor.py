"""See it early: follow latents and directions while a model trains, and stop at a threshold.

    monitor = Monitor(watch, every=20, thresholds=alarm_levels(benign_histories, false_alarms=0.2))
    finetune(base, data, out, callbacks=[monitor])          # or monitor.watch(trainer), SFT or GRPO
    monitor.alarm                                           # None, or step, probe, shift, threshold

What it reads goes to the trainer's own logs (`persona/NAME`, the shift from the base), and so to
TensorBoard, trackio or W&B as the trainer is configured. It draws no random number and runs the
model in evaluation mode: the weights are those of the run without it, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.errors import InputError
from persona_probe.training.watching import Watch

EVERY = 20
"""Steps from one reading to the next, by default."""

History = Sequence[Mapping[str, float]]
"""`Monitor.history` of one run."""


@dataclass(frozen=True)
class Alarm:
    """The first shift above its threshold."""

    step: int
    probe: str
    shift: float
    threshold: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.probe} is {self.shift:+.3g} from the base, above {self.threshold:.3g}"
        )


class Monitor(TrainerCallback):
    """Reads `watch` every `every` steps; with `thresholds`, raises an alarm, and with `stop` ends the run.

    A callback that comes behind the loggers is not seen by them: `fit` puts it first, and for a
    trainer of one's own `watch(trainer)` does.
    """

    def __init__(
        self,
        watch: Watch,
        *,
        every: int = EVERY,
        thresholds: Mapping[str, float] | None = None,
        stop: bool = False,
    ) -> None:
        if every < 1:
            raise InputError(f"every must be from 1 step, got {every}")
        unknown = set(thresholds or ()) - set(watch.base)
        if unknown:
            raise InputError(f"a threshold for {', '.join(sorted(unknown))}, which is not watched")
        if stop and not thresholds:
            raise InputError("to stop at a threshold takes one", fix="alarm_levels(histories of benign runs)")
        self._watch = watch
        self._every = every
        self._thresholds = dict(thresholds or {})
        self._stop = stop
        self._unlogged: dict[str, float] = {}
        self._began = 0.0
        self.history: list[dict[str, float]] = []
        """`{step, NAME: shift from the base, ...}` of every reading."""
        self.alarm: Alarm | None = None
        """The first, if there was one."""
        self.seconds = 0.0
        """Spent on reading."""
        self.cost = math.nan
        """That, as a share of the time spent on all else."""

    def watch(self, trainer: Trainer) -> None:
        """Follow a trainer of one's own, ahead of its loggers."""
        trainer.callback_handler.callbacks.insert(0, self)

    @property
    def stopped(self) -> Alarm | None:
        """The alarm that ended the run, if one did."""
        return self.alarm if self._stop else None

    @property
    def table(self) -> pl.DataFrame:
        """`history` as a table."""
        return pl.DataFrame(self.history, infer_schema_length=None)

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002  the callback's signature is transformers'
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        self._began = time.perf_counter() - self.seconds

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if state.global_step % self._every and state.global_step != args.max_steps:
            return
        assert model is not None
        start = time.perf_counter()
        shifts = self._watch.shifts(model)
        self.seconds += time.perf_counter() - start
        self.cost = self.seconds / max(1e-9, time.perf_counter() - self._began - self.seconds)
        self.history.append({"step": state.global_step, **shifts})
        self._unlogged = {f"persona/{name}": shift for name, shift in shifts.items()}
        control.should_log = True
        self._compare(state.global_step, shifts)
        if self.alarm is not None and self._stop:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and self._unlogged:
            logs.update(self._unlogged)  # what loggers behind this one are handed
            state.log_history[-1].update(self._unlogged)
            self._unlogged = {}

    def _compare(self, step: int, shifts: Mapping[str, float]) -> None:
        if self.alarm is not None:
            return
        for name, threshold in self._thresholds.items():
            if shifts[name] > threshold:
                self.alarm = Alarm(step, name, shifts[name], threshold)
                return


def alarm_levels(benign: Sequence[History], false_alarms: float) -> dict[str, float]:
    """Thresholds that a benign run passes at most with probability `false_alarms`, all its readings taken
    together.

    Per probe the k-th smallest of the runs' highest shifts, `k = ceil((n + 1) (1 - rate / probes))`: of n
    benign runs and a new one that are exchangeable, the new one is the highest with probability 1 / (n + 1)
    (split conformal prediction; Bonferroni over probes). So n runs support no rate below
    probes / (n + 1), and asking for one is an error.

    Raises `InputError` for that, and for histories of different probes or without a reading.
    """
    if not 0 < false_alarms < 1:
        raise InputError(f"the false-alarm rate must be between 0 and 1, got {false_alarms}")
    if not benign or not all(benign):
        raise InputError("thresholds need benign runs, each with at least one reading")
    names = [name for name in benign[0][0] if name != "step"]
    if any(set(reading) != {"step", *names} for run in benign for reading in run):
        raise InputError("the benign runs were watched by different probes")
    rank = math.ceil((len(benign) + 1) * (1 - false_alarms / len(names)))
    if rank > len(benign):
        raise InputError(
            f"{len(benign)} benign runs and {len(names)} probes support a false-alarm rate from "
            f"{len(names) / (len(benign) + 1):.2g}, not {false_alarms:.2g}",
            fix="calibrate on more benign runs, or follow fewer probes",
        )
    return {name: sorted(max(reading[name] for reading in run) for run in benign)[rank - 1] for name in names}
