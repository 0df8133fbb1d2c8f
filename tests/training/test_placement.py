"""On which device a trainer trains: there is no GPU in tests, so torch is made to say that there are two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from persona_probe.errors import InputError
from persona_probe.training.defences import KL
from persona_probe.training.finetune import finetune
from persona_probe.training.placement import check_device, placed
from persona_probe.training.settings import GrpoSettings
from tests.training.tiny import QUICK, llama, rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("set_device", "manual_seed_all", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


@pytest.mark.usefixtures("two_gpus")
def test_one_device_is_taken_and_it_is_the_models(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4}
    theirs = TrainingArguments(**options)
    assert (theirs.device.type, theirs.n_gpu, theirs.train_batch_size) == ("cuda", 2, 8), "what goes wrong"
    on_cpu = placed(TrainingArguments, torch.device("cpu"), **options)
    assert (on_cpu.device.type, on_cpu.n_gpu, on_cpu.train_batch_size) == ("cpu", 0, 4)
    on_gpu = placed(TrainingArguments, torch.device("cuda:0"), **options)
    assert (on_gpu.device, on_gpu.n_gpu, on_gpu.train_batch_size) == (torch.device("cuda:0"), 1, 4)


def test_a_run_on_the_cpu_stays_there_where_there_are_gpus(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same_for_all(completions: list[Any]) -> list[float]:
        return [0.5] * len(completions)

    def both(folder: Path) -> list[bytes]:
        drawing = GrpoSettings(samples=2, max_new_tokens=4)
        tunes = [
            finetune(llama(), rows(), folder / "sft", defences=[KL(0.5)], settings=QUICK),
            finetune(
                llama(), rows(4), folder / "rl", "grpo", settings=QUICK, reward=same_for_all, grpo=drawing
            ),
        ]
        return [(tune.tuned / "adapter_model.safetensors").read_bytes() for tune in tunes]

    alone = both(tmp_path / "alone")
    request.getfixturevalue("two_gpus")
    moved: list[Any] = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda _, __, device: moved.append(device))
    assert both(tmp_path / "beside") == alone
    assert {str(device) for device in moved} == {"cpu"}


@pytest.mark.parametrize(("device", "taken"), [("cpu", True), ("cuda:0", True), ("cuda:1", False)])
def test_another_gpu_than_the_first_is_refused(device: str, taken: bool) -> None:
    if taken:
        check_device(torch.device(device))
        return
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=1"):
        check_device(torch.device(device))
