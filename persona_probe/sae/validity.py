"""Does a dictionary describe both models, and does it hold what the fine-tune changed?

A dictionary is trained on the base. On the fine-tuned model it may reconstruct badly, or well while
missing exactly what changed; then its latents cannot explain the fine-tune, which is a result and
not a failure.

With h the activations of one model at the counted tokens, f = encode(h) and h' = decode(f):

    explained variance   1 - sum ||h - h'||^2 / sum ||h - mean h||^2, about each model's own mean
    change inside        1 - sum ||dh - df W_dec||^2 / sum ||dh||^2, dh and df tuned minus base
    mean change inside   the same of the mean dh: of a steady shift of all tokens, like a persona's

Both shares can be negative: then predicting no change would be nearer the truth than the dictionary
is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.sae.encode import SparseCodes, decode, encode
from persona_probe.sae.load import Dictionary, check_fits

Gate = Literal["pass", "unchanged", "misfit", "drop", "outside"]


@dataclass(frozen=True)
class Limits:
    """Where the gate closes."""

    explained_variance: float = 0.5
    """Least on the base: below, the dictionary is not one of this model and site."""
    drop: float = 0.1
    """Most that explained variance may fall from base to tuned."""
    inside: float = 0.1
    """Least share of the change, token by token or of its mean, that must lie in the dictionary."""


@dataclass(frozen=True)
class Validity:
    """How far a dictionary may be believed on a pair of models."""

    explained_variance_base: float
    explained_variance_tuned: float
    l0_base: float
    """Latents that fire on a token, on average."""
    l0_tuned: float
    dead_base: float
    """Share of the latents that fire on none of the tokens read here; on few tokens most are
    silent.
    """
    dead_tuned: float
    change_inside: float | None
    """Share of sum ||dh||^2 that the dictionary explains; None where nothing changed, and where the
    models were not read together.
    """
    mean_change_inside: float | None
    """Share of ||mean dh||^2 that the dictionary explains; None where nothing changed."""
    change_norm: float
    """Root of sum ||dh||^2 over sum ||h - mean h||^2 of the base: how large the change is."""
    tokens: int
    gate: Gate
    """`pass`, or why not: `unchanged` (the models agree here), `misfit` (not this model's
    dictionary), `drop` (it describes the base but not the tuned model), `outside` (the change is
    not in this dictionary)."""
    reason: str
    """The gate in a sentence, with the figures."""


def validity(
    pair: ModelPair,
    dictionary: Dictionary,
    rendered: Sequence[Rendered],
    mask: TokenMask | None = None,
    *,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
) -> Validity:
    """Read `rendered` with both models and measure `dictionary` on the tokens of `mask` (all, by
    default).

    Raises `UnknownSiteError`, `MismatchError` (the dictionary does not fit the models),
    `InputError` (nothing to read), `NonFiniteError`."""
    return validities(pair, [dictionary], rendered, mask, limits=limits, batch_tokens=batch_tokens)[0]


def validities(
    pair: ModelPair,
    dictionaries: Sequence[Dictionary],
    rendered: Sequence[Rendered],
    mask: TokenMask | None = None,
    *,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Validity]:
    """`validity` of several dictionaries, of any sites, in one pass over `rendered`; in their order.

    `progress` is called with the tokens that were counted.
    """
    for dictionary in dictionaries:
        check_fits(dictionary, pair.base)
        check_reads(dictionary, pair.tuned)
    placed = [dictionary.to(pair.base.device) for dictionary in dictionaries]
    sums = [FitSums(one.d_model, one.d_sae) for one in placed]
    sites = [one.site for one in placed]
    chosen = mask or TokenMask("all")
    for chunk in stream((pair.base, pair.tuned), rendered, sites, chosen, batch_tokens=batch_tokens):
        for one, its in zip(placed, sums, strict=True):
            base, tuned = (chunk.activations[i, one.site].to(pair.base.device) for i in range(2))
            its.add(one, base, tuned)
        if progress is not None:
            progress(sums[0].tokens)
    return [its.validity(limits or Limits()) for its in sums]


def check_reads(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Raise unless `dictionary` can read `lm`, which may be a fine-tune of the model that it was trained
    on: as `check_fits`, and other weights are no matter. Raises `UnknownSiteError`, `MismatchError`."""
    check_fits(replace(dictionary, meta={**dictionary.meta, "model_digest": None}), lm)


class FitSums:
    """Mergeable fp64 sums behind `Validity`: add chunks, merge shards, then ask."""

    def __init__(self, d_model: int, d_sae: int) -> None:
        self.tokens = 0
        self.mean_sum: Float64[Tensor, "2 d_model"] = torch.zeros(2, d_model, dtype=torch.float64)
        self.square: Float64[Tensor, " 2"] = torch.zeros(2, dtype=torch.float64)
        self.error: Float64[Tensor, " 2"] = torch.zeros(2, dtype=torch.float64)
        self.fired: Int[Tensor, "2 d_sae"] = torch.zeros(2, d_sae, dtype=torch.long)
        self.change_square = 0.0
        self.change_error = 0.0
        self.change_error_sum: Float64[Tensor, " d_model"] = torch.zeros(d_model, dtype=torch.float64)

    @torch.no_grad()
    def add(
        self,
        dictionary: Dictionary,
        base: Float[Tensor, "token d_model"],
        tuned: Float[Tensor, "token d_model"],
    ) -> None:
        """Count the same tokens of both models."""
        self.add_codes(dictionary, (base, tuned), [encode(dictionary, h) for h in (base, tuned)])

    @torch.no_grad()
    def add_codes(
        self,
        dictionary: Dictionary,
        read: Sequence[Float[Tensor, "token d_model"]],
        codes: Sequence[SparseCodes],
    ) -> None:
        """The same with base and tuned codes that are already there."""
        self.tokens += read[0].shape[0]
        wide: list[Tensor] = []
        errors: list[Tensor] = []
        for i in range(2):
            h = read[i].double().cpu()
            error = h - decode(dictionary, codes[i]).double().cpu()
            self.mean_sum[i] += h.sum(dim=0)
            self.square[i] += h.square().sum()
            self.error[i] += error.square().sum()
            self.fired[i] += codes[i].latent_index.cpu().bincount(minlength=dictionary.d_sae)
            wide.append(h)
            errors.append(error)
        # dh - df W_dec is the difference of the two reconstruction errors: b_dec cancels
        missed = errors[1] - errors[0]
        self.change_square += float((wide[1] - wide[0]).square().sum())
        self.change_error += float(missed.square().sum())
        self.change_error_sum += missed.sum(dim=0)

    def merge(self, other: FitSums) -> FitSums:
        """Add the sums of another shard; returns this one."""
        self.tokens += other.tokens
        self.change_square += other.change_square
        self.change_error += other.change_error
        for name in ("mean_sum", "square", "error", "fired", "change_error_sum"):
            getattr(self, name).add_(getattr(other, name))
        return self

    def validity(self, limits: Limits) -> Validity:
        """The figures over everything that was added, and the gate they lead to."""
        mean = self.mean_sum / self.tokens
        spread = (self.square - self.tokens * mean.square().sum(dim=1)).clamp(min=0)
        explained = [1 - _ratio(float(self.error[i]), float(spread[i])) for i in range(2)]
        shift = float((mean[1] - mean[0]).square().sum())
        missed_shift = float((self.change_error_sum / self.tokens).square().sum())
        inside = 1 - self.change_error / self.change_square if self.change_square > 0 else None
        mean_inside = 1 - missed_shift / shift if shift > 0 else None
        gate, reason = _judge(explained, inside, mean_inside, limits)
        l0 = self.fired.double().sum(dim=1) / self.tokens
        dead = (self.fired == 0).double().mean(dim=1)
        return Validity(
            explained_variance_base=explained[0],
            explained_variance_tuned=explained[1],
            l0_base=float(l0[0]),
            l0_tuned=float(l0[1]),
            dead_base=float(dead[0]),
            dead_tuned=float(dead[1]),
            change_inside=inside,
            mean_change_inside=mean_inside,
            change_norm=math.sqrt(_ratio(self.change_square, float(spread[0]))),
            tokens=self.tokens,
            gate=gate,
            reason=reason,
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


def _judge(
    explained: Sequence[float], inside: float | None, mean_inside: float | None, limits: Limits
) -> tuple[Gate, str]:
    base, tuned = explained
    figures = f"explained variance {base:.3f} on the base and {tuned:.3f} on the tuned model"
    if not base >= limits.explained_variance:
        return "misfit", (
            f"{figures}: below {limits.explained_variance} on the base, so it is not a dictionary "
            "of this model and site"
        )
    if inside is None and mean_inside is None:
        return "unchanged", f"{figures}: the two models do not differ at this site"
    if not base - tuned <= limits.drop:
        return "drop", (
            f"{figures}: it falls by more than {limits.drop}, so it does not describe the tuned model"
        )
    shares = [(inside, "the change"), (mean_inside, "the mean change")]
    known = [(share, what) for share, what in shares if share is not None]
    figures += "; in the dictionary lies " + ", ".join(f"{share:.3f} of {what}" for share, what in known)
    if max(share for share, _ in known) < limits.inside:
        return "outside", f"{figures}: the change is not in this dictionary"
    return "pass", figures
