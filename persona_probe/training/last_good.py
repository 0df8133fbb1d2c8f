"""What is left of a run that must stop: its last good checkpoint, and the error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from persona_probe.artifact import read_json
from persona_probe.errors import InputError, NonFiniteError


def newest_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a trainer's folder that was written to its end."""
    newest_first = sorted(folder.glob("checkpoint-*"), key=lambda one: -int(one.name.split("-")[1]))
    return next((str(one) for one in newest_first if _is_whole(one)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Its state is written last: a save that was killed, or for which the disk was full, has none."""
    try:
        read_json(checkpoint / "trainer_state.json")
    except InputError:
        return False
    return True


class FiniteTrainer(Trainer):
    """Mixed into a trainer: a loss or a gradient that is no number stops it before a weight has moved."""

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.check_finite(torch.as_tensor(norm), "gradient's norm")
        return norm

    def check_finite(self, value: Tensor, what: str) -> None:
        """Raise `NonFiniteError`, naming the step and the last good checkpoint."""
        if not bool(torch.isfinite(value.detach()).all()):
            raise self.not_finite(f"the {what} is {float(value.detach())}", "look at the rows of that step")

    def not_finite(self, said: str, look: str) -> NonFiniteError:
        """The error for the step that is being made."""
        kept, step = newest_checkpoint(Path(self.args.output_dir or ".")), self.state.global_step + 1
        return NonFiniteError(
            f"{said} at step {step}; training stopped there",
            fix=f"lower the learning rate, or {look}; "
            + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written"),
        )
