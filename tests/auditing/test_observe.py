"""What of many contrasts is kept: some from everywhere."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from persona_probe.auditing.observe import evenly


@given(st.integers(0, 300), st.integers(1, 60))
def test_kept_from_the_whole_length(n: int, at_most: int) -> None:
    kept = evenly(range(n), at_most)
    assert len(kept) == len(set(kept)) == min(n, at_most)
    assert list(kept) == sorted(kept)
    if kept:
        gaps = [b - a for a, b in zip(kept, (*kept[1:], n), strict=True)]
        assert kept[0] == 0 and max(gaps) <= -(-n // len(kept))
