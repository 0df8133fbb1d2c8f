"""A tiny base model, a fine-tune of it, and what a screen is given: contrasts and evidence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from random import Random

import polars as pl
import pytest
import torch

from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair, load_pair
from persona_probe.sae.load import Dictionary
from persona_probe.screening.candidate import Carrier
from persona_probe.screening.evidence import SiteEvidence
from persona_probe.screening.margin import Contrast
from persona_probe.steering.target import direction
from tests.model.tiny_models import adapter_of, checkpoint_of

D_MODEL, D_SAE, BLOCKS = 32, 40, 3
SITES = tuple(f"blocks.{block}.hook_resid_post" for block in range(BLOCKS))


@pytest.fixture(scope="session")
def pair() -> ModelPair:
    """A random model and a random adapter on all of its linear layers (the unembedding is shared)."""
    return load_pair(checkpoint_of("llama"), adapter_of("llama"))


@pytest.fixture(scope="session")
def contrasts() -> list[Contrast]:
    """Prompts of 2 to 6 tokens, each with two answers of 1 to 7; one has an earlier turn in it too."""
    draw = Random(4)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, 300) for _ in range(n))

    made: list[Contrast] = []
    for number in range(7):
        prompt = Rendered(tokens(2 + number % 5), (False,) * (2 + number % 5), 2 + number % 5)
        if number == 3:
            earlier = prompt.answered(tokens(2))
            ids, marks = (*earlier.ids, *tokens(3)), (*earlier.response, False, False, False)
            prompt = Rendered(ids, marks, len(ids))
        base, tuned = prompt.answered(tokens(1 + draw.randrange(7))), prompt.answered(tokens(1 + number))
        made.append(Contrast(f"q{number}", base, tuned))
    return made


def projections(
    lm: LanguageModel, rows: Sequence[Rendered], site: str, vector: torch.Tensor
) -> torch.Tensor:
    """Of every token of every row on `vector`, read off plain hidden states."""
    block = int(site.split(".")[1])
    kept: list[torch.Tensor] = []
    module = lm.hf.model.layers[block]  # type: ignore[union-attr]

    def keep(module: torch.nn.Module, args: object, output: object) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0].detach())  # type: ignore[index]

    handle = module.register_forward_hook(keep)
    try:
        for row in rows:
            lm.forward(torch.tensor([row.ids]))
    finally:
        handle.remove()
    return torch.cat(kept) @ vector


@pytest.fixture(scope="session")
def carrier_at(pair: ModelPair, contrasts: list[Contrast]) -> Callable[..., Carrier]:
    """A random direction at a site, measured in both models; `rises=False` turns it round."""

    @functools.cache
    def make(site: str, seed: int = 0, *, rises: bool = True) -> Carrier:
        vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
        vector /= vector.norm()
        rows = [contrast.base for contrast in contrasts]
        base, tuned = (float(projections(lm, rows, site, vector).mean()) for lm in (pair.base, pair.tuned))
        shift = abs(tuned - base) if rises else -abs(tuned - base)
        label = f"{site.split('.')[1]}:{seed}"
        return Carrier(site, direction(vector, label), label, None, vector, base, shift, residual_rms=0.5)

    return make


def make_dictionary(site: str, seed: int = 0) -> Dictionary:
    generator = torch.Generator().manual_seed(seed)
    decoder = torch.randn(D_SAE, D_MODEL, generator=generator)
    return Dictionary(
        site=site,
        W_enc=torch.randn(D_MODEL, D_SAE, generator=generator),
        b_enc=torch.zeros(D_SAE),
        W_dec=decoder / decoder.norm(dim=-1, keepdim=True),
        b_dec=torch.zeros(D_MODEL),
        threshold=None,
        activation="relu",
        k=None,
        apply_b_dec_to_input=False,
        normalisation="none",
        path="memory",
        digest=f"sha256:{seed}",
    )


def make_evidence(site: str, *, live: Sequence[int] = tuple(range(D_SAE)), benign: int = 0) -> SiteEvidence:
    """Random means; latent i has |Δ| and |difference in differences| of a known order."""
    generator = torch.Generator().manual_seed(len(site) + benign)

    def vector() -> torch.Tensor:
        return torch.randn(D_MODEL, generator=generator, dtype=torch.float64)

    index = list(range(D_SAE))
    table = pl.DataFrame(
        {
            "index": index,
            "delta": [(i / 10) * (-1) ** i for i in index],  # 0 for latent 0; the last is the largest
            "did": [None] * D_SAE if not benign else [(D_SAE - i) / 10 for i in index],
            "fires_base": [0.0] * D_SAE,
            "fires_tuned": [0.5 if i in live else 0.0 for i in index],
        },
        schema_overrides={"did": pl.Float64},
    )
    benign_means = tuple(vector() for _ in range(benign))
    return SiteEvidence(site, vector(), vector(), benign_means, 0.5, make_dictionary(site), table)
