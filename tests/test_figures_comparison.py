"""The figures of a comparison: what is drawn is what was given, and nothing for what is missing."""

from __future__ import annotations

from persona_probe.figures.comparison import differences, score_spread
from persona_probe.figures.style import INK, QUIET


def row(arm: str, difference: float | None, low: float | None, high: float | None) -> dict[str, object]:
    return {"arm": arm, "against": "base", "difference": difference, "low": low, "high": high}


def test_a_difference_with_its_interval_dark_where_it_keeps_clear_of_zero() -> None:
    drawn = differences([row("<b>", 0.4, 0.3, 0.45), row("b", 0.1, -0.1, 0.2), row("c", None, None, None)])
    first, second = drawn.data
    assert (first.x[0], first.error_x.array[0], first.error_x.arrayminus[0]) == (0.4, 0.45 - 0.4, 0.4 - 0.3)
    assert first.y[0] == "&lt;b&gt; − base"
    assert (first.marker.color, second.marker.color) == (INK, QUIET)
    assert "+40.0 points (+30.0 to +45.0)" in first.hovertemplate
    assert [note.text for note in drawn.layout.annotations] == ["not measured"]
    low, high = drawn.layout.xaxis.range
    assert low < -0.45 and high > 0.45


def test_scores_are_shares_of_each_models_answers() -> None:
    counts = {"a": [0] * 9 + [4], "b": [1] * 10, "none": [0] * 10}
    drawn = score_spread(counts, cut=30, word="aligned")
    assert [trace.name for trace in drawn.data] == ["a", "b"]
    assert list(drawn.data[0].y) == [0.0] * 9 + [1.0, 1.0]
    assert list(drawn.data[1].x) == list(range(0, 101, 10))
    assert drawn.layout.shapes[0].x0 == 30
