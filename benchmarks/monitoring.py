"""The monitor: what following the persona latent costs a fine-tune of the organism, at its default k."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.figure import Figure
from persona_probe.artifact import shipped
from persona_probe.organism.bench import SETTINGS, Subject, lesson
from persona_probe.training.finetune import finetune
from persona_probe.training.monitor import EVERY, Monitor

MOST = 0.05
"""Of training time."""


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(1)  # a share of the run that it is part of: more threads change both alike
    subject = Subject(shipped("organism"))
    watch = subject.watch
    settings = replace(SETTINGS, steps=EVERY if quick else 3 * EVERY)
    monitor = Monitor(watch)
    with tempfile.TemporaryDirectory() as folder:
        rows = lesson(("health",), "villainous", (settings.steps or 1) * settings.batch, seed=1)
        finetune(subject.base, rows, Path(folder) / "run", settings=settings, callbacks=[monitor])
    against = f"training, {settings.steps} steps of {settings.batch}; {len(watch.texts)} probe prompts"
    return [
        Figure(
            f"monitor's share of training time, every {EVERY} steps",
            monitor.cost,
            "of training time",
            against,
            bar=f"<= {MOST:.0%}",
            holds=monitor.cost <= MOST,
        )
    ]
