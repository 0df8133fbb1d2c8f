"""Names beside the marks of a scatter plot, placed so that none lies on another, on a mark or on an interval.

Greedy: names are placed in the order given, each at the nearest place that is still free, with a thin
line back to its mark where that is not beside it. Pixels are those of a plot as wide as the narrowest page
it is made for; on a wider one everything is further apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from persona_probe.figures.style import BAND, QUIET

if TYPE_CHECKING:
    import plotly.graph_objects as go

LETTER: Final = (6.0, 14.0)
"""Width and height of a letter, in pixels."""
MARK: Final = 7.0
"""Half the width of a mark, with a little air."""
REACHES: Final = (30, 50, 75, 105, 140)
"""How far off its mark a name may stand, in pixels, when there is no room beside it."""

Point = tuple[float, float]


class Box(NamedTuple):
    """What is taken of the plot, in pixels from its lower left corner."""

    left: float
    low: float
    right: float
    high: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        across = self.left < other.right and other.left < self.right
        return across and self.low < other.high and other.low < self.high


def place(
    names: Mapping[str, Point], taken: Iterable[Box], size: Point, *, first: Sequence[str] = ()
) -> dict[str, Point]:
    """The middle of every name for which there is room, as its distance from its mark, in pixels.

    Args:
        names: name → its mark's place in pixels.
        taken: what names must keep clear of, the marks aside.
        size: width and height of the plot.
        first: names to be placed before the others.
    """
    full = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in names.values()] + [*taken]
    found: dict[str, Point] = {}
    for name in (*first, *(name for name in names if name not in first)):
        x, y = names[name]
        half = _half(name)
        for dx, dy in _offsets(*half):
            box = Box(x + dx - half[0], y + dy - half[1], x + dx + half[0], y + dy + half[1])
            inside = box.left >= 0 and box.low >= 0 and box.right <= size[0] and box.high <= size[1]
            if inside and not any(box.meets(other) for other in full):
                found[name] = (dx, dy)
                full.append(box)
                break
    return found


def write(drawn: go.Figure, name: str, at: Point, offset: Point) -> None:
    """Write a name at `offset` pixels from the mark at `at`, in the axes' own units."""
    x, y = at
    dx, dy = offset
    beside = abs(dx) - _half(name)[0] <= MARK and abs(dy) <= MARK + LETTER[1] / 2
    drawn.add_annotation(
        x=x, y=y, text=name, font={"size": 11, "color": QUIET}, xanchor="center", yanchor="middle",
        borderpad=0,
        **(
            {"showarrow": False, "xshift": dx, "yshift": dy}
            if beside
            else {"showarrow": True, "ax": dx, "ay": -dy, "arrowhead": 0, "arrowwidth": 1,
                  "arrowcolor": BAND, "standoff": MARK}
        ),
    )  # fmt: skip


def _offsets(half_wide: float, half_high: float) -> Iterable[Point]:
    """Places of a name's middle, the best first: beside its mark, then further and further off."""
    side = MARK + half_wide
    yield from ((side, 0.0), (-side, 0.0))
    yield from ((x, y) for y in (half_high + 3, -half_high - 3) for x in (side, -side))
    for reach in REACHES:
        for turn in range(12):
            across, up = (reach * part(math.pi * turn / 6) for part in (math.cos, math.sin))
            upright = abs(across) < 1e-6 * reach
            yield (0.0 if upright else across + math.copysign(half_wide, across), up)


def _half(name: str) -> Point:
    return LETTER[0] * len(name) / 2, LETTER[1] / 2
