"""How much of the behaviour passes through each site: the base's activations put back, whole.

The widest edit there is: at one site the tuned model's residual stream is replaced by the base model's
on the same tokens. What that removes of the margin bounds what any latent or direction of the site can
remove. Little at every site means that the fine-tune acts behind them all: the wrong site, and not a
poor dictionary.

Source: activation patching (Vig et al. 2020; Meng et al. 2022), teacher-forced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.hooks.capture import capture_at
from persona_probe.hooks.edit import edit_at
from persona_probe.model.chat import Rendered, pad
from persona_probe.model.memory import halving
from persona_probe.model.pair import ModelPair
from persona_probe.screening.margin import (
    Contrast,
    documents_that_fit,
    margins,
    mean_log_probability,
)


@torch.no_grad()
def site_effects(
    pair: ModelPair, sites: Sequence[str], contrasts: Sequence[Contrast], *, batch: int | None = None
) -> dict[str, float]:
    """Share of the margin between the models that patching each site with the base removes (1: all).

    NaN where the two models have the same margin. ``batch`` documents are read at once, by default as
    many as there is memory for.
    """
    size = batch or documents_that_fit(pair.tuned, contrasts)
    return halving(lambda size: _effects(pair, sites, contrasts, size), size)


@torch.no_grad()
def _effects(
    pair: ModelPair, sites: Sequence[str], contrasts: Sequence[Contrast], batch: int
) -> dict[str, float]:
    tuned = float(margins(pair.tuned, contrasts, [()]).margin[0])
    base = float(margins(pair.base, contrasts, [()]).margin[0])
    effects: dict[str, float] = {}
    for site in sites:
        patched = 0.0
        for sign, documents in (
            (1.0, [contrast.tuned for contrast in contrasts]),
            (-1.0, [contrast.base for contrast in contrasts]),
        ):
            scores = [
                _patched(pair, site, documents[start : start + batch])
                for start in range(0, len(documents), batch)
            ]
            patched += sign * float(torch.cat(scores).mean())
        effects[site] = (tuned - patched) / (tuned - base) if tuned != base else float("nan")
    return effects


def _patched(pair: ModelPair, site: str, documents: Sequence[Rendered]) -> Float[Tensor, " document"]:
    ids, mask, _ = pad(documents, pair.base.pad_id, side="right")
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, document in enumerate(documents):
        counted[row, : len(document.ids)] = torch.tensor(document.response)
    with pair.base.active(), capture_at(pair.base.hf, [site]) as captured:
        captured.run(lambda: pair.base.forward(ids, mask))
    original = captured[site]
    with pair.tuned.active(), edit_at(pair.tuned.hf, {site: lambda x: original.to(x)}):
        return mean_log_probability(pair.tuned, ids, mask, counted)
