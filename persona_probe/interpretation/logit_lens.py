"""What a direction says and which latents are like it, read off the weights alone.

Logit lens (nostalgebraist 2020): the direction through the model's own final norm and unembedding,
as if it were the whole residual stream. A late latent's top tokens are what it makes more likely; an
early latent's may mean little, because later blocks still read it.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.errors import InputError
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
"""What architectures call the norm before the unembedding, within the decoder."""


class Lens(NamedTuple):
    """Tokens by how much a direction raises their logits."""

    top: tuple[tuple[str, float], ...]
    """(token, logit), most raised first; logits are relative to the mean over the vocabulary."""
    bottom: tuple[tuple[str, float], ...]
    """Most lowered first."""


@torch.no_grad()
def logit_lens(lm: LanguageModel, direction: Float[Tensor, " d_model"], n: int = 10) -> Lens:
    """The `n` tokens that `direction` raises and lowers most. Units: logits minus their mean."""
    norm, unembed = final_norm(lm), lm.hf.get_output_embeddings()
    if unembed is None:
        raise InputError(f"{lm.name} has no unembedding, so there are no logits to read")
    weight = cast("Tensor", unembed.weight)
    logits = unembed(norm(direction.to(weight.device, weight.dtype)[None, None]))[0, 0].float()
    logits = logits - logits.mean()
    order = logits.argsort(descending=True, stable=True)

    def told(ids: Tensor) -> tuple[tuple[str, float], ...]:
        return tuple((cast("str", lm.tokenizer.decode([int(i)])), float(logits[i])) for i in ids)

    order = order[order < len(lm.tokenizer)]  # an embedding may be padded beyond the vocabulary
    return Lens(told(order[:n]), told(order.flip(0)[:n]))


def final_norm(lm: LanguageModel) -> nn.Module:
    """The norm between the last block and the unembedding."""
    decoder = lm.hf.get_decoder()
    for name in FINAL_NORMS:
        found = getattr(decoder, name, None)
        if isinstance(found, nn.Module):
            return found
    raise InputError(f"no final norm was found in {type(decoder).__name__}: the logit lens needs one")


def nearest(dictionary: Dictionary, index: int, n: int = 10) -> pl.DataFrame:
    """The `n` latents whose decoder rows point most alike: columns `index`, `cosine`."""
    rows = nn.functional.normalize(dictionary.W_dec.float(), dim=-1)
    cosine = rows @ rows[dictionary.latent(index).index]
    cosine[index] = -torch.inf
    found = cosine.topk(min(n, dictionary.d_sae - 1))
    return pl.DataFrame({"index": found.indices.tolist(), "cosine": found.values.tolist()})
