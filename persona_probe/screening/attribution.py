"""Gradient attribution: the first-order effect of each candidate's cure on the margin.

One backward pass estimates every carrier of a site at once: the edit moves the residual stream by
``delta_k u_k`` at each token, so the margin changes by about ``sum_tokens delta_k (g . u_k)``, where g is
the gradient of the margin there. First order only: it ranks candidates for the exact stages, and what it
misses (effects that saturate or cancel) those stages cannot bring back, so it should keep many.

Source: attribution patching (Nanda 2023); the edit here is the cap to the base model's mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.hooks.edit import edit_at
from persona_probe.model.chat import pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.memory import halving
from persona_probe.screening.candidate import Carrier
from persona_probe.screening.margin import Contrast, documents_that_fit


def attributions(
    lm: LanguageModel,
    contrasts: Sequence[Contrast],
    carriers: Sequence[Carrier],
    *,
    batch: int | None = None,
) -> Float[Tensor, " carrier"]:
    """Estimated change of the mean margin (nats per token) when each carrier alone is cured at gain 1.

    Negative is a cure. ``lm`` is the tuned model. ``batch`` documents are read at once, by default as
    many as there is memory for.
    """
    size = batch or documents_that_fit(lm, contrasts, copies=3)
    return halving(lambda size: _attributions(lm, contrasts, carriers, size), size)


def _attributions(
    lm: LanguageModel, contrasts: Sequence[Contrast], carriers: Sequence[Carrier], batch: int
) -> Float[Tensor, " carrier"]:
    sites = list(dict.fromkeys(carrier.site for carrier in carriers))
    members = {site: [i for i, c in enumerate(carriers) if c.site == site] for site in sites}
    total = torch.zeros(len(carriers), dtype=torch.float64)
    signed = [(c.tuned, 1.0) for c in contrasts] + [(c.base, -1.0) for c in contrasts]
    parameters = [p for p in lm.hf.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        for start in range(0, len(signed), batch):
            part = signed[start : start + batch]
            documents = [document for document, _ in part]
            sign = torch.tensor([s for _, s in part])
            ids, mask, position_ids = pad(documents, lm.pad_id, side="right")
            leaves: dict[str, Tensor] = {}
            seen: dict[str, Tensor] = {}

            def probe(site: str, x: Tensor, leaves: dict[str, Tensor], seen: dict[str, Tensor]) -> Tensor:
                leaves[site] = torch.zeros_like(x, requires_grad=True)
                seen[site] = x.detach()
                return x + leaves[site]

            edits = {
                site: lambda x, site=site, leaves=leaves, seen=seen: probe(site, x, leaves, seen)
                for site in sites
            }
            with torch.enable_grad(), lm.active() as model, edit_at(lm.hf, edits):
                output = model(
                    input_ids=ids.to(lm.device),
                    attention_mask=mask.to(lm.device),
                    position_ids=position_ids.to(lm.device),
                    use_cache=False,
                )
                logits = output.logits[:, :-1].float()
                targets = ids[:, 1:].to(logits.device)
                log_p = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
                weight = torch.zeros(ids.shape)
                for row, document in enumerate(documents):
                    response = torch.tensor(document.response, dtype=torch.float32)
                    weight[row, : len(response)] = response / response.sum()
                margin = (log_p * (weight[:, 1:] * sign[:, None]).to(log_p.device)).sum()
                gradients = torch.autograd.grad(margin, [leaves[site] for site in sites])
            real = mask.bool()
            for site, gradient in zip(sites, gradients, strict=True):
                units = torch.stack([carriers[i].unit for i in members[site]]).to(gradient)
                means = torch.tensor([carriers[i].base_mean for i in members[site]]).to(gradient)
                rising = torch.tensor([carriers[i].rises for i in members[site]])
                excess = means - seen[site][real.to(gradient.device)] @ units.T
                delta = torch.where(rising.to(excess.device), excess.clamp(max=0), excess.clamp(min=0))
                effect = delta * (gradient[real.to(gradient.device)] @ units.T)
                total[members[site]] += effect.sum(dim=0).double().cpu()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    return (total / len(contrasts)).float()
