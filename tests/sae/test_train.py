"""Training: what is saved is what was trained, and it finds directions that are there."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from sae_lens import SAE
from torch import Tensor

from persona_probe.errors import InputError, MismatchError, NonFiniteError, UnknownSiteError
from persona_probe.sae.architectures import PRICED, Architecture
from persona_probe.sae.encode import decode, encode, encode_dense
from persona_probe.sae.load import check_fits, load_sae
from persona_probe.sae.train import TrainingProgress, train_sae
from tests.model.tiny_models import model_of

SITE, D_MODEL, D_SAE, K, BATCH = "blocks.1.hook_resid_post", 16, 48, 3, 256
SCALE = 7.0
"""Activations are far from unit norm and far from the origin, as those of real models are."""


def directions() -> Tensor:
    drawn = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm(dim=1, keepdim=True)


def activations(n: int = 24_000, seed: int = 1) -> Tensor:
    """Sparse mixtures of 24 directions, around a mean."""
    generator = torch.Generator().manual_seed(seed)
    amounts = torch.rand(n, 24, generator=generator) + 0.5
    amounts *= torch.rand(n, 24, generator=generator) < 3 / 24
    return SCALE * (amounts @ directions() + 2 * torch.ones(D_MODEL))


def train(out: Path, x: Tensor | Iterator[Tensor] | list[Tensor], **options: object):
    settings = {"d_sae": D_SAE, "k": K, "batch_tokens": BATCH, "steps": 240, "lr": 1e-2}
    return train_sae(x, SITE, out, **{**settings, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sae") / "trained"
    train(out, activations())
    return out


def test_the_saved_dictionary_keeps_k_and_the_explained_variance(trained: Path) -> None:
    """On fresh tokens, the threshold does what training's batch rule did."""
    found, fresh = load_sae(trained), activations(4000, seed=2)
    codes = encode_dense(found, fresh)
    l0 = float((codes > 0).sum(dim=1).float().mean())
    assert l0 == pytest.approx(K, rel=0.05)
    error = (fresh - decode(found, codes)).square().sum()
    explained = 1 - float(error / (fresh - fresh.mean(dim=0)).square().sum())
    figures = found.meta["training"]
    assert explained > 0.9
    assert explained == pytest.approx(figures["explained_variance"], abs=0.02)
    assert explained == pytest.approx(figures["explained_variance_batchtopk"], abs=0.02)
    assert figures["l0"] == pytest.approx(l0, rel=0.05)


def test_the_directions_that_made_the_data_are_found(trained: Path) -> None:
    found = load_sae(trained)
    cosine = directions() @ (found.W_dec / found.W_dec.norm(dim=1, keepdim=True)).T
    assert float((cosine.max(dim=1).values > 0.9).float().mean()) > 0.8


def test_sae_lens_opens_it_and_gives_the_same_numbers(trained: Path) -> None:
    theirs, x = SAE.load_from_disk(trained), activations(200, seed=3)
    assert theirs.cfg.architecture() == "jumprelu"
    assert theirs.cfg.normalize_activations == "none"
    assert theirs.cfg.metadata.hook_name == SITE
    ours = load_sae(trained)
    torch.testing.assert_close(encode_dense(ours, x), theirs.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(ours, encode(ours, x)), theirs(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("architecture", [a for a in get_args(Architecture) if a != "batchtopk"])
def test_every_architecture_is_sparse_opens_in_sae_lens_and_explains(
    architecture: Architecture, tmp_path: Path
) -> None:
    amount = {"l1": 0.4} if architecture in PRICED else {"k": K}
    found = train(tmp_path / "sae", activations(), architecture=architecture, **{"k": None, **amount})
    fresh = activations(2000, seed=2)
    codes = encode_dense(found, fresh)
    l0 = float((codes > 0).sum(dim=1).float().mean())
    figures = found.meta["training"]
    assert figures["architecture"] == architecture and figures["explained_variance"] > 0.6
    assert l0 == pytest.approx(figures["l0"], rel=0.05)
    assert l0 == pytest.approx(K, rel=0.35) if architecture not in PRICED else 1 < l0 < D_SAE / 2
    assert (figures["explained_variance_batchtopk"] is None) == (architecture != "matryoshka")
    theirs = SAE.load_from_disk(tmp_path / "sae")
    torch.testing.assert_close(decode(found, encode(found, fresh)), theirs(fresh), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"architecture": "gated", "k": 3}, "a gated dictionary takes l1, not k"),
        ({"architecture": "topk", "l1": 3.0}, "a topk dictionary takes k, not l1"),
        ({"architecture": "standard", "l1": -1.0}, "l1 must be a finite number above 0"),
    ],
)
def test_what_an_architecture_does_not_take_is_refused(
    said: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train_sae(activations(100), SITE, tmp_path / "sae", **said)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_settings_are_recorded(trained: Path) -> None:
    recorded = json.loads((trained / "cfg.json").read_text())["metadata"]["training"]
    assert recorded["seed"] == 0 and recorded["k"] == K and recorded["steps"] == 240
    assert recorded["trained_tokens"] == 240 * BATCH
    assert 0 <= recorded["dead"] < 0.5


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    x = activations(4000)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (
        train(tmp_path / name, x, steps=20, seed=seed)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert (first.W_dec == again.W_dec).all() and first.threshold is not None
    assert (first.threshold == again.threshold).all()  # type: ignore[union-attr]
    assert (first.W_dec != other.W_dec).any()
    assert (torch.random.get_rng_state() == before).all(), "the caller's randomness was used up"


def test_chunks_train_as_a_tensor_does(tmp_path: Path) -> None:
    found = train(tmp_path / "sae", activations(80_000).split(1000), steps=240)
    assert found.meta["training"]["explained_variance"] > 0.85
    assert found.meta["training"]["l0"] == pytest.approx(K, rel=0.05)


def test_progress_is_told_and_the_screen_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[TrainingProgress] = []
    train(tmp_path / "sae", activations(4000), steps=120, progress=told.append)
    assert [each.step for each in told] == [50, 100, 120]
    assert all(each.steps == 120 and math.isfinite(each.loss) for each in told)
    assert told[-1].loss < told[0].loss
    assert capsys.readouterr() == ("", "")
    if "wandb" in sys.modules:
        assert sys.modules["wandb"].run is None


def test_it_belongs_to_the_model_it_was_trained_on(tmp_path: Path) -> None:
    model = model_of("llama")
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    found = train(tmp_path / "sae", x, steps=2, model=model)
    assert found.meta["model_name"] == model.name
    check_fits(found, model)
    with pytest.raises(MismatchError, match="another model"):
        check_fits(found, model_of("qwen2"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", -4), ("steps", 0), ("d_sae", 0), ("k", 0), ("batch_tokens", 0), ("lr", math.nan),
        ("lr", -1.0), ("lr", 0.0), ("seed", 2**32), ("seed", -1),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_and_leaves_nothing(
    setting: str, value: float, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{setting} must be .*got {value}"):
        train_sae(activations(1000), SITE, tmp_path / "sae", **{setting: value})
    assert list(tmp_path.iterdir()) == []


def test_impossible_settings_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    out, x = tmp_path / "sae", activations(4000)
    with pytest.raises(UnknownSiteError):
        train_sae(x, "blocks.1.resid", out)
    with pytest.raises(InputError, match="too few"):
        train(out, x[:300])
    with pytest.raises(InputError, match="k must be"):
        train(out, x, k=D_SAE)
    with pytest.raises(InputError, match="too few: 51 are held out"):  # too few only beside those
        train(out, x[: 2 * BATCH])
    with pytest.raises(InputError, match="every activation is 0"):
        train(out, torch.zeros(2000, D_MODEL))
    with pytest.raises(InputError, match="steps must be given"):
        train(out, [x], steps=None)
    with pytest.raises(InputError, match="ran out before step 20"):
        train(out, x.split(500), steps=20)
    with pytest.raises(InputError, match="end after 4000"):
        train(out, x.split(500), steps=2000)
    with pytest.raises(NonFiniteError):
        train(out, torch.where(x > 1e9, x, torch.nan))
    with pytest.raises(NonFiniteError):
        train(out, [x, x / 0], steps=16)
    with pytest.raises(NonFiniteError, match="lower lr"):
        train(out, x, lr=1e30, steps=60)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    out, x = tmp_path / "sae", activations(2000)
    first = train(out, x, steps=2)
    with pytest.raises(InputError, match="exists"):
        train(out, x, steps=2, seed=1)
    assert load_sae(out).digest == first.digest
    assert train(out, x, steps=2, seed=1, overwrite=True).digest != first.digest
