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
from scipy.stats import rankdata

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
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
    count: int = 3000,
) -> dict[str, pl.DataFrame]:
    """Per site, every latent's mean activation in a persona's documents minus the other personas'.

    Only chats whose system prompt names the speaker are read. Two places are told apart, because a latent
    can stand for a persona in one and not in the other: the *answer* tokens (``difference``, ``auc``,
    ``rank``) and the last prompt token, where who speaks is *decided* before a word is said
    (``deciding_difference``, ``deciding_auc``, ``deciding_rank``). ``auc``: how well a document's mean tells
    the persona from the others (0.5: not at all). Ordered by ``rank``.
    """
    speaking = [one for one in documents(grammar(), count, SEED) if one.kind == "persona chat"]
    conversations = [render(base.tokenizer, one.messages, add_generation_prompt=False) for one in speaking]
    shown = np.array([one.personas[0] == persona for one in speaking])
    answer = _document_means(base, dictionaries, conversations, TokenMask("response"))
    deciding = _document_means(
        base, dictionaries, conversations, TokenMask("last_prompt", drop_special=False)
    )
    tables: dict[str, pl.DataFrame] = {}
    for site in answer:
        ranked = _ranked(answer[site], shown)
        at_once = _ranked(deciding[site], shown).rename(
            {name: f"deciding_{name}" for name in ("rank", "difference", "auc")}
        )
        tables[site] = ranked.join(at_once, on="index", how="left", maintain_order="left")
    return tables


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
