"""Train a dictionary on a base model's activations, with sae-lens's own training classes and trainer.

The kinds are those of `architectures`; by default BatchTopK (Bussmann et al. 2024) with the auxiliary
loss for dead latents (Gao et al. 2024). Departures, each because pocket-sized runs have hundreds of steps
and not hundreds of thousands:

- `b_dec` starts at the mean activation instead of 0.
- The window after which a silent latent counts as dead (and is revived by the auxiliary loss) is a
  share of the run; sae-lens's default of 1,000 steps would never end.
- The inference threshold of a BatchTopK or Matryoshka dictionary is not the trainer's moving average
  (`topk_threshold_lr` 0.01 lags behind the weights and starts at 0) but set after training so that exactly
  `k` latents fire a token on average, on tokens it was trained on.

What was reached on tokens that it never saw is in the metadata.

Not covered: several dictionaries in one pass, crosscoders, training on more than one device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import BatchTopKTrainingSAE, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from persona_probe.artifact import atomic_folder, check_replaceable, digest_of
from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.hooks.sites import parse_site
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.architectures import Architecture, Sparsity, new_sae
from persona_probe.sae.checkpoints import Checkpoints
from persona_probe.sae.encode import decode, encode
from persona_probe.sae.feed import Feed
from persona_probe.sae.load import Dictionary, load_sae, weights_digest
from persona_probe.sae.pools import PooledFeed
from persona_probe.sae.source import TokenSource

_KNOWN_BY = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training run stands, for a progress bar."""

    step: int
    steps: int
    loss: float
    """Of this step's batch: squared error summed over d_model, activations scaled to norm
    sqrt(d_model).
    """
    dead: int
    """Latents that have not fired within the dead window, `dead_share` of all."""
    explained_variance: float
    """Of this step's batch, about its own mean."""
    l0: float
    """Latents that fire on a token of the batch, on average."""
    dead_share: float


@dataclass(frozen=True)
class TrainingFigures:
    """How good the saved inference dictionary is, on held-out tokens."""

    explained_variance: float
    """1 - sum ||x - x_hat||^2 / sum ||x - mean||^2, with the saved threshold."""
    explained_variance_batchtopk: float | None
    """The same with training's rule (the k best per token on average, within the batch); None where that
    is also the rule of the saved one.
    """
    l0: float
    """Latents that fire on a token, with the saved threshold."""
    dead: float
    """Share of latents that fire on none of the held-out tokens."""
    held_out_tokens: int
    trained_tokens: int


def train_sae(
    activations: Float[Tensor, "token d_model"] | Iterable[Float[Tensor, "token d_model"]] | TokenSource,
    site: str,
    out: str | os.PathLike[str],
    *,
    architecture: Architecture = "batchtopk",
    d_sae: int | None = None,
    k: int | None = None,
    l1: float | None = None,
    steps: int | None = None,
    batch_tokens: int = 1024,
    lr: float | None = None,
    seed: int = 0,
    model: LanguageModel | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    checkpoint_seconds: float = 300.0,
    progress: Callable[[TrainingProgress], None] | None = None,
) -> Dictionary:
    """Train on `activations` of `site` and save to the folder `out`, which sae-lens opens (what BatchTopK
    and Matryoshka training makes as a JumpReLU SAE).

    `activations` is a `TokenSource` (a store's, or what a model makes of documents when it is needed:
    see `stored_tokens` and `live_tokens`), one tensor (drawn in shuffled passes) or an iterable of
    chunks (mixed in a buffer; not restarted, so `steps` must be given and there must be enough of
    it). `architecture` is one of `architectures`: how sparse it is to be is told by `k` (16 by default),
    or by `l1` (0.2 sqrt(d_model)) for those that take a price. `d_sae` defaults to 8 d_model, `steps` to
    one pass, `lr` to 4e-3 sqrt(1536 / d_sae) (found at 1,536 latents and 600 steps); it warms up over a
    twentieth of the run and falls to 0 over the last fifth. `model` is where the activations come from:
    its name and the digest of its weight files are recorded, so that the dictionary is refused on another
    model; a source knows it by itself.

    A run on a source can be killed: called again with the same settings it goes on from its last
    checkpoint (one every `checkpoint_seconds`, in a hidden folder beside `out`), to the same weights
    bit for bit; finished, it is not done again.

    Returns the saved dictionary; `meta["training"]` has `TrainingFigures` and the settings. `out`
    is written whole or not at all.

    Raises `InputError` (too few tokens, k or d_sae out of range, `out` exists, a checkpoint of other
    settings), `NonFiniteError`.
    """
    parse_site(site)
    sparsity = Sparsity(architecture, k, l1)
    check_settings(d_sae, steps, batch_tokens, lr, seed)
    out = Path(out)
    source = activations if isinstance(activations, TokenSource) else None
    run: dict[str, Any] = {}
    if source is not None:
        asked = {"steps": steps, "batch_tokens": batch_tokens, "lr": lr, "seed": seed}
        kind = {"architecture": architecture, "d_sae": d_sae, "k": k, "l1": l1}
        run = {"site": site, **kind, **asked, "data": source.digest}
        if source.site != site:
            raise MismatchError(
                f"these are activations of {source.site}, not of {site}", fix=f"site={source.site!r}"
            )
        if (done := _done(out, digest_of(run))) is not None:
            return done
    check_replaceable(out, overwrite, _KNOWN_BY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        feed: Feed | PooledFeed
        if isinstance(activations, TokenSource):
            feed = PooledFeed(activations, batch_tokens, steps, device, seed)
        else:
            feed = Feed(activations, batch_tokens, steps, device)
        width = feed.held_out.shape[1]
        d_sae = latents_for(width, d_sae)
        sparsity = sparsity.settled(width, d_sae)
        if lr is None:
            lr = 4e-3 * math.sqrt(1536 / d_sae)
        settings: dict[str, Any] = {
            "architecture": architecture,
            "d_sae": d_sae,
            **sparsity.said,
            "steps": feed.steps,
            "batch_tokens": batch_tokens,
            "lr": lr,
            "seed": seed,
        }
        metadata = SAEMetadata(hook_name=site, **_made_from(model, source))
        sae = new_sae(sparsity, width, d_sae, steps=feed.steps, device=device, metadata=metadata)
        trainer = SAETrainer(
            cfg=_trainer_config(feed.steps, batch_tokens, lr, device), sae=sae, data_provider=feed
        )
        # sae-lens would estimate this from 1,000 batches of the stream; the mean norm needs far
        # fewer tokens
        mean_norm = float(feed.held_out.norm(dim=-1).mean())
        if mean_norm == 0.0:
            raise InputError("every activation is 0; was the right site captured?")
        scale = math.sqrt(width) / mean_norm
        trainer.activation_scaler.scaling_factor = scale
        sae.b_dec.data.copy_(feed.held_out.mean(dim=0) * scale)
        if isinstance(feed, PooledFeed):
            settings["run"] = digest_of(run)
            with Checkpoints.open(out, run, checkpoint_seconds, overwrite) as checkpoints:
                _fit(trainer, feed, progress, checkpoints)
                found = _finish(trainer, feed, out, settings, overwrite)
                checkpoints.discard()
            return found
        _fit(trainer, feed, progress, None)
        return _finish(trainer, feed, out, settings, overwrite)


def check_settings(
    d_sae: int | None, steps: int | None, batch_tokens: int, lr: float | None, seed: int
) -> None:
    """Raise `InputError` for a setting that no training can have, whatever it trains on."""
    for name, value in {"d_sae": d_sae, "steps": steps, "batch_tokens": batch_tokens}.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr must be a finite number above 0, got {lr}", fix="leave it out, or try 0.001")
    if not 0 <= seed < 2**32:  # shards and pools derive their own from it, which must fit into 64 bits
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {seed}")


def latents_for(d_model: int, d_sae: int | None) -> int:
    """`d_sae`, or 8 d_model where it is None."""
    return 8 * d_model if d_sae is None else d_sae


def _finish(
    trainer: SAETrainer[Any, Any],
    feed: Feed | PooledFeed,
    out: Path,
    settings: dict[str, Any],
    overwrite: bool,
) -> Dictionary:
    sae: TrainingSAE[Any] = trainer.sae
    scale = trainer.activation_scaler.scaling_factor
    assert scale is not None
    trainer.activation_scaler.scaling_factor = None
    sae.fold_activation_norm_scaling_factor(scale)
    sae.eval()
    if isinstance(sae, BatchTopKTrainingSAE):
        sae.topk_threshold.fill_(_threshold(sae, feed.recent(), int(settings["k"])))
    return _save(sae, out, feed, settings, overwrite)


def _done(out: Path, run: str) -> Dictionary | None:
    """The dictionary in `out`, when it is what this very run made."""
    if not (out / SAE_CFG_FILENAME).is_file():
        return None
    found = load_sae(out)
    return found if found.meta.get("training", {}).get("run") == run else None


def _made_from(model: LanguageModel | None, source: TokenSource | None) -> dict[str, str | None]:
    if model is not None:
        return {"model_name": model.checkpoint.name, "model_digest": weights_digest(model)}
    if source is not None:
        return {"model_name": source.model_name, "model_digest": source.model_digest}
    return {"model_name": None, "model_digest": None}


def _trainer_config(steps: int, batch_tokens: int, lr: float, device: str) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=steps * batch_tokens,
        train_batch_size_samples=batch_tokens,
        lr=lr,
        lr_end=lr,  # unused by the constant schedule, and refused when absent
        lr_scheduler_name="constant",
        lr_warm_up_steps=max(2, steps // 20),
        lr_decay_steps=max(1, steps // 5),
        device=device,
        dead_feature_window=max(20, min(1000, steps // 10)),
        n_checkpoints=0,
        logger=LoggingConfig(log_to_wandb=False),
    )


def _fit(
    trainer: SAETrainer[Any, Any],
    feed: Feed | PooledFeed,
    progress: Callable[[TrainingProgress], None] | None,
    checkpoints: Checkpoints | None,
) -> None:
    """The trainer's own `fit` without its progress bar: its public seams, step by step."""
    first = 1 if checkpoints is None else checkpoints.restore(trainer, feed) + 1
    for step in range(first, feed.steps + 1):
        output = trainer.step(next(feed))
        trainer.n_training_steps += 1
        if step % 50 == 0 or step == feed.steps:
            loss = float(output.loss.detach())
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss} at step {step} of {feed.steps}", fix="lower lr")
            if progress is not None:
                progress(_progress(trainer, output, step, feed.steps, loss))
        if checkpoints is not None and step < feed.steps:
            checkpoints.save_if_due(trainer, feed, step)


@torch.no_grad()
def _progress(
    trainer: SAETrainer[Any, Any], output: TrainStepOutput, step: int, steps: int, loss: float
) -> TrainingProgress:
    x = output.sae_in
    spread = float((x - x.mean(dim=0)).square().sum())
    return TrainingProgress(
        step=step,
        steps=steps,
        loss=loss,
        dead=int(trainer.dead_neurons.sum()),
        explained_variance=1 - float((x - output.sae_out).square().sum()) / spread
        if spread > 0
        else math.nan,
        l0=float(output.feature_acts.bool().sum()) / len(x),
        dead_share=float(trainer.dead_neurons.float().mean()),
    )


@torch.no_grad()
def _threshold(sae: BatchTopKTrainingSAE, x: Float[Tensor, "token d_model"], k: int) -> float:
    """The activation above which exactly `k` latents a token fire on `x`, on average."""
    positive = torch.cat(
        [pre[pre > 0] for part in x.split(2048) for pre in [sae.encode_with_hidden_pre(part)[1]]]
    )
    wanted = k * x.shape[0]
    if positive.numel() <= wanted:
        return 0.0
    # the largest value left out; between it and the next nothing lies, so `>` keeps exactly
    # `wanted`
    return float(positive.kthvalue(positive.numel() - wanted).values)


def _save(
    sae: TrainingSAE[Any], out: Path, feed: Feed | PooledFeed, settings: dict[str, Any], overwrite: bool
) -> Dictionary:
    with atomic_folder(out, overwrite=overwrite, known_by=_KNOWN_BY) as folder:
        sae.save_inference_model(folder)
        figures = _measure(sae, load_sae(folder), feed)
        path = folder / SAE_CFG_FILENAME
        config = json.loads(path.read_text())
        config["device"] = "cpu"  # where it was trained says nothing about where it will be read
        config["metadata"]["training"] = {**settings, **asdict(figures)}
        # sae-lens's order of keys differs from process to process
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return load_sae(out)


@torch.no_grad()
def _measure(sae: TrainingSAE[Any], dictionary: Dictionary, feed: Feed | PooledFeed) -> TrainingFigures:
    x = feed.held_out
    dictionary = dictionary.to(x.device)
    codes = encode(dictionary, x)
    total = float((x - x.mean(dim=0)).double().square().sum())
    left = float((x - decode(dictionary, codes)).double().square().sum())
    by_batches: float | None = None
    if isinstance(sae, BatchTopKTrainingSAE):
        # its rule ranks within a batch, so it is measured in batches of training's size
        missed = sum(
            float((part - sae.decode(sae.encode(part))).double().square().sum())
            for part in x.split(feed.batch_tokens)
        )
        by_batches = 1 - missed / total if total > 0 else math.nan
    fired = codes.latent_index.bincount(minlength=dictionary.d_sae)
    return TrainingFigures(
        explained_variance=1 - left / total if total > 0 else math.nan,
        explained_variance_batchtopk=by_batches,
        l0=len(codes.value) / x.shape[0],
        dead=float((fired == 0).double().mean()),
        held_out_tokens=x.shape[0],
        trained_tokens=feed.steps * feed.batch_tokens,
    )
