"""Names in a scatter plot: none on another, none on a mark, and the first come first."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from persona_probe.figures.naming import LETTER, MARK, Box, place
from persona_probe.figures.pareto import pareto

SIZE = (600.0, 300.0)
SPOTS = st.lists(st.tuples(st.floats(0, SIZE[0]), st.floats(0, SIZE[1])), min_size=1, max_size=14)


def boxes(marks: dict[str, tuple[float, float]], found: dict[str, tuple[float, float]]) -> dict[str, Box]:
    half = {name: (LETTER[0] * len(name) / 2, LETTER[1] / 2) for name in found}
    middles = {name: (marks[name][0] + dx, marks[name][1] + dy) for name, (dx, dy) in found.items()}
    return {
        name: Box(x - half[name][0], y - half[name][1], x + half[name][0], y + half[name][1])
        for name, (x, y) in middles.items()
    }


@given(SPOTS)
def test_no_name_lies_on_another_or_on_a_mark_or_off_the_plot(spots: list[tuple[float, float]]) -> None:
    marks = {f"arm {number}" + "x" * number: spot for number, spot in enumerate(spots)}
    bar = Box(200, 0, 202, 300)
    named = boxes(marks, place(marks, [bar], SIZE))
    dots = [Box(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in spots]
    assert not any(one.meets(other) for one, other in combinations(named.values(), 2))
    assert not any(box.meets(other) for box in named.values() for other in [*dots, bar])
    assert all(box.left >= 0 and box.right <= SIZE[0] and box.low >= 0 for box in named.values())


def test_the_first_get_the_room_there_is() -> None:
    marks = {"late": (20.0, 50.0), "early": (20.0, 52.0)}
    room = (60.0, 60.0)
    assert next(iter(place(marks, [], room, first=["early"]))) == "early"
    assert list(place(marks, [], room)) != []


def test_a_crowd_is_named_as_far_as_there_is_room_and_the_rest_counted() -> None:
    table = [{"arm": f"arm {i}", "in_domain": 0.9, "misaligned": 0.5 + i / 1000} for i in range(60)]
    table.append({"arm": "none", "in_domain": 0.9, "misaligned": 0.55})
    drawn = pareto(table)
    said = [note.text for note in drawn.layout.annotations]
    assert "none" in said and "arm 0" in said  # the frontier's and the undefended one's
    assert said[0] == f"{len(table) - len(said) + 1} more: point at the mark"


def test_intervals_are_drawn_on_both_axes_where_they_are_known() -> None:
    [_, mark] = pareto(
        [{"arm": "a", "in_domain": 0.5, "in_domain_low": 0.25, "in_domain_high": 0.625, "misaligned": 0.1}]
    ).data
    assert (mark.error_x.array, mark.error_x.arrayminus) == ((0.125,), (0.25,))
    assert mark.error_y.array == (0,)
