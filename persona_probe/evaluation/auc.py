"""How well a score tells two kinds apart, whatever its scale."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def auc(
    scores: Float[np.ndarray, "row *score"], positive: Bool[np.ndarray, " row"]
) -> Float[np.ndarray, "*score"]:
    """The share of (positive, other) pairs in which the positive row scores higher, ties half.

    1 tells them apart perfectly, 0.5 not at all; NaN where there is no such pair. One figure for each
    column of `scores`, by the ranks of Mann and Whitney (1947).
    """
    inside, outside = int(positive.sum()), int((~positive).sum())
    if not inside or not outside:
        return np.full(scores.shape[1:], np.nan)
    from scipy.stats import rankdata  # a second to load, which no audit should wait for

    ranks = rankdata(scores, axis=0)[positive].sum(axis=0)
    return np.asarray((ranks - inside * (inside + 1) / 2) / (inside * outside))
