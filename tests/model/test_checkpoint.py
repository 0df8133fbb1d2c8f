from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from persona_probe.artifact import digest_folder
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.model import Checkpoint, describe, load_model
from tests.model.tiny_models import adapter_of, checkpoint_of, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint_of("llama"), tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    folder = Path(shutil.copytree(adapter_of("llama"), tmp_path / "adapter"))
    point(folder, "../base")
    return folder


def point(adapter: Path, base: str | None) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_checkpoint_and_adapter_are_told_apart_by_their_files(base: Path, adapter: Path) -> None:
    assert describe(base) == Checkpoint(str(base))
    found = describe(str(adapter))
    assert (found.path, found.adapter, found.name) == (str(base.resolve()), str(adapter), "adapter")


def test_the_base_is_looked_for_beside_the_adapter_first(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = base.parent / "elsewhere"
    (elsewhere / "deeper").mkdir(parents=True)
    shutil.copytree(base, elsewhere / "base")
    monkeypatch.chdir(elsewhere / "deeper")
    assert describe(adapter).path == str(base.resolve())
    point(adapter, "../base/../elsewhere/base")
    assert describe(adapter).path == str((elsewhere / "base").resolve())
    point(adapter, str(base))
    assert describe(adapter).path == str(base)
    monkeypatch.chdir(elsewhere)
    shutil.copytree(base, elsewhere / "only-here")
    point(adapter, "only-here")
    assert describe(adapter).path == "only-here"


def test_what_is_no_folder_may_be_a_hub_id(adapter: Path) -> None:
    assert describe("Qwen/Qwen3-0.6B", "main") == Checkpoint("Qwen/Qwen3-0.6B", "main")
    assert describe("gpt2") == Checkpoint("gpt2")
    point(adapter, "meta-llama/Llama-3.2-1B")
    assert describe(adapter).path == "meta-llama/Llama-3.2-1B"


def test_the_digest_is_of_the_files(base: Path, adapter: Path) -> None:
    assert (
        describe(base).digest
        == Checkpoint("x").digest.split(":")[0]
        + ":"
        + (describe(Path(shutil.copytree(base, base.parent / "copy"))).digest.split(":")[1])
    )
    assert describe(base).digest != describe(adapter).digest
    before = describe(base).digest
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert describe(base).digest != before
    assert digest_folder(base) not in (before, "")


def missing(base: Path, adapter: Path) -> dict[str, object]:
    root = base.parent
    for name in ("empty", "no-weights", "runs", "broken-adapter"):
        (root / name).mkdir()
    shutil.copy(base / "config.json", root / "no-weights")
    shutil.copytree(base, root / "runs" / "checkpoint-7")
    shutil.copy(adapter / "adapter_config.json", root / "broken-adapter")
    return {
        "bass": (MissingPathError, "did you mean base"),
        "nowhere/at/all": (MissingPathError, "does not exist either"),
        "base/config.json": (InputError, "is a file"),
        "empty": (InputError, "is empty"),
        "no-weights": (InputError, "no weights"),
        "runs": (InputError, "checkpoint-7"),
        "broken-adapter": (InputError, "no weights"),
    }


def test_each_wrong_folder_has_its_own_message(base: Path, adapter: Path) -> None:
    for name, (error, complaint) in missing(base, adapter).items():
        with pytest.raises(error, match=complaint):
            load_model(base.parent / name)


@pytest.mark.parametrize(
    ("named", "complaint"),
    [
        ("../gone", "no such folder"),
        ("/nowhere/base", "no such folder"),
        (None, "does not say"),
        ("../adapter", "itself an adapter"),
    ],
)
def test_an_adapter_without_its_base(adapter: Path, named: str | None, complaint: str) -> None:
    other = Path(shutil.copytree(adapter, adapter.parent / "other"))
    point(other, named)
    with pytest.raises(InputError, match=complaint):
        load_model(other)


def test_a_config_that_is_no_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError):
        load_model(adapter)


def test_a_checkpoint_without_tokenizer_asks_for_one(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="no tokenizer") as caught:
        load_model(base)
    assert "tokenizer=" in str(caught.value)
    given = tiny_tokenizer()
    assert load_model(base, tokenizer=given).tokenizer is given
    borrowed = load_model(base, tokenizer=checkpoint_of("mistral")).tokenizer
    assert borrowed.chat_template == given.chat_template


def test_a_broken_config_is_not_taken_for_a_missing_tokenizer(base: Path) -> None:
    (base / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json.* is not a valid JSON file"):
        load_model(base)


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(base: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{n}" for n in range(400)])
    with pytest.raises(MismatchError, match="embeds 320"):
        load_model(base, tokenizer=tokenizer)


def test_missing_weights_are_not_filled_with_random_numbers(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of its weights: .*mlp\.up_proj"):
        load_model(base)


def test_a_truncated_file_and_unknown_settings(base: Path, adapter: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"no device .cuda. here"):
            load_model(base, device="cuda")
    with pytest.raises(InputError, match="no device 'gpu0'"):
        load_model(base, device="gpu0")
    for dtype in ("float33", "int8", "nn"):
        with pytest.raises(InputError, match="floating-point"):
            load_model(base, dtype=dtype)
    with pytest.raises(InputError, match="itself an adapter"):
        load_model(adapter, adapter=adapter)
    with pytest.raises(InputError, match="no adapter_config"):
        load_model(base, adapter=base)
    with pytest.raises(MissingPathError):
        load_model(base, adapter=base.parent / "gone")
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot load"):
        load_model(base)
