"""Training from a store or from the model: the same dictionary, and the same again after a kill."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE

from persona_probe.activations import TokenMask, capture
from persona_probe.errors import InputError, MismatchError
from persona_probe.model import Rendered
from persona_probe.sae.architectures import PRICED, Architecture
from persona_probe.sae.load import Dictionary, check_fits, load_sae
from persona_probe.sae.pools import Cursor, PooledFeed
from persona_probe.sae.source import TokenSource, live_tokens, stored_tokens
from persona_probe.sae.train import TrainingProgress, train_sae
from tests.model.tiny_models import model_of

SITE = "blocks.1.hook_resid_post"
FAST: dict[str, Any] = {"d_sae": 48, "k": 4, "steps": 60, "batch_tokens": 64}


@functools.cache
def conversations() -> tuple[Rendered, ...]:
    generator = torch.Generator().manual_seed(0)
    made: list[Rendered] = []
    for _ in range(60):
        n = int(torch.randint(5, 40, (), generator=generator))
        ids = torch.randint(4, 300, (n,), generator=generator).tolist()
        made.append(Rendered(tuple(ids), (False,) * n, n))
    return tuple(made)


@functools.cache
def live() -> TokenSource:
    return live_tokens(model_of("llama"), list(conversations()), SITE, shard_tokens=150)


@functools.cache
def stored() -> TokenSource:
    out = Path(tempfile.mkdtemp()) / "store"
    found = capture(
        model_of("llama"), list(conversations()), [SITE], TokenMask("all"), out=out, shard_tokens=150
    )
    assert found.store is not None
    return stored_tokens(found.store)


@functools.cache
def uninterrupted() -> Dictionary:
    return train_sae(stored(), SITE, Path(tempfile.mkdtemp()) / "sae", **FAST)


def same(a: Dictionary, b: Dictionary) -> bool:
    assert a.threshold is not None and b.threshold is not None
    pairs = [(a.W_enc, b.W_enc), (a.b_enc, b.b_enc), (a.W_dec, b.W_dec), (a.b_dec, b.b_dec)]
    return all(torch.equal(x, y) for x, y in [*pairs, (a.threshold, b.threshold)])


def test_a_store_and_the_model_itself_train_the_same_dictionary(tmp_path: Path) -> None:
    found = train_sae(live(), SITE, tmp_path / "sae", **FAST)
    assert same(found, uninterrupted())
    check_fits(found, model_of("llama"))
    assert found.meta["training"]["trained_tokens"] == 60 * 64
    assert SAE.load_from_disk(tmp_path / "sae").cfg.architecture() == "jumprelu"
    assert [entry.name for entry in tmp_path.iterdir()] == ["sae"]


class Stop(Exception): ...


def stop_at(step: int) -> Any:
    def told(progress: TrainingProgress) -> None:
        if progress.step >= step:
            raise Stop

    return told


def test_a_run_that_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    with pytest.raises(Stop):
        train_sae(stored(), SITE, out, **FAST, checkpoint_seconds=0.0, progress=stop_at(50))
    assert not out.exists()
    asked: list[int] = []
    watched = TokenSource(**{**vars(stored()), "read": lambda n: asked.append(n) or stored().read(n)})
    found = train_sae(watched, SITE, out, **FAST)
    assert same(found, uninterrupted())
    # what is measured on, the pool that the run was in, and the next
    assert len(asked) <= 3 * len(stored().sizes)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("architecture", ["matryoshka", "jumprelu", "gated"])
def test_another_architecture_is_taken_up_where_it_was(architecture: Architecture, tmp_path: Path) -> None:
    amount = {"k": None, "l1": 0.5} if architecture in PRICED else {}
    # so long a run that the price is still rising when it is stopped
    settings: dict[str, Any] = {**FAST, **amount, "architecture": architecture, "steps": 1040}
    settings |= {"batch_tokens": 16, "d_sae": 16}
    whole = train_sae(stored(), SITE, tmp_path / "whole", **settings)
    out = tmp_path / "sae"
    with pytest.raises(Stop):
        train_sae(stored(), SITE, out, **settings, checkpoint_seconds=0.0, progress=stop_at(50))
    assert train_sae(stored(), SITE, out, **settings).digest == whole.digest


@pytest.mark.parametrize("syncs", [3, 12, 40, 41, 42])
def test_killed_in_the_middle_of_a_checkpoint(syncs: int, tmp_path: Path) -> None:
    out, source = tmp_path / "sae", stored()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        left = [syncs]

        def fsync(_: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync  # type: ignore[assignment]
        # autograd has threads of its own, which do not survive a fork: the parent has not started them
        try:
            train_sae(source, SITE, out, **FAST, checkpoint_seconds=0.0)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert same(train_sae(stored(), SITE, out, **FAST), uninterrupted())


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    first = train_sae(stored(), SITE, out, **FAST)
    told: list[TrainingProgress] = []
    assert train_sae(stored(), SITE, out, **FAST, progress=told.append).digest == first.digest
    assert told == []
    with pytest.raises(InputError, match="exists and is not empty"):
        train_sae(stored(), SITE, out, **{**FAST, "seed": 1})
    assert not same(train_sae(stored(), SITE, out, **{**FAST, "seed": 1}, overwrite=True), first)
    assert load_sae(out).meta["training"]["seed"] == 1


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    with pytest.raises(Stop):
        train_sae(stored(), SITE, out, **FAST, checkpoint_seconds=0.0, progress=stop_at(50))
    with pytest.raises(InputError, match="other settings: k was 4, this call has 5"):
        train_sae(stored(), SITE, out, **{**FAST, "k": 5})
    with pytest.raises(InputError, match="other settings: data was"):
        train_sae(live(), SITE, out, **FAST)
    assert train_sae(stored(), SITE, out, **{**FAST, "k": 5}, overwrite=True).meta["training"]["k"] == 5


def test_progress_has_the_figures_that_matter(tmp_path: Path) -> None:
    told: list[TrainingProgress] = []
    train_sae(stored(), SITE, tmp_path / "sae", **FAST, progress=told.append)
    last = told[-1]
    assert last.l0 == pytest.approx(FAST["k"], abs=0.01)
    assert last.dead_share == pytest.approx(last.dead / FAST["d_sae"])
    assert told[0].explained_variance < last.explained_variance <= 1


def test_another_site_and_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=rf"activations of {SITE}, not of blocks\.0"):
        train_sae(stored(), "blocks.0.hook_resid_post", tmp_path / "sae", **FAST)
    with pytest.raises(InputError, match="too few"):
        train_sae(stored(), SITE, tmp_path / "sae", **{**FAST, "batch_tokens": 2000})
    assert list(tmp_path.iterdir()) == []


def numbered(sizes: list[int]) -> TokenSource:
    """Every row is a number of its own."""
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()

    def read(number: int) -> torch.Tensor:
        return torch.arange(starts[number], starts[number + 1]).float()[:, None]

    return TokenSource(SITE, 1, tuple(sizes), read, "numbers", "none", None)


@given(
    st.lists(st.integers(1, 60), min_size=3, max_size=12).filter(lambda sizes: sum(sizes) > 80),
    st.integers(1, 30),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_trained_token_once(sizes: list[int], batch: int, seed: int) -> None:
    feed = PooledFeed(numbered(sizes), batch, None, "cpu", seed)
    held = {int(x) for x in feed.held_out}
    rows: list[int] = []
    while feed.cursor.epoch < 2:
        rows += [int(x) for x in next(feed)]
    n = sum(sizes) - len(held)
    every = set(range(sum(sizes))) - held
    assert sorted(rows[:n]) == sorted(rows[n : 2 * n]) == sorted(every)
    assert n < 20 or rows[:n] != rows[n : 2 * n]
    assert set(map(int, feed.recent())) <= every


@given(st.integers(0, 60), st.integers(1, 30))
def test_a_feed_can_be_set_to_any_place(steps: int, batch: int) -> None:
    feed = PooledFeed(numbered([40, 30, 50, 20]), batch, None, "cpu", 0)
    for _ in range(steps):
        next(feed)
    other = PooledFeed(numbered([40, 30, 50, 20]), batch, None, "cpu", 0)
    other.seek(Cursor(*feed.cursor))
    for _ in range(5):
        assert torch.equal(next(feed), next(other))


def test_the_folder_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    """sae-lens orders its configuration's keys by the process's hash seed; ours does not."""
    train_sae(stored(), SITE, tmp_path / "sae", **FAST)
    config = (tmp_path / "sae" / "cfg.json").read_text()
    assert config == json.dumps(json.loads(config), indent=2, sort_keys=True) + "\n"
    assert load_sae(tmp_path / "sae").digest == uninterrupted().digest
