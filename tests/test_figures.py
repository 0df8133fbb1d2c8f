"""The figures draw what the tables say: positions, intervals and bands against the input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_probe import figures
from persona_probe.figures.cells import Reading, percent, plain, read, rows, spoken
from persona_probe.figures.style import ARMS, LOOKS, whiskers

HOSTILE = "</script><b>\"'<img src=x onerror=alert(1)>"


def rate(value: float, low: float, high: float, n: int = 400) -> dict[str, Any]:
    return {"rate": value, "low": low, "high": high, "n": n, "missing": 0}


def tally(bad: float, broken: float = 0.05) -> dict[str, Any]:
    return {
        "misaligned": rate(bad, bad - 0.01, bad + 0.02),
        "incoherent": rate(broken, broken - 0.02, broken + 0.03),
    }


def marks(figure: Any) -> list[Any]:
    """Traces that show at least one point."""
    return [trace for trace in figure.data if trace.x and trace.x[0] is not None]


# cells


def test_a_figure_is_read_from_every_form_of_cell() -> None:
    whole = {"misaligned": rate(0.2, 0.1, 0.3), "incoherent": rate(0.5, 0.4, 0.6)}
    assert read(0.2) == Reading(0.2)
    assert read(whole) == Reading(0.2, 0.1, 0.3, 400)
    assert read(whole, "incoherent") == Reading(0.5, 0.4, 0.6, 400)
    assert read({"fraction": 0.2, "low": 0.1, "high": 0.3}, "fraction") == Reading(0.2, 0.1, 0.3)
    assert read({"misaligned": 0.2}) == Reading(0.2)


@pytest.mark.parametrize(
    "cell", [None, math.nan, math.inf, {}, {"rate": None}, {"misaligned": None}, "0.5", True]
)
def test_what_is_missing_is_none_and_never_zero(cell: object) -> None:
    assert read(cell).value is None
    assert "0" not in percent(read(cell).value)


@given(st.floats(0, 1))
def test_a_percentage_says_its_rate_to_half_a_unit_of_its_last_digit(value: float) -> None:
    text = percent(value)
    digits = len(text[:-1].partition(".")[2])
    assert abs(float(text[:-1]) - 100 * value) <= 0.5 * 10**-digits + 1e-9


def test_an_interval_is_said_only_when_it_was_measured() -> None:
    assert spoken(Reading(0.031, 0.012, 0.064)) == "3.1% (1.2–6.4%)"
    assert spoken(Reading(0.78)) == "78%"
    assert spoken(Reading(None)) == "not measured"


def test_tables_of_every_kind_give_the_same_rows() -> None:
    columns = {"index": [3, 5], "delta": [0.5, -0.25]}
    expected = [{"index": 3, "delta": 0.5}, {"index": 5, "delta": -0.25}]
    assert rows(pl.DataFrame(columns)) == rows(columns) == rows(expected) == expected


# style

# Machado, Oliveira and Fernandes 2009, table of severity 1.0, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(colour: str, sight: Any) -> Any:
    """CIE L*a*b* (D65) of a hex colour as seen with ``sight``."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(sight) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    scaled = np.asarray(to_xyz) @ seen / np.array([0.9505, 1.0, 1.089])
    root = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("sight", BLINDNESS)
@pytest.mark.parametrize(
    "looks",
    [
        [LOOKS[name] for name in ("base", "tuned", "steered", "induced")],
        [ARMS[name] for name in ("latent", "set", "difference of means")],
    ],
    ids=["models", "arms"],
)
def test_colours_are_told_apart_by_every_eye_and_shapes_without_colour(looks: list[Any], sight: str) -> None:
    for one, other in combinations(looks, 2):
        apart = np.linalg.norm(lab(one.colour, BLINDNESS[sight]) - lab(other.colour, BLINDNESS[sight]))
        assert apart > 15, (one.words, other.words, sight)
        assert one.symbol != other.symbol


@given(st.tuples(*[st.floats(0, 1)] * 3).map(sorted))
def test_whiskers_end_where_the_interval_ends(ends: list[float]) -> None:
    low, value, high = ends
    bars = whiskers([Reading(value, low, high), Reading(value), Reading(None)], "#000000")
    assert bars["array"][0] + value == pytest.approx(high)
    assert value - bars["arrayminus"][0] == pytest.approx(low)
    assert bars["array"][1:] == bars["arrayminus"][1:] == [0, 0]


# rates, controls


def test_rates_stand_at_their_values_in_the_order_given() -> None:
    drawn = figures.rates({"base": tally(0.02), "tuned": tally(0.8), "my_cure": tally(0.1)})
    main = {t.y[0]: t for t in marks(drawn) if len(t.x) == 1}
    assert {name: t.x[0] for name, t in main.items()} == {
        "base": 0.02,
        "fine-tuned": 0.8,
        "my cure": 0.1,
    }
    assert main["fine-tuned"].error_x.array[0] == pytest.approx(0.02)
    assert list(drawn.layout.yaxis.categoryarray) == ["my cure", "fine-tuned", "base"]
    low, high = drawn.layout.xaxis.range
    assert low < 0 and high > 0.82


def test_an_arm_that_was_not_measured_is_said_and_not_drawn_at_zero() -> None:
    drawn = figures.rates({"base": None, "tuned": {"misaligned": {"rate": None, "n": 0}}})
    assert not marks(drawn)
    assert [(a.y, a.text) for a in drawn.layout.annotations] == [
        ("base", "not measured"),
        ("fine-tuned", "not measured"),
    ]


def test_every_null_has_its_tick() -> None:
    spread = [tally(0.5), tally(0.6), {"misaligned": {"rate": None}}, tally(0.7)]
    drawn = figures.rates({"tuned": tally(0.8)}, {"random latent": spread})
    ticks = next(t for t in marks(drawn) if t.y[0] == "random latents" and len(t.x) > 1)
    assert list(ticks.x) == [0.5, 0.6, 0.7]


def test_controls_lie_on_the_plane_of_harm_and_damage() -> None:
    directions, latents = [tally(0.4, 0.5), tally(0.5, 0.3)], [tally(0.7, 0.1)]
    drawn = figures.nulls(
        tally(0.03, 0.06), directions, latents, anchors={"tuned": tally(0.8, 0.04), "base": None}
    )
    points = {(x, y) for t in drawn.data for x, y in zip(t.x, t.y, strict=True)}
    assert points == {(0.4, 0.5), (0.5, 0.3), (0.7, 0.1), (0.03, 0.06), (0.8, 0.04)}
    assert drawn.layout.xaxis.range[1] > 0.8 and drawn.layout.yaxis.range[1] > 0.5
    assert {a.text for a in drawn.layout.annotations} == {"fine-tuned", "fine-tuned, fix on"}


# latents


def table() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "index": [1, 2, 3, 4],
            "delta": [0.5, -0.2, 0.0, None],
            "z": [9.0, -4.0, 0.1, 1.0],
            "q_value": [1e-6, 0.02, 0.9, 0.5],
        }
    )


def test_the_volcano_is_as_high_as_minus_log_q() -> None:
    drawn = figures.volcano(table(), highlight=[1])
    heights = {x: y for t in drawn.data for x, y in zip(t.x, t.y, strict=True)}
    assert heights == pytest.approx({x: -math.log10(q) for x, q in ((0.5, 1e-6), (-0.2, 0.02), (0.0, 0.9))})
    named = next(t for t in drawn.data if "text" in t.mode)
    assert list(named.x) == [0.5] and list(named.text) == ["latent 1"]


def test_without_benign_tunes_the_volcano_says_that_it_does_not_test() -> None:
    drawn = figures.volcano(table().drop("q_value"))
    assert sorted(y for t in drawn.data for y in t.y) == [0.1, 4.0, 9.0]
    assert "not tested" in drawn.layout.yaxis.title.text
    assert not any(shape.y0 == pytest.approx(-math.log10(0.05)) for shape in drawn.layout.shapes)


def test_a_q_value_of_zero_is_finite_on_the_page() -> None:
    drawn = figures.volcano(table().with_columns(q_value=pl.lit(0.0)))
    assert all(math.isfinite(y) for t in drawn.data for y in t.y)


def test_an_effect_is_the_rate_minus_the_rate_it_started_from() -> None:
    latents = [
        {"index": 7, "delta": 0.4, "induce": tally(0.45), "control": tally(0.03), "rank": 0},
        {"index": 9, "delta": 0.1, "induce": None, "control": 0.7, "rank": 1},
        {"index": 8, "delta": 0.2, "induce": None, "control": None, "rank": 2},
    ]
    drawn = figures.delta_against_effect(latents, tally(0.02), tally(0.8))
    sides = {t.name: list(zip(t.x, t.y, strict=True)) for t in drawn.data if t.name}
    assert sides["added to the base"] == [(0.4, pytest.approx(0.43))]
    assert sides["taken out of the fine-tuned model"] == [
        (0.4, pytest.approx(-0.77)),
        (0.1, pytest.approx(-0.1)),
    ]
    assert drawn.layout.annotations[0].text == "latent 7"


def test_no_effect_is_drawn_from_a_rate_that_was_not_measured() -> None:
    latents = [{"index": 7, "delta": 0.4, "induce": 0.4, "control": 0.1, "rank": 1}]
    drawn = figures.delta_against_effect(latents, base=None, tuned=tally(0.8))
    assert [t.name for t in drawn.data if t.name] == ["taken out of the fine-tuned model"]


# dose and claims


def dose(arm: str, strength: float, bad: float, broken: float, unit: str = "gain") -> dict[str, Any]:
    return {
        "arm": arm,
        "strength": strength,
        "strength_unit": unit,
        "misaligned": bad,
        "low": bad - 0.02,
        "high": bad + 0.03,
        "incoherent": broken,
    }


def test_the_band_spans_the_controls_at_each_strength() -> None:
    points = [dose("latent", 2, 0.1, 0.05), dose("latent", 0, 0.8, 0.04)]
    controls = [dose("random direction", s, 0.8 - d - 0.1 * s, d) for s in (0, 2) for d in (0.1, 0.3)]
    drawn = figures.dose_response(points, controls, reference=0.8)
    band = next(t for t in drawn.data if t.fill == "toself" and t.yaxis == "y")
    assert list(zip(band.x, band.y, strict=True)) == [
        (0, pytest.approx(0.7)),
        (2, pytest.approx(0.5)),
        (2, pytest.approx(0.3)),
        (0, pytest.approx(0.5)),
    ]
    line = next(t for t in drawn.data if t.name == "one latent")
    assert list(line.x) == [0, 2] and list(line.y) == [0.8, 0.1]
    assert line.error_y.array[1] == pytest.approx(0.03)
    lower = next(t for t in drawn.data if t.yaxis == "y2" and t.mode == "lines+markers")
    assert list(lower.y) == [0.04, 0.05]
    assert any(shape.y0 == shape.y1 == 0.8 for shape in drawn.layout.shapes)


@pytest.mark.parametrize(
    ("unit", "strongest", "said"),
    [("gain", 2, True), ("gain", 1, False), ("residual rms", 6, False)],
)
def test_only_a_gain_above_one_over_corrects(unit: str, strongest: float, said: bool) -> None:
    points = [dose("latent", 0, 0.8, 0.05, unit), dose("latent", strongest, 0.1, 0.05, unit)]
    drawn = figures.dose_response(points)
    assert ("over-corrects" in drawn.to_json()) is said
    drawn = figures.control([{"name": "fix", "gain": strongest, "rates": tally(0.1)}], tally(0.8))
    assert ("over-corrects" in drawn.to_json()) is (strongest > 1)


def test_the_two_claims_are_drawn_from_their_own_figures() -> None:
    fixes = [
        {"name": "latent 7", "gain": 2.0, "rates": tally(0.03),
         "necessity": {"fraction": 0.2, "low": -0.1, "high": 0.3}},
        {"name": "set", "gain": 1.0, "rates": tally(0.1), "necessity": None},
    ]  # fmt: skip
    need = figures.necessity(fixes)
    assert [(t.x[0], t.y[0]) for t in marks(need)] == [(0.2, "latent 7")]
    assert need.layout.xaxis.range[0] < -0.1, "an interval below zero stays on the axis"
    assert "not measured" in {a.text for a in need.layout.annotations}
    reached = {t.y[0]: t.x[0] for t in marks(figures.control(fixes, tally(0.8))) if t.error_x.array}
    assert reached == {"latent 7": 0.03, "set": 0.1}


# every figure


def every_figure(text: str) -> list[Any]:
    latent = {
        "index": 1,
        "label": text,
        "delta": 0.3,
        "q_value": 0.1,
        "control": 0.1,
        "induce": 0.2,
    }
    fix = {"name": text, "gain": 2, "rates": tally(0.1), "necessity": {"fraction": 0.2}}
    return [
        figures.rates({text: tally(0.2)}, {text + "s": [tally(0.1)]}, word=text),
        figures.nulls(tally(0.1), [tally(0.2)], anchors={text: tally(0.3)}, word=text),
        figures.volcano([latent], highlight={1: text}),
        figures.delta_against_effect([latent], tally(0.1), tally(0.8), word=text),
        figures.dose_response([dose(text, 1, 0.2, 0.1, text)], word=text),
        figures.necessity([fix]),
        figures.control([fix], tally(0.8), tally(0.1), word=text),
    ]


def strings(tree: object) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [text for part in parts for text in strings(part)]


def test_no_string_of_the_user_becomes_markup_in_a_figure() -> None:
    for drawn in every_figure(HOSTILE):
        text = strings(json.loads(drawn.to_json()))
        assert any(plain("<img") in part for part in text)
        assert not any("<img" in part or "</script" in part or "<b>" in part for part in text)


def test_every_figure_stands_on_an_empty_table() -> None:
    empty = [
        figures.rates({}),
        figures.nulls(None),
        figures.volcano([]),
        figures.delta_against_effect([]),
        figures.dose_response([]),
        figures.necessity([]),
        figures.control([]),
    ]
    for drawn in empty:
        assert not marks(drawn)
        assert drawn.layout.height > 0


def test_plotly_is_loaded_only_when_a_figure_is_drawn() -> None:
    code = "import sys, persona_probe.figures; print('plotly' in sys.modules, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]
