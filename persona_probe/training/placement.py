"""Where a trainer trains: on the one device that its model is on.

transformers' trainers take the first GPU that they see, wherever the model is, and copy it to every further
one (`DataParallel`), each of which then reads a whole batch.

Not covered: another GPU than the first, which is refused; `CUDA_VISIBLE_DEVICES` makes any the first.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from persona_probe.errors import InputError

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def check_device(device: torch.device) -> None:
    """Raise `InputError` for a GPU that a trainer would leave for the first."""
    if device.type == "cuda" and device.index:
        raise InputError(
            f"the model is on {device}, and training takes the first GPU that it sees",
            fix=f'make that one the first: CUDA_VISIBLE_DEVICES={device.index}, with the device "cuda"',
        )


def placed(kind: type[Arguments], device: torch.device, **options: Any) -> Arguments:
    """Arguments of a trainer that stays on `device`, alone.

    Raises `InputError` for a GPU other than the first.
    """
    check_device(device)
    arguments = kind(use_cpu=device.type == "cpu", **options)
    # as transformers does for a model in parts
    arguments._n_gpu = min(1, arguments.n_gpu)  # pyright: ignore[reportPrivateUsage]
    return arguments
