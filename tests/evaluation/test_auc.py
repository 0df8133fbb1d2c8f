"""The area under the curve, against counting pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.evaluation.auc import auc


def counted(scores: np.ndarray, positive: np.ndarray) -> float:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[positive] for b in scores[~positive]]
    return sum(pairs) / len(pairs) if pairs else np.nan


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_it_is_the_share_of_pairs_in_order_column_by_column(rows: list[tuple[int, int, bool]]) -> None:
    scores = np.asarray([row[:2] for row in rows], dtype=float)
    positive = np.asarray([row[2] for row in rows])
    found = auc(scores, positive)
    assert found.shape == (2,)
    for column in range(2):
        assert found[column] == pytest.approx(counted(scores[:, column], positive), nan_ok=True)
        assert float(auc(scores[:, column], positive)) == pytest.approx(found[column], nan_ok=True)
