"""The diff by definition: loops over conversations, tokens and latents, in fp64, sharing no code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

import torch
from scipy import stats
from torch import Tensor

from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary


def activations(model: LanguageModel, text: Rendered, block: int) -> Tensor:
    """blocks.<block>.hook_resid_post of one conversation, alone and unpadded."""
    with torch.no_grad():
        states = model.hf(torch.tensor([text.ids]), output_hidden_states=True).hidden_states
    return states[block + 1][0].double()


def latents_of(sae: Dictionary, h: Tensor) -> list[float]:
    """One token's latents, one dot product at a time."""
    x = [float(v) for v in h]
    if sae.apply_b_dec_to_input:
        x = [v - float(b) for v, b in zip(x, sae.b_dec, strict=True)]
    pre = [
        math.fsum(v * float(w) for v, w in zip(x, sae.W_enc[:, j], strict=True)) + float(sae.b_enc[j])
        for j in range(sae.d_sae)
    ]
    if sae.threshold is not None:
        return [max(p, 0.0) if p > float(sae.threshold[j]) else 0.0 for j, p in enumerate(pre)]
    if sae.k is not None:
        best = set(sorted(range(len(pre)), key=lambda j: -pre[j])[: sae.k])
        return [max(p, 0.0) if j in best else 0.0 for j, p in enumerate(pre)]
    return [max(p, 0.0) for p in pre]


def counted(text: Rendered, special: frozenset[int]) -> list[int]:
    """The last prompt token, and the answer's tokens that are not special."""
    last = text.prompt_length - 1
    return [
        i
        for i in range(len(text.ids))
        if i == last or (i > last and text.response[i] and text.ids[i] not in special)
    ]


def per_conversation(
    model: LanguageModel, sae: Dictionary, texts: Sequence[Rendered], block: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Mean activation and share of tokens firing, per conversation and latent."""
    means: list[list[float]] = []
    fires: list[list[float]] = []
    for text in texts:
        h = activations(model, text, block)
        codes = [latents_of(sae, h[i]) for i in counted(text, model.special_ids)]
        means.append([fmean(column) for column in zip(*codes, strict=True)])
        fires.append([fmean(float(v > 0) for v in column) for column in zip(*codes, strict=True)])
    return means, fires


def clustered(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """A mean over conversations and its standard error, clusters being drawn."""
    mean = fmean(values)
    names = sorted(set(clusters))
    left = [math.fsum(v - mean for v, c in zip(values, clusters, strict=True) if c == name) for name in names]
    k = len(names)
    return mean, math.sqrt(k / (k - 1) * math.fsum(x * x for x in left)) / len(values)


def table(
    models: Sequence[LanguageModel],
    sae: Dictionary,
    texts: Sequence[Rendered],
    clusters: Sequence[str],
    block: int,
) -> list[dict[str, float]]:
    """One row per latent, in the order of their numbers; models are base, tuned, benign ones."""
    read = [per_conversation(model, sae, texts, block) for model in models]
    quantile = float(stats.t.ppf(0.975, len(set(clusters)) - 1))
    rows: list[dict[str, float]] = []
    for j in range(sae.d_sae):
        column = [[means[j] for means in each[0]] for each in read]
        fires = [fmean(fired[j] for fired in each[1]) for each in read]
        shifts = [[t - b for t, b in zip(tuned, column[0], strict=True)] for tuned in column[1:]]
        delta, error = clustered(shifts[0], clusters)
        row = {
            "mean_base": fmean(column[0]), "mean_tuned": fmean(column[1]), "delta": delta,
            "low": delta - quantile * error, "high": delta + quantile * error,
            "fires_base": fires[0], "fires_tuned": fires[1],
        }  # fmt: skip
        if len(models) > 2:
            benign = [fmean(shift) for shift in shifts[1:]]
            row["benign_mean"] = fmean(benign)
            row["benign_max"] = max(benign, key=abs)
            row["did"] = delta - fmean(benign)
            row["between"] = variance(benign)
        rows.append(row)
    return rows
