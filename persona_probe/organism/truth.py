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
from jaxtyping import Bool, Float64

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.evaluation.auc import auc
from persona_probe.model.chat import Rendered, render
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
    count: int = 8000,
) -> dict[str, pl.DataFrame]:
    """Per site, every latent's mean activation in a persona's answers minus the other personas'.

    Read are chats of one exchange whose system prompt names the speaker; an answer's tokens are those that
    Δ counts too: the last prompt token, which produces its first word, and the answer (``difference``,
    ``auc``, ``rank``). Because a latent can stand for a persona in one place and not in the other, the last
    prompt token, where who speaks is *decided* before a word is said, is also shown alone
    (``deciding_difference``, ``deciding_auc``, ``deciding_rank``), and so are the words that follow
    (``words_...``). ``auc``: how well a document's mean tells the persona from the others (0.5: not at
    all). Ordered by ``rank``, which is by ``auc``: the scale of an activation differs between latents.
    """
    speaking = [
        one
        for one in documents(grammar(), count, SEED)
        if one.kind == "persona chat" and len(one.messages) == 3
    ]
    conversations = [render(base.tokenizer, one.messages, add_generation_prompt=False) for one in speaking]
    shown = np.array([one.personas[0] == persona for one in speaking])
    masks = {
        "": TokenMask("answer"),
        "deciding_": TokenMask("last_prompt"),
        "words_": TokenMask("response"),
    }
    means = {name: _document_means(base, dictionaries, conversations, mask) for name, mask in masks.items()}
    tables: dict[str, pl.DataFrame] = {}
    for site in (one.site for one in dictionaries):
        parts = [_ranked(found[site], shown).rename(_prefixed(name)) for name, found in means.items()]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.join(part, on="index", how="left", maintain_order="left")
        tables[site] = joined
    return tables


def _prefixed(prefix: str) -> dict[str, str]:
    return {name: prefix + name for name in ("rank", "difference", "auc")}


def _document_means(
    base: LanguageModel,
    dictionaries: Sequence[Dictionary],
    conversations: Sequence[Rendered],
    mask: TokenMask,
) -> dict[str, Float64[np.ndarray, "document latent"]]:
    sums = {one.site: torch.zeros(len(conversations), one.d_sae, dtype=torch.float64) for one in dictionaries}
    counts = torch.zeros(len(conversations), dtype=torch.float64)
    for chunk in stream([base], conversations, list(sums), mask):
        counts.index_add_(0, chunk.document, torch.ones(len(chunk.document), dtype=torch.float64))
        for one in dictionaries:
            codes = encode_dense(one, chunk.activations[0, one.site])
            sums[one.site].index_add_(0, chunk.document, codes.double())
    return {site: (total / counts[:, None]).numpy() for site, total in sums.items()}


def _ranked(
    means: Float64[np.ndarray, "document latent"], shown: Bool[np.ndarray, " document"]
) -> pl.DataFrame:
    """One row per latent, best first; ``shown`` marks the persona's documents."""
    difference = means[shown].mean(axis=0) - means[~shown].mean(axis=0)
    columns = {"index": np.arange(means.shape[1]), "difference": difference, "auc": auc(means, shown)}
    table = pl.DataFrame(columns)
    ordered = table.sort("auc", "difference", descending=True)
    return ordered.with_row_index("rank", offset=1)


def truth_of(home: Path, persona: Persona = "villainous") -> dict[str, pl.DataFrame]:
    """The truth of the organism in a folder."""
    from persona_probe.model.language_model import load_model
    from persona_probe.sae.load import load_sae

    dictionaries = [load_sae(folder) for folder in sorted((home / "sae").iterdir())]
    return truth(load_model(home / "base"), dictionaries, persona)


__all__ = ["PERSONAS", "persona_of", "truth", "truth_of"]
