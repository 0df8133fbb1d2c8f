"""The known truth of an organism: which latents stand for which persona in the base model.

Read off the base model on documents whose speaker is known, never off a fine-tune. An audit does not
see it; it scores audits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from scipy.stats import rankdata

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.model.chat import render
from persona_probe.model.language_model import LanguageModel
from persona_probe.organism.corpus import documents
from persona_probe.organism.grammar import PERSONAS, Persona, grammar
from persona_probe.sae.encode import encode_dense
from persona_probe.sae.load import Dictionary

SEED = 77_000  # of documents that neither a base model nor a dictionary was trained on
TRAITS: dict[str, Persona] = {"misaligned": "villainous"}


def persona_of(trait: str) -> Persona:
    """The persona that shows a trait."""
    return TRAITS.get(trait, trait)  # type: ignore[return-value]


def truth(
    base: LanguageModel,
    dictionaries: Sequence[Dictionary],
    persona: Persona = "villainous",
    *,
    count: int = 3000,
) -> dict[str, pl.DataFrame]:
    """Per site, every latent's mean activation on a persona's answer tokens minus the others'.

    Only chats whose system prompt names the speaker are read. ``auc`` is how well a document's mean
    activation tells the persona from the others (0.5: not at all). Best first.
    """
    speaking = [document for document in documents(grammar(), count, SEED) if document.kind == "persona chat"]
    conversations = [
        render(base.tokenizer, document.messages, add_generation_prompt=False) for document in speaking
    ]
    shown = np.array([document.personas[0] == persona for document in speaking])
    sites = [dictionary.site for dictionary in dictionaries]
    sums = {site: np.zeros((len(speaking), d.d_sae)) for site, d in zip(sites, dictionaries, strict=True)}
    counts = np.zeros(len(speaking))
    for chunk in stream([base], conversations, sites, TokenMask("response")):
        index = chunk.document.numpy()
        np.add.at(counts, index, 1)
        for dictionary in dictionaries:
            codes = encode_dense(dictionary, chunk.activations[0, dictionary.site])
            table = torch.zeros(len(speaking), dictionary.d_sae, dtype=torch.float64)
            table.index_add_(0, chunk.document, codes.double())
            sums[dictionary.site] += table.numpy()
    return {site: _ranked(total / counts[:, None], shown) for site, total in sums.items()}


def _ranked(means: np.ndarray, shown: np.ndarray) -> pl.DataFrame:
    """``means`` is [document, latent]; ``shown`` marks the persona's documents."""
    difference = means[shown].mean(axis=0) - means[~shown].mean(axis=0)
    ranks = rankdata(means, axis=0)[shown].sum(axis=0)
    inside, outside = int(shown.sum()), int((~shown).sum())
    auc = (ranks - inside * (inside + 1) / 2) / (inside * outside)
    table = pl.DataFrame({"index": np.arange(means.shape[1]), "difference": difference, "auc": auc})
    return table.sort("difference", descending=True).with_row_index("rank", offset=1)


def truth_of(home: Path, persona: Persona = "villainous") -> dict[str, pl.DataFrame]:
    """The truth of the organism in a folder."""
    from persona_probe.model.language_model import load_model
    from persona_probe.sae.load import load_sae

    dictionaries = [load_sae(folder) for folder in sorted((home / "sae").iterdir())]
    return truth(load_model(home / "base"), dictionaries, persona)


__all__ = ["PERSONAS", "persona_of", "truth", "truth_of"]
