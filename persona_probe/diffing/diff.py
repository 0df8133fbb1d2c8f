"""Rank latents by how far a fine-tune moved them.

Wang et al. 2025 ("Persona features control emergent misalignment", section 3): mean latent
activation after fine-tuning minus before, on the same token ids. Each conversation is a prompt with
an answer (by convention the base model's own greedy one: `answers` records whose); counted are the
last prompt token, which produces the first word of the answer, and the answer. Mean over tokens,
then over conversations.

Departures: an interval from questions, and benign fine-tunes as the null. Without them the shift is
    described and not tested, because every fine-tune moves a large part of all latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import numpy as np
import polars as pl
import torch
from jaxtyping import Float64, Int
from scipy import special
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.diffing.latent_diff import LatentDiff
from persona_probe.diffing.means import check_clusters, site_means
from persona_probe.diffing.significance import against_benign
from persona_probe.diffing.statistics import (
    Block,
    LatentSums,
    MeanSums,
    cluster_mean,
    number_clusters,
)
from persona_probe.errors import InputError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.sae.encode import encode
from persona_probe.sae.load import Dictionary, check_fits
from persona_probe.sae.validity import FitSums, Limits

Answers = Literal["base", "tuned", "both", "none"]

RARE = 3
"""A latent is tested when it fires in at least so many clusters, in any of the models."""


@overload
def diff(
    pair: ModelPair,
    dictionary: Dictionary,
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> LatentDiff: ...


@overload
def diff(
    pair: ModelPair,
    dictionary: Sequence[Dictionary],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LatentDiff]: ...


def diff(
    pair: ModelPair,
    dictionary: Dictionary | Sequence[Dictionary],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    *,
    benign: Sequence[LanguageModel] = (),
    answers: Answers = "base",
    mask: TokenMask | None = None,
    confidence: float = 0.95,
    limits: Limits | None = None,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> LatentDiff | dict[str, LatentDiff]:
    """Compare the latents of `pair` (and of `benign` fine-tunes of the same base) on `rendered`
    conversations.

    Args:
        dictionary: one, or several of different sites: all are read in one pass, and a dict by site
            is returned.
        rendered: prompts with answers; every model reads these ids.
        clusters: the question each conversation belongs to (each its own, by default): the sampling
            unit.
        benign: two or more make q-values; one gives a difference in differences without.
        answers: whose answers these are. Recorded; sets with different answers may rank
            differently.
        mask: which tokens count; by default the last prompt token and the answer.
        confidence: of `low` and `high`.
        limits: where the dictionary's gate closes.
        batch_tokens: padded tokens per forward pass.
        progress: called with the conversations read and to read.

    Raises:
        MismatchError: models, dictionary and conversations that do not belong together.
        UnknownSiteError: a dictionary's site is not in the models.
        InputError: nothing to read, or two dictionaries of one site.
        NonFiniteError: a NaN or infinity in an activation.
    """
    dictionaries = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    models = (pair.base, pair.tuned, *benign)
    _check(pair, dictionaries, benign)
    mask = mask or TokenMask("answer")
    numbers, names = number_clusters(check_clusters(clusters, rendered))
    device = pair.base.device
    readers = [_Reader(one.to(device), len(models), len(names)) for one in dictionaries]
    sinks = 0
    for chunk in stream(
        models, rendered, [one.site for one in dictionaries], mask, batch_tokens=batch_tokens
    ):
        sinks += chunk.sinks
        for reader in readers:
            site = reader.dictionary.site
            read = [chunk.activations[i, site].to(device) for i in range(len(models))]
            reader.add(chunk.document, numbers, read)
        if progress is not None:
            progress(len(readers[0].latents.tokens), len(rendered))
    found = {
        original.site: LatentDiff(
            table=_table(reader, numbers, len(names), len(benign), confidence),
            dictionary=original,
            validity=reader.fit.validity(limits or Limits()),
            means=site_means(original.site, reader.means),
            models=tuple(model.name for model in models),
            answers=answers,
            mask=mask,
            confidence=confidence,
            conversations=len(reader.latents.tokens),
            clusters=int((reader.means.conversations > 0).sum()),
            tokens=reader.means.tokens,
            sinks=sinks,
        )
        for original, reader in zip(dictionaries, readers, strict=True)
    }
    return found[dictionary.site] if isinstance(dictionary, Dictionary) else found


class _Reader:
    """All sums over one dictionary."""

    def __init__(self, dictionary: Dictionary, n_models: int, n_clusters: int) -> None:
        self.dictionary = dictionary
        self.latents = LatentSums(n_models, dictionary.d_sae)
        self.means = MeanSums(n_models, n_clusters, dictionary.d_model)
        self.fit = FitSums(dictionary.d_model, dictionary.d_sae)

    def add(
        self,
        document: Int[Tensor, " token"],
        clusters: Int[Tensor, " conversation"],
        read: Sequence[Tensor],
    ) -> None:
        codes = [encode(self.dictionary, activation) for activation in read]
        self.latents.add(document, codes)
        self.means.add(document, clusters, read)
        self.fit.add_codes(self.dictionary, read[:2], codes[:2])


def _check(pair: ModelPair, dictionaries: Sequence[Dictionary], benign: Sequence[LanguageModel]) -> None:
    if not dictionaries:
        raise InputError("no dictionary given", fix="without one, use mean_difference")
    for model in benign:
        ModelPair(pair.base, model)
    seen: dict[str, str] = {}
    for one in dictionaries:
        if one.site in seen:
            raise InputError(
                f"two dictionaries read {one.site}: {seen[one.site]} and {one.path}",
                fix="compare them in two calls",
            )
        seen[one.site] = one.path
        check_fits(one, pair.base)  # it was trained on the base; the others have other weights


def _table(
    reader: _Reader,
    clusters: Int[Tensor, " conversation"],
    n_clusters: int,
    n_benign: int,
    confidence: float,
) -> pl.DataFrame:
    conversations = reader.means.conversations
    used = int((conversations > 0).sum())
    blocks = [
        _columns(block, conversations, n_benign) for block in reader.latents.blocks(clusters, n_clusters)
    ]
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    half = columns["error"] * (float(special.stdtrit(used - 1, (1 + confidence) / 2)) if used > 1 else np.nan)
    table: dict[str, object] = {
        "index": np.arange(reader.dictionary.d_sae),
        **{name: columns[name] for name in ("mean_base", "mean_tuned", "delta")},
        "low": columns["delta"] - half,
        "high": columns["delta"] + half,
        **{name: columns[name] for name in ("fires_base", "fires_tuned")},
        "max_base": reader.latents.maximum[0].double().numpy(),
        "max_tuned": reader.latents.maximum[1].double().numpy(),
    }
    missing = np.full(reader.dictionary.d_sae, np.nan)
    table |= {name: columns.get(name, missing) for name in ("benign_mean", "benign_max", "did")}
    if n_benign >= 2 and used >= 2:
        tested = against_benign(
            columns["did"],
            columns["did_error"],
            columns["between"],
            columns["within"],
            columns["unit"],
            n_benign=n_benign,
            n_clusters=used,
            tested=columns["spread"] >= min(RARE, used),
        )
        table |= {"z": tested.z, "p_value": tested.p, "q_value": tested.q}
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            table["z"] = np.where(columns["delta"] == 0, 0.0, columns["delta"] / columns["error"])
        table |= {"p_value": missing, "q_value": missing}
    schema = {name: pl.Int64 if name == "index" else pl.Float64 for name in table}
    frame = pl.DataFrame(table, schema=schema, nan_to_null=True)
    return frame.sort(pl.col("delta").abs(), descending=True, maintain_order=True)


def _columns(
    block: Block, conversations: Int[Tensor, " cluster"], n_benign: int
) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Every estimate of a run of latents that needs the cluster sums."""
    activation = block.activation
    base = activation[0]
    shift = cluster_mean(activation[1] - base, conversations)
    mean = [cluster_mean(sums, conversations).mean for sums in activation[:2]]
    fires = [cluster_mean(sums, conversations).mean for sums in block.fires[:2]]
    out: dict[str, Tensor] = {
        "mean_base": mean[0],
        "mean_tuned": mean[1],
        "delta": shift.mean,
        "error": shift.error,
        "fires_base": fires[0],
        "fires_tuned": fires[1],
        "spread": (block.fires > 0).any(dim=0).sum(dim=0).double(),
    }
    if n_benign:
        moved = activation[2:] - base
        centre = moved.mean(dim=0)
        shifts = torch.stack([cluster_mean(sums, conversations).mean for sums in moved])
        largest = shifts.abs().argmax(dim=0, keepdim=True)
        against = cluster_mean(activation[1] - base - centre, conversations)
        out |= {
            "benign_mean": shifts.mean(dim=0),
            "benign_max": shifts.gather(0, largest)[0],
            "did": against.mean,
            "did_error": against.error,
        }
        if n_benign >= 2:
            own = [cluster_mean(sums, conversations).error for sums in activation]
            out |= {
                "between": shifts.var(dim=0),
                "within": _interaction(moved, conversations),
                "unit": torch.stack(own).square().mean(dim=0),
            }
    return {name: column.numpy() for name, column in out.items()}


def _interaction(
    tunes: Float64[Tensor, "model cluster latent"], conversations: Int[Tensor, " cluster"]
) -> Float64[Tensor, " latent"]:
    """Variance of one tune's shift that comes of which questions were asked.

    What all tunes share on a question cancels between them, so each tune's deviation from their
    mean is taken; the deviations of J tunes have J - 1 degrees of freedom."""
    left = tunes - tunes.mean(dim=0)
    errors = torch.stack([cluster_mean(sums, conversations).error for sums in left])
    return errors.square().sum(dim=0) / (len(tunes) - 1)
