"""The random control of an edit, in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.hooks import capture_at
from persona_probe.model import LanguageModel
from persona_probe.steering import (
    Intervention,
    Level,
    RandomMatched,
    SteeringPlan,
    latents,
    matched_random,
    steer,
)
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, make_dictionary, padded
from tests.steering.reference import slow_logits


def cap(site: str = SITES[1], index: int = 3, **fields: Any) -> Intervention:
    target = latents(make_dictionary(), [index])
    return Intervention("cap", target, site, level=Level((-0.2,)), read="projection", **fields)


def norms(lm: LanguageModel, fix: Any, site: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How far `fix` moves each token at `site`."""
    found = []
    for edits in ((), fix):
        with steer(lm, edits), capture_at(lm.hf, [site]) as captured, torch.no_grad():
            captured.run(lambda: lm.hf(**batch))
        found.append(captured[site])
    return (found[1] - found[0]).norm(dim=-1)


def test_it_moves_each_token_as_far_as_the_edit_would(llama: LanguageModel) -> None:
    batch = padded([[4, 5, 6, 7], [8, 9], [3]])
    fix = [cap(gain=2.0), cap(index=9, positions="last_prompt")]
    null = matched_random(fix, torch.Generator().manual_seed(3))
    want, got = norms(llama, fix, SITES[1], batch), norms(llama, null, SITES[1], batch)
    assert torch.allclose(got, want, atol=1e-5) and (want > 0.1).any() and (want == 0).any()
    with steer(llama, fix) as receipt, torch.no_grad():
        llama.hf(**batch)
    with steer(llama, null) as null_receipt, torch.no_grad():
        llama.hf(**batch)
    assert null_receipt.edits == receipt.edits and null_receipt.changed == receipt.changed
    for one, other in zip(receipt.mean_norm[SITES[1]], null_receipt.mean_norm[SITES[1]], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_random_rows_among_others_equal_the_slow_way(llama: LanguageModel) -> None:
    ids = [[4, 5, 6, 7], [8, 9], [3], [5, 5, 5]]
    null = matched_random([cap(), cap(SITES[2], 7)], torch.Generator().manual_seed(4))
    plan = SteeringPlan((null, (cap(),), (), null))
    batch = padded(ids)
    with steer(llama, plan), torch.no_grad():
        got = llama.hf(**batch).logits
    for i, row in enumerate(ids):
        want = slow_logits(llama.hf, row, plan.rows[i], len(row))
        assert torch.allclose(got[i, -len(row) :], want, atol=3e-5)


def test_one_isotropic_direction_per_site() -> None:
    fix = [cap(), cap(index=4), cap(SITES[2])]
    one, two, three = matched_random(fix, torch.Generator().manual_seed(0))
    assert torch.equal(one.vector, two.vector) and not torch.equal(one.vector, three.vector)
    assert float(three.vector.norm()) == pytest.approx(1, abs=1e-5)
    again = matched_random(fix[0], torch.Generator().manual_seed(0))
    assert torch.equal(again.vector, one.vector) and again.intervention is fix[0]
    g = torch.Generator().manual_seed(1)
    many = torch.stack([matched_random(fix[0], g).vector for _ in range(2000)])
    # uniform on the sphere: mean 0, covariance 1/d
    assert many.mean(0).abs().max() < 0.03
    assert torch.allclose(many.T @ many / 2000, torch.eye(D_MODEL) / D_MODEL, atol=0.02)


def test_what_is_refused() -> None:
    unit = torch.eye(D_MODEL)[0]
    with pytest.raises(InputError, match="length 2"):
        RandomMatched(cap(), 2 * unit)
    with pytest.raises(MismatchError, match="width 16"):
        RandomMatched(cap(), torch.ones(1))
    with pytest.raises(NonFiniteError):
        RandomMatched(cap(), unit * float("nan"))
    with pytest.raises(InputError, match="or none"):
        SteeringPlan.of([RandomMatched(cap(), unit), cap(index=4)])
    with pytest.raises(InputError, match="or none"):
        SteeringPlan.of([RandomMatched(cap(), unit), RandomMatched(cap(index=4), unit.roll(1))])
    with pytest.raises(InputError, match="same direction"):
        SteeringPlan.of([RandomMatched(cap(), unit), RandomMatched(cap(gain=2.0), unit)])


def test_gain_zero_has_no_null(llama: LanguageModel) -> None:
    null = matched_random(cap(gain=0.0), torch.Generator())
    ids = torch.tensor([[4, 5]])
    with steer(llama, null) as receipt, torch.no_grad():
        got = llama.hf(ids).logits
    assert receipt.sites == () and torch.equal(got, llama.forward(ids))


def test_gradients_are_finite_where_nothing_moves(llama: LanguageModel) -> None:
    """The length of a zero vector has no slope; torch takes 0."""
    out_of_reach = Intervention("cap", direction(torch.ones(D_MODEL)), SITES[1], level=Level((1e6,)))
    null = matched_random(out_of_reach, torch.Generator().manual_seed(0))
    weight: Any = llama.hf.model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr, index]
    llama.hf.zero_grad()
    with steer(llama, null):
        llama.hf(torch.tensor([[4, 5]])).logits.sum().backward()
    assert bool(weight.grad.isfinite().all()) and bool((weight.grad != 0).any())
    llama.hf.zero_grad()
