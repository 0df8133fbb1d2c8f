"""A store that is killed at any moment goes on to the same bits; a byte that flips is found and named."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.activations import ActivationStore, TokenMask, capture
from persona_probe.activations import survey as survey_module
from persona_probe.activations.capture_plan import CapturePlan, plan_capture
from persona_probe.activations.survey import shard_bounds
from persona_probe.activations.writing import write_store
from persona_probe.artifact import read_json, write_json
from persona_probe.errors import BusyError, DiskFullError, InputError, MismatchError, MissingPathError
from persona_probe.execution import Share, UnfinishedError
from persona_probe.model import LanguageModel, load_model
from tests.activations.test_stream import conversations
from tests.model.tiny_models import adapter_of, checkpoint_of, model_of

SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
SHARD_TOKENS = 50


@functools.cache
def models() -> tuple[LanguageModel, LanguageModel]:
    base = model_of("llama")
    return base, base.with_adapter(adapter_of("llama"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written; only a machine that fails needs the sync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(out: Path, **options: Any) -> ActivationStore:
    found = capture(
        models(), conversations(), SITES, TokenMask("all"), out=out,
        **{"shard_tokens": SHARD_TOKENS, **options},
    )  # fmt: skip
    assert found.store is not None
    return found.store


@functools.cache
def whole() -> ActivationStore:
    """A store that nothing went wrong with. Only to be read."""
    return write(Path(tempfile.mkdtemp()) / "store")


@functools.cache
def planned() -> CapturePlan:
    """The plan of `write`."""
    return plan_capture(models(), conversations(), SITES, TokenMask("all"), shard_tokens=SHARD_TOKENS)


def content(folder: Path) -> dict[str, bytes]:
    """Every byte in a folder but the lock's, which holds a process id."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def different(folder: Path) -> list[str]:
    """The files that are not, byte for byte, those of the store that nothing went wrong with."""
    found, expected = content(folder), content(whole().path)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole().path, tmp_path / "copy"))


def in_a_child(out: Path, fsync: Callable[[int], None], share: Share | None = None) -> int:
    """Write the store in a forked process, where the models are there already; its process id.

    Without the table that `capture` ends with: polars has threads, which do not survive a fork.
    """
    plan = planned()  # before the fork: children that make the models themselves write one checkpoint at once
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs must not hang the tests
        os.fsync = fsync  # type: ignore[assignment]
        try:
            write_store(out, plan, plan.compute, share=share)
        finally:
            os._exit(0)
    return child


def killed_at(step: int, out: Path) -> bool:
    """Capture in a process that is killed in its `step`-th sync to the disk; whether it was."""

    left = itertools.count(step - 1, -1)

    def fsync(_: int) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(in_a_child(out, fsync), 0)
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFSIGNALED(status)


def test_killed_at_every_sync_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    shards = len(whole().shards)
    assert shards >= 3
    steps = 0
    while killed_at(steps + 1, out := tmp_path / str(steps)):
        done = len(list(out.glob("shards/*.json")))
        if not (out / "manifest.json").exists():  # else it was killed when all was done
            with pytest.raises(MissingPathError, match=f"stopped after {done}" if done else "no "):
                ActivationStore.open(out)
        before = {file: file.stat().st_mtime_ns for file in out.glob("shards/*.json")}
        write_store(out, planned(), planned().compute)
        assert different(out) == []
        assert all(file.stat().st_mtime_ns == when for file, when in before.items()), "did a shard again"
        shutil.rmtree(out)
        steps += 1
    # settings, two files a shard, the manifest: the file and its folder are synced each time
    assert steps == 2 + 4 * shards + 2
    assert different(out) == []


def test_killed_again_and_again_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(0)
    out = tmp_path / "store"
    start = time.monotonic()
    write(tmp_path / "timed")
    duration = time.monotonic() - start
    for _ in range(6):
        child = in_a_child(out, lambda _: None)
        time.sleep(chance.random() * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    write(out)
    assert different(out) == []


def test_processes_that_share_the_work_leave_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "at once"
    for child in [in_a_child(out, lambda _: None, Share(index, 3)) for index in (2, 0, 1)]:
        os.waitpid(child, 0)
    assert different(out) == []
    out = tmp_path / "one by one"
    for index in (1, 2):
        with pytest.raises(UnfinishedError, match="shards are left to other processes"):
            write(out, share=Share(index, 3))
    child = in_a_child(out, lambda _: time.sleep(20), Share(0, 3))
    while not list(out.glob("shards/.*.partial")):
        time.sleep(0.01)
    with pytest.raises(BusyError, match="in use by another run"):
        write(out)  # alone, while a share is at it
    with pytest.raises(InputError, match="throw away what the other shares have written"):
        write(out, share=Share(1, 3), overwrite=True)
    with pytest.raises(InputError, match="sink_factor was 10"):
        write(out, share=Share(1, 3), sink_factor=None)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert different(write(out, share=Share(0, 3)).path) == []


def test_an_error_between_shards_loses_nothing_either(tmp_path: Path) -> None:
    class Stop(Exception): ...

    def stop(done: int, _: int) -> None:
        if done > 60:
            raise Stop

    with pytest.raises(Stop):
        write(tmp_path, progress=stop)
    assert different(write(tmp_path).path) == []


@settings(max_examples=30)
@given(st.data())
def test_any_flipped_bit_is_found_and_its_file_named(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(whole().path, Path(folder) / "copy"))
        files = [copy / shard.name for shard in whole().shards] + [copy / "manifest.json"]
        file = data.draw(st.sampled_from(files))
        byte = data.draw(st.integers(0, file.stat().st_size - 1))
        flipped = bytearray(file.read_bytes())
        flipped[byte] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(flipped)
        with pytest.raises(InputError) as caught:
            list(ActivationStore.open(copy).chunks())
        assert file.name in str(caught.value)
        with pytest.raises(InputError, match=file.name):
            ActivationStore.open(copy).check()


@settings(max_examples=15)
@given(st.data())
def test_a_truncated_shard_is_found_when_the_store_is_opened(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(whole().path, Path(folder) / "copy"))
        shard = data.draw(st.sampled_from(whole().shards))
        os.truncate(copy / shard.name, data.draw(st.integers(0, shard.bytes - 1)))
        with pytest.raises(InputError, match=shard.name):
            ActivationStore.open(copy)
        # what the message says to do puts it right
        (copy / shard.name).with_suffix(".json").unlink()
        (copy / "manifest.json").unlink()
        assert different(write(copy).path) == []


def test_a_damaged_shard_is_not_built_upon(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    file = copy / whole().shards[1].name
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"00001\.safetensors was changed"):
        write(copy)


def test_what_is_no_store_says_so(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="no folder"):
        ActivationStore.open(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(MissingPathError, match="so it is no store"):
        ActivationStore.open(tmp_path / "other")
    manifest = read_json(copy / "manifest.json")
    for broken in ({**manifest, "d_model": 33}, {**manifest, "digest": None}):
        write_json(copy / "manifest.json", broken)
        with pytest.raises(InputError, match="was changed since it was written"):
            ActivationStore.open(copy)
    for other in ([], {"kind": "a run"}):
        write_json(copy / "manifest.json", other)
        with pytest.raises(InputError, match="not the manifest of an activation store"):
            ActivationStore.open(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is not valid JSON"):
        ActivationStore.open(copy)
    (copy / whole().shards[0].name).unlink()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MissingPathError, match=r"00000\.safetensors is in the manifest and not on"):
        ActivationStore.open(copy)


def test_another_model_site_or_setting_is_refused(copy: Path) -> None:
    store = whole()
    store.check_made_by(load_model(checkpoint_of("llama")))
    store.check_made_by(models()[1], model=1)
    with pytest.raises(MismatchError, match="holds activations of llama"):
        store.check_made_by(model_of("qwen2"))
    with pytest.raises(MismatchError, match="holds activations of llama-lora-0"):
        store.check_made_by(model_of("llama"), model="llama-lora-0")
    with pytest.raises(MismatchError, match=r"holds blocks\.0.*not blocks\.2"):
        next(store.batches(8, site="blocks.2.hook_resid_post"))
    with pytest.raises(MismatchError, match="no model 'gpt2'; it has llama, llama-lora-0"):
        store.rows(0, "gpt2", SITES[0])
    with pytest.raises(InputError, match="other settings: dtype was 'float32', this call has 'bfloat16'"):
        write(copy, dtype="bfloat16")
    assert write(copy, dtype="bfloat16", overwrite=True).dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_back_is_what_the_models_gave(dtype: Any, tmp_path: Path) -> None:
    store = write(tmp_path / "store", dtype=dtype)
    in_memory = capture(
        models(), conversations(), SITES, TokenMask("all"), dtype=dtype, shard_tokens=SHARD_TOKENS,
    )  # fmt: skip
    chunks = list(store.chunks())
    for model in range(2):
        for site in SITES:
            read = torch.cat([chunk.activations[model, site] for chunk in chunks])
            assert read.dtype == torch.float32
            assert torch.equal(read, in_memory.activations(model, site).float())
            rows = torch.cat([store.rows(i, model, site) for i in range(len(store.shards))])
            assert rows.dtype == getattr(torch, dtype) and torch.equal(rows.float(), read)
    documents = torch.cat([chunk.document for chunk in chunks])
    assert (documents.diff() >= 0).all() and torch.equal(documents, in_memory.document)
    assert torch.equal(torch.cat([chunk.position for chunk in chunks]), in_memory.position)
    shard = store.shard(1)
    texts = conversations()
    assert shard.token.tolist() == [
        texts[d].ids[p] for d, p in zip(shard.document.tolist(), shard.position.tolist(), strict=True)
    ]


@given(st.integers(1, 70), st.integers(0, 5), st.integers(1, 6))
def test_shuffled_batches_hold_every_token_once(batch: int, seed: int, pool: int) -> None:
    store = whole()
    options: dict[str, Any] = {"model": 1, "site": SITES[1], "seed": seed, "pool": pool}
    batches = list(store.batches(batch, **options))
    assert all(len(each) == batch for each in batches[:-1]) and 0 < len(batches[-1]) <= batch
    rows = torch.cat(batches)
    expected = torch.cat([chunk.activations[1, SITES[1]] for chunk in store.chunks()])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))
    again = list(store.batches(batch, **options))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(rows, expected)


def test_activations_are_mapped_not_read(tmp_path: Path) -> None:
    """A shard's tensors cost no memory of their own before they are used."""
    store = write(tmp_path / "store")
    mapped = Path("/proc/self/maps")
    if not mapped.is_file():
        pytest.skip("/proc/self/maps is Linux's")
    shard = store.shard(0)
    assert str(tmp_path / "store" / store.shards[0].name) in mapped.read_text()
    assert shard.activations[0, SITES[0]].shape == (store.shards[0].tokens, 32)


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(survey_module.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    out = tmp_path / "deep" / "store"
    with pytest.raises(DiskFullError, match=r"activations need 0\.\d MiB, and 0\.0 MiB are free"):
        write(out)
    assert list(tmp_path.iterdir()) == []


def test_what_was_planned_is_what_is_written() -> None:
    """The estimate is an upper bound, and a close one."""
    plan = planned()
    written = sum(shard.bytes for shard in whole().shards)
    assert written <= plan.bytes <= written + 5000 * (len(plan.bounds) + 1)
    assert [shard.conversations for shard in whole().shards] == list(plan.bounds)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 40))
def test_shards_are_runs_that_fit(selected: list[int], limit: int) -> None:
    import numpy as np

    bounds = shard_bounds(np.asarray(selected), limit)
    assert [i for a, b in bounds for i in range(a, b)] == list(range(len(selected)))
    for a, b in bounds:
        assert sum(selected[a:b]) <= limit or sum(n > 0 for n in selected[a:b]) == 1
