"""Hub ids, against a hub cache laid out by hand: nothing here reaches a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.model import load_model, load_pair
from tests.model.tiny_models import checkpoint_of, model_of, save_adapter, save_checkpoint

IDS = torch.tensor([[5, 9, 40, 7, 88]])


def publish(cache: Path, hub_id: str, folder: Path, revision: str, commit: str) -> None:
    """Put a folder where huggingface_hub keeps what it has fetched."""
    repository = cache / ("models--" + hub_id.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(folder))
    assert huggingface_hub.constants.HF_HUB_CACHE == str(folder)
    publish(folder, "lab/base", checkpoint_of("llama"), "main", "a" * 40)
    return folder


def test_a_hub_id_and_a_revision(cache: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "llama", seed=1)
    publish(cache, "lab/base", other, "step-7", "b" * 40)
    main, step = load_model("lab/base"), load_model("lab/base", revision="step-7")
    assert torch.equal(main.forward(IDS), model_of("llama").forward(IDS))
    assert torch.equal(step.forward(IDS), load_model(other).forward(IDS))
    assert (main.name, step.checkpoint.revision) == ("base", "step-7")
    assert main.checkpoint.digest != step.checkpoint.digest


def test_a_hub_id_of_an_adapter_brings_its_base(cache: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", checkpoint_of("llama"))
    expected = load_model(adapter).forward(IDS)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(checkpoint_of("llama")), "lab/base"))
    publish(cache, "lab/bad-health", adapter, "main", "c" * 40)
    tuned = load_model("lab/bad-health")
    assert torch.equal(tuned.forward(IDS), expected)
    assert tuned.name == "bad-health"
    pair = load_pair("lab/base", "lab/bad-health")
    assert torch.equal(pair.tuned.forward(IDS), expected)
    ours, theirs = (lm.hf.get_input_embeddings().weight for lm in (pair.base, pair.tuned))
    assert ours.data_ptr() == theirs.data_ptr()
    assert torch.equal(model_of("llama").with_adapter("lab/bad-health").forward(IDS), expected)


def test_what_is_not_there_is_said(cache: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        load_model("lab/nothing")
    with pytest.raises(InputError, match="lab/base is no adapter"):
        load_model("lab/base").with_adapter("lab/base")
    assert (cache / "models--lab--base").is_dir()
