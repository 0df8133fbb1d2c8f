"""The batched edit against one token at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.errors import MismatchError
from persona_probe.sae import encode
from persona_probe.sae.load import Dictionary
from persona_probe.steering import (
    Condition,
    Intervention,
    Level,
    RandomMatched,
    SteeringPlan,
    latents,
)
from persona_probe.steering.firing import moved
from persona_probe.steering.kernel import SiteEdit
from persona_probe.steering.plan import PlannedEdit
from persona_probe.steering.positions import RowTokens, row_tokens
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, make_dictionary, random_intervention
from tests.steering.reference import edit_row, token_delta

OPS = ("add", "scale", "clamp", "ablate", "mean_ablate", "project_out", "cap", "floor")


def activations(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed)) * 1.5


def whole(x: torch.Tensor, prompt_length: int | None = None) -> RowTokens:
    lengths = None if prompt_length is None else torch.full((x.shape[0],), prompt_length)
    return row_tokens(x.shape[0], x.shape[1], prompt_lengths=lengths)


def applied(rows: list[list[PlannedEdit]], x: torch.Tensor, tokens: RowTokens) -> torch.Tensor:
    return SiteEdit([[edit.compiled for edit in row] for row in rows]).apply(x, tokens)[0]


@pytest.mark.parametrize(
    ("op", "read"),
    [(op, read) for op in OPS for read in ("encoder", "projection") if op != "project_out"]
    + [("project_out", "projection")],
)
def test_every_operation_is_what_its_formula_says(op: Any, read: Any, dictionary: Dictionary) -> None:
    x = activations(2, 30)
    for condition in (Condition(), Condition("active"), Condition("above", 0.4)):
        many = [3, 11, 20] if op != "project_out" or condition.kind == "always" else [3]
        level = None
        if op not in ("ablate", "project_out"):
            values = (0.3, -0.4, 4.0)[: len(many)]
            level = Level(values, "base_mean" if op == "mean_ablate" else "absolute")
        edit = Intervention(op, latents(dictionary, many), SITES[1], "all", level, 1.7, read, condition)
        got = applied([[edit]], x, whole(x))
        for row in range(2):
            assert torch.allclose(got[row].double(), edit_row([edit], x[row], 30), atol=2e-5)
        assert not torch.equal(got, x), "the case tests nothing"


def test_one_batch_with_another_edit_on_every_row(draw: random.Random, dictionary: Dictionary) -> None:
    other = make_dictionary("jumprelu", seed=5, centred=False)
    x = activations(40, 9)
    rows: list[list[PlannedEdit]] = [[] for _ in range(40)]
    for i in range(40):
        for _ in range(draw.choice([0, 1, 1, 2, 3])):
            rows[i].append(random_intervention(draw, draw.choice([dictionary, other])))
    got = applied(rows, x, whole(x, prompt_length=4))
    for i, edits in enumerate(rows):
        assert torch.allclose(got[i].double(), edit_row(edits, x[i], 4), atol=3e-5), i
        untouched = [t for t in range(9) if torch.equal(edit_row(edits, x[i], 4)[t], x[i, t].double())]
        assert torch.equal(got[i, untouched], x[i, untouched])
    assert any(not row for row in rows)


def test_ablation_by_the_encoder_keeps_the_error_of_the_dictionary(dictionary: Dictionary) -> None:
    x = activations(1, 50)[0]
    ids = [2, 7, 13]
    edit = Intervention("ablate", latents(dictionary, ids), SITES[1], read="encoder")
    got = applied([[edit]], x[None], whole(x[None]))[0]
    codes = encode.encode_dense(dictionary, x)
    error = x - encode.decode(dictionary, codes)
    kept = codes.clone()
    kept[:, ids] = 0
    assert (codes[:, ids] > 0).any()
    assert torch.allclose(got, encode.decode(dictionary, kept) + error, atol=1e-5)


def test_the_encoder_reads_what_the_dictionary_encodes(dictionary: Dictionary) -> None:
    x = activations(3, 20)
    ids = [1, 9, 22]
    target = latents(dictionary, ids)
    want = encode.encode_dense(dictionary, x)[..., ids]
    assert torch.allclose(target.amounts(x, "encoder"), want, atol=1e-6)
    unit = dictionary.W_dec[ids] / dictionary.W_dec[ids].norm(dim=-1, keepdim=True)
    assert torch.allclose(target.amounts(x, "projection"), x @ unit.T, atol=1e-5)


def test_capping_a_direction_at_gain_two_reflects_the_excess() -> None:
    x = activations(4, 25)
    u = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    edit = Intervention("cap", direction(u), SITES[0], level=Level((0.2,), "base_mean"), gain=2.0)
    u = u / u.norm()
    excess = (x @ u - 0.2).relu()
    got = applied([[edit]], x, whole(x))
    assert torch.allclose(got, x - 2 * excess[..., None] * u, atol=1e-5)
    below = excess == 0
    assert below.any() and torch.equal(got[below], x[below])


def test_projecting_out_removes_the_whole_span() -> None:
    x = activations(2, 10)
    span = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(4))
    got = applied([[Intervention("project_out", direction(span), SITES[0])]], x, whole(x))
    assert torch.allclose(got @ span.T, torch.zeros(2, 10, 3), atol=1e-4)
    rest = torch.linalg.qr(torch.cat([span, torch.eye(D_MODEL)[3:]]).T).Q[:, 3:]
    assert torch.allclose(got @ rest, x @ rest, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), gain=st.floats(0, 4))
def test_the_gain_interpolates_linearly(seed: int, gain: float) -> None:
    dictionary = make_dictionary(("relu", "jumprelu", "topk")[seed % 3])
    edit = random_intervention(random.Random(seed), dictionary, positions="all", gain=1.0)
    x = activations(1, 6, seed)
    full = applied([[edit]], x, whole(x)) - x
    got = applied([[edit.with_gain(gain)]], x, whole(x)) - x
    assert torch.allclose(got, gain * full, atol=1e-5 * (1 + gain))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_clamping_is_capping_and_flooring(seed: int) -> None:
    """Of one direction, at one level: what the cap leaves the floor moves, and the other way round."""
    dictionary = make_dictionary("jumprelu", seed)
    level = Level((random.Random(seed).uniform(-1, 1),))
    x = activations(2, 5, seed)
    target = latents(dictionary, [seed % 24])
    moved = {
        op: applied([[Intervention(op, target, SITES[0], "all", level)]], x, whole(x)) - x  # type: ignore[arg-type]
        for op in ("cap", "floor", "clamp")
    }
    assert torch.allclose(moved["cap"] + moved["floor"], moved["clamp"], atol=1e-5)


def test_a_matched_random_direction_moves_every_token_as_far() -> None:
    draw = random.Random(2)
    dictionary = make_dictionary()
    x = activations(12, 8)
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(8))
    vector = vector / vector.norm()
    sets = [
        [random_intervention(draw, dictionary, site=SITES[0]) for _ in range(1 + i % 3)] for i in range(12)
    ]
    null: list[list[PlannedEdit]] = [[RandomMatched(e, vector) for e in edits] for edits in sets]
    # plain rows between random ones
    for i in range(0, 12, 4):
        null[i] = list(sets[i])
    got = applied(null, x, whole(x, 3)) - x
    for i, edits in enumerate(sets):
        want = edit_row(edits, x[i], 3) - x[i].double()
        assert torch.allclose(got[i].norm(dim=-1).double(), want.norm(dim=-1), atol=2e-5)
        if i % 4:
            assert torch.allclose(got[i], got[i].norm(dim=-1, keepdim=True) * vector, atol=2e-5)


def test_what_the_firing_says_is_what_happened() -> None:
    dictionary = make_dictionary()
    x = activations(4, 6)
    cap = Intervention("cap", latents(dictionary, [3]), SITES[1], "prompt", Level((0.1,)))
    active = Intervention(
        "add",
        latents(dictionary, [5]),
        SITES[1],
        (1, 4),
        Level((2.0,)),
        condition=Condition("active"),
    )
    rows: list[list[PlannedEdit]] = [[cap], [], [active], [cap, active]]
    edit = SiteEdit([[e.compiled for e in row] for row in rows])
    _, firing = edit.apply(x, whole(x, 3))
    assert firing is not None and firing.rows is not None
    assert firing.rows.tolist() == [0, 2, 3]
    did = moved([firing, firing])
    assert did.selected.tolist() == [6, 4, 8]
    for slot, i in enumerate([0, 2, 3]):
        far = (edit_row(rows[i], x[i], 3) - x[i].double()).norm(dim=-1)
        assert int(did.changed[slot]) == 2 * int((far > 0).sum())
        assert float(did.norm_sum[slot]) == pytest.approx(2 * float(far.sum()), rel=1e-4, abs=1e-6)
        assert float(did.norm_max[slot]) == pytest.approx(float(far.max()), rel=1e-4, abs=1e-6)
    fires = encode.encode_latents(dictionary, x[2], [5])[[1, 4], 0] > 0
    assert int(did.edited[1]) == 2 * int(fires.sum())


def test_half_precision_is_edited_in_full_and_rounded_once() -> None:
    dictionary = make_dictionary()
    x = activations(3, 10).bfloat16()
    edit = Intervention("clamp", latents(dictionary, [4, 8]), SITES[0], "all", Level((0.7,)))
    got = applied([[edit]], x, whole(x))
    assert got.dtype == torch.bfloat16
    want = torch.stack([edit_row([edit], row, 10) for row in x])
    # one rounding to 8 bits of mantissa
    assert bool(((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all())


def test_autocast_does_not_touch_the_amounts() -> None:
    dictionary = make_dictionary()
    x = activations(2, 4)
    edit = Intervention("ablate", latents(dictionary, [4]), SITES[0])
    plain = applied([[edit]], x, whole(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(applied([[edit]], x, whole(x)), plain)


def test_a_batch_that_the_plan_does_not_divide_is_refused() -> None:
    edits = [[Intervention("ablate", latents(make_dictionary(), [i]), SITES[0])] for i in range(2)]
    x = activations(3, 2)
    with pytest.raises(MismatchError, match="2 rows and the batch 3"):
        applied(edits, x, whole(x))  # type: ignore[arg-type]


def test_a_repeated_prompt_keeps_its_rows_together() -> None:
    """num_return_sequences repeats in place: plan rows a, b serve a batch a, a, a, b, b, b."""
    dictionary = make_dictionary()
    a = Intervention("clamp", latents(dictionary, [1]), SITES[0], "all", Level((1.0,)))
    b = Intervention("add", latents(dictionary, [2]), SITES[0], "all", Level((1.0,)))
    x = activations(6, 3)
    got = applied([[a], [b]], x, whole(x))
    for i in range(6):
        assert torch.allclose(got[i].double(), edit_row([a if i < 3 else b], x[i], 3), atol=1e-5)


def test_one_encoding_serves_all_rows_of_one_top_k_dictionary() -> None:
    dictionary = make_dictionary("topk")
    x = activations(24, 5)
    rows: list[list[PlannedEdit]] = [
        [Intervention("ablate", latents(dictionary, [i]), SITES[0])] for i in range(24)
    ]
    edit = SiteEdit([[e.compiled for e in row] for row in rows])
    got, _ = edit.apply(x, whole(x))
    codes = encode.encode_dense(dictionary, x)
    for i in range(24):
        want = x[i] - codes[i, :, i, None] * dictionary.W_dec[i]
        assert torch.allclose(got[i], want, atol=1e-5)
    assert len(edit._sources) == 1


def test_the_plan_compiles_equal_rows_once() -> None:
    edit = Intervention("ablate", latents(make_dictionary(), [1]), SITES[0])
    plan = SteeringPlan(((edit,), (), (edit,), (edit,)))
    assert plan.sites[SITES[0]]._read.shape[0] == 1
    x = activations(4, 2)
    got, _ = plan.sites[SITES[0]].apply(x, whole(x))
    assert torch.equal(got[1], x[1])
    assert torch.allclose(got[3, 0].double(), x[3, 0].double() + token_delta(edit, x[3, 0]), atol=1e-5)
