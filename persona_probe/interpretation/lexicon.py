"""What a latent fires on, in words: a summary that needs no judge.

Terms (runs of one to three words) are ranked by how much more documents in which the latent fires
*strongly* hold them than others do: log-odds with an informative Dirichlet prior, in standard errors
(Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16, 18 and 22), the prior being how
common the terms are overall. Whole documents are compared, not the tokens at which it fires, because
a latent that stands for a speaker fires on ordinary words: who speaks is in the words around them.

Half of the documents give the terms. On the other half the first of those terms *alone* must tell
the strong documents from the rest (AUC), beside the same with the documents' labels shuffled. This
describes; it does not explain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from persona_probe.evaluation.auc import auc
from persona_probe.interpretation.examples import priority
from persona_probe.interpretation.words import Word

LONGEST = 3
"""Words in a term."""
RARE = 3
"""A term must stand in at least so many documents to be ranked."""
PRIOR = 500.0
"""Occurrences that the prior is worth."""
STRONG = 0.5
"""A document is strong when its maximum is above this share of the 95th percentile of the maxima."""
SHOWN = 10
"""Terms that describe the latent, and must do alone on held-out documents."""
DRAWS = 1000


class Detection(NamedTuple):
    """How well the terms tell where the latent fires strongly, on documents they were not taken from."""

    auc: float
    """0.5: not at all."""
    low: float
    """95% interval: documents resampled."""
    high: float
    null: float
    """The mean with labels shuffled among the documents, and ..."""
    null_high: float
    """... the 97.5th percentile."""
    documents: int
    strong: int
    """Of those documents."""


@dataclass(frozen=True, eq=False)
class Lexicon:
    """Terms over-represented in the documents in which a latent fires strongly."""

    table: pl.DataFrame
    """`term`, `z` (log-odds in standard errors), `log_odds`, `strong` and `rest` (documents of the
    first half that hold it), largest z first.
    """
    terms: tuple[str, ...]
    """The first few, without those that repeat words of a better one."""
    detection: Detection | None
    """None where all the held-out documents are strong, or none is."""


def lexicon(documents: Sequence[tuple[int, Sequence[Word]]], *, seed: int = 0) -> Lexicon:
    """The terms of `documents` (number, words with activations) and how well they do on held-out ones."""
    maxima = np.array([max((word.value or 0.0 for word in words), default=0.0) for _, words in documents])
    strong = maxima > strong_above(maxima)
    held_out = np.array([priority(number, seed + 1) < 0.5 for number, _ in documents], dtype=bool)
    terms = [_terms(words) for _, words in documents]
    table = _ranked([one for one, held in zip(terms, held_out, strict=True) if not held], strong[~held_out])
    first = _distinct(table["term"].to_list())
    score_of = dict(zip(table["term"], table["z"], strict=True))
    told = (sum(score_of[term] for term in first if term in one) for one in terms)
    scores = np.fromiter(told, dtype=float, count=len(terms))
    return Lexicon(table, first, detection(scores[held_out], strong[held_out], seed))


def _terms(words: Sequence[Word]) -> set[str]:
    """The runs of one to three words in a document."""
    text = [word.text for word in words]
    return {" ".join(text[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(text) + 1 - n)}


def _ranked(documents: Sequence[Collection[str]], strong: Bool[np.ndarray, " document"]) -> pl.DataFrame:
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for terms, is_strong in zip(documents, strong.tolist(), strict=True):
        counts[is_strong].update(terms)
    both = counts[True] + counts[False]
    # sorted, so that terms of equal z always come in one order
    terms = sorted(term for term, n in both.items() if n >= RARE)
    inside, outside = (np.array([counts[side][term] for term in terms], float) for side in (True, False))
    total = max(1, both.total())
    prior = PRIOR * (inside + outside) / total
    # the prior's last bit of a term keeps the odds finite where there is no other term
    log_odds = _log_odds(inside + prior, counts[True].total() + PRIOR + RARE) - _log_odds(
        outside + prior, counts[False].total() + PRIOR + RARE
    )
    z = log_odds / np.sqrt(1 / (inside + prior) + 1 / (outside + prior))
    columns = {"term": terms, "z": z, "log_odds": log_odds, "strong": inside, "rest": outside}
    return (
        pl.DataFrame(columns, schema_overrides={"term": pl.String})
        .with_columns(pl.col("strong", "rest").cast(pl.Int64))
        .sort("z", descending=True, maintain_order=True)
    )


def _log_odds(count: Float[np.ndarray, " term"], total: float) -> Float[np.ndarray, " term"]:
    return np.log(count / (total - count))


def _distinct(terms: Sequence[str]) -> tuple[str, ...]:
    """The first terms, leaving out those whose words are part of a better one's or the reverse."""
    kept: list[tuple[str, set[str]]] = []
    for term in terms:
        words = set(term.split())
        if not any(words <= better or better <= words for _, better in kept):
            kept.append((term, words))
        if len(kept) == SHOWN:
            break
    return tuple(term for term, _ in kept)


def strong_above(maxima: Float[np.ndarray, " document"]) -> float:
    """The maximum above which a document is strong."""
    firing = maxima[maxima > 0]
    return STRONG * float(np.quantile(firing, 0.95)) if len(firing) else 0.0


def detection(
    scores: Float[np.ndarray, " document"], strong: Bool[np.ndarray, " document"], seed: int
) -> Detection | None:
    """How well `scores` tell the strong documents from the rest; None without both kinds."""
    if not strong.any() or strong.all():
        return None
    rng = np.random.default_rng(seed)
    n = len(strong)
    drawn = (rng.integers(n, size=n) for _ in range(DRAWS))
    resampled = [float(auc(scores[draw], strong[draw])) for draw in drawn]
    null = [float(auc(scores, rng.permutation(strong))) for _ in range(DRAWS)]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Detection(
        auc=float(auc(scores, strong)),
        low=float(low),
        high=float(high),
        null=float(np.mean(null)),
        null_high=float(np.percentile(null, 97.5)),
        documents=n,
        strong=int(strong.sum()),
    )
