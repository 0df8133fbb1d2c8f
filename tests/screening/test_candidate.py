"""Candidates: what their edits do to a model's projections, and what evidence makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from persona_probe.hooks.capture import capture_at
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.screening.evidence import block_name, mean_differences
from persona_probe.screening.margin import Contrast, Fix
from persona_probe.steering.plan import steer
from tests.screening.conftest import D_SAE, SITES, make_evidence

Make = Callable[..., Carrier]


def _states(lm: LanguageModel, row: Rendered, site: str, fix: Fix = ()) -> torch.Tensor:
    """The residual stream of one row at a site, under a fix."""
    capture = capture_at(lm.hf, [site], stop_after_deepest=False)
    with steer(lm, fix, prompt_lengths=[row.prompt_length]), capture as captured:
        captured.run(lambda: lm.forward(torch.tensor([row.ids])))
    return captured[site][0].detach()


@pytest.mark.parametrize("rises", [True, False])
def test_a_cure_at_gain_1_brings_what_moved_back_to_the_base_mean(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make, rises: bool
) -> None:
    carrier = carrier_at(SITES[1], seed=2, rises=rises)
    candidate = Candidate("difference of means", (carrier,))
    moved = stayed = 0
    for contrast in contrasts:
        before = _states(pair.tuned, contrast.tuned, SITES[1])
        after = _states(pair.tuned, contrast.tuned, SITES[1], candidate.cure(1.0))
        z, new = before @ carrier.unit, after @ carrier.unit
        beyond = z > carrier.base_mean if rises else z < carrier.base_mean
        expected = torch.where(beyond, carrier.base_mean, z)
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-5)
        assert torch.equal(after[~beyond], before[~beyond])
        rest = (after - before) - (new - z)[:, None] * carrier.unit
        assert rest.abs().max() < 1e-5  # it moves along the direction alone
        moved, stayed = moved + int(beyond.sum()), stayed + int((~beyond).sum())
    assert moved > 5 and stayed > 5


@pytest.mark.parametrize("gain", [0.5, 1.5, 2.0, 3.0])
def test_gain_multiplies_the_way_back(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make, gain: float
) -> None:
    carrier = carrier_at(SITES[0], seed=1)
    row = contrasts[5].tuned
    z = _states(pair.tuned, row, SITES[0]) @ carrier.unit
    new = _states(pair.tuned, row, SITES[0], (carrier.cure(gain),)) @ carrier.unit
    excess = (z - carrier.base_mean).clamp(min=0)
    assert excess.max() > 0.01
    torch.testing.assert_close(new, z - gain * excess, rtol=0, atol=1e-5)


def test_a_cure_of_the_last_prompt_token_touches_no_other(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make
) -> None:
    touched = 0
    for contrast in contrasts:
        row = contrast.tuned
        fix = Candidate("latent", (carrier_at(SITES[1], seed=5),)).cure(2.0, "last_prompt")
        moved = (_states(pair.tuned, row, SITES[1], fix) - _states(pair.tuned, row, SITES[1])).norm(dim=-1)
        others = [place for place in range(len(row)) if place != row.prompt_length - 1]
        assert not moved[others].any()
        touched += bool(moved[row.prompt_length - 1] > 0)
    assert touched > 0


def test_a_set_brings_back_every_member(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make
) -> None:
    one, other = carrier_at(SITES[1], seed=2), carrier_at(SITES[1], seed=3, rises=False)
    across = other.unit - (other.unit @ one.unit) * one.unit
    across /= across.norm()
    other = make_evidence(SITES[1]).carrier(type(other.target)(across[None]), "across")
    row = contrasts[6].tuned
    before = _states(pair.tuned, row, SITES[1])
    after = _states(pair.tuned, row, SITES[1], Candidate("set", (one, other)).cure(1.0))
    for carrier in (one, other):
        z = before @ carrier.unit
        beyond = z > carrier.base_mean if carrier.rises else z < carrier.base_mean
        expected = torch.where(beyond, carrier.base_mean, z)
        torch.testing.assert_close(after @ carrier.unit, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rises", [True, False])
def test_inducing_pushes_the_way_it_moved(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make, rises: bool
) -> None:
    carrier = carrier_at(SITES[1], seed=4, rises=rises)
    row = contrasts[2].base
    before = _states(pair.base, row, SITES[1])
    after = _states(pair.base, row, SITES[1], Candidate("latent", (carrier,)).induce(3.0))
    step = 3.0 * carrier.residual_rms * (1 if rises else -1)
    torch.testing.assert_close(after, before + step * carrier.unit, rtol=0, atol=1e-5)


def test_inducing_with_a_set_follows_the_joint_shift_of_each_site(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make
) -> None:
    here = (carrier_at(SITES[1], seed=4), carrier_at(SITES[1], seed=5, rises=False))
    above = carrier_at(SITES[2], seed=6)
    fix = Candidate("set", (*here, above)).induce(2.0)
    assert [edit.site for edit in fix] == [SITES[1], SITES[2]]
    row = contrasts[2].base
    moved = _states(pair.base, row, SITES[1], fix) - _states(pair.base, row, SITES[1])
    joint = sum(carrier.shift * carrier.unit for carrier in here)
    expected = 2.0 * 0.5 * joint / joint.norm()
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=0, atol=1e-5)


def test_a_carrier_is_measured_on_its_unit_direction() -> None:
    site = make_evidence(SITES[1])
    assert site.dictionary is not None
    carrier = site.latent(7)
    unit = site.dictionary.W_dec[7].double()
    assert carrier.base_mean == pytest.approx(float(site.base_mean @ unit), abs=1e-5)
    assert carrier.shift == pytest.approx(float((site.tuned_mean - site.base_mean) @ unit), abs=1e-5)
    assert (carrier.label, carrier.index, carrier.site) == ("1:7", 7, SITES[1])
    assert carrier.rises == (carrier.shift >= 0)


def test_the_difference_of_means_less_the_mean_benign_shift() -> None:
    site = make_evidence(SITES[1], benign=2)
    shift = site.tuned_mean - site.base_mean
    benign = torch.stack(site.benign_means).mean(dim=0) - site.base_mean
    for corrected, vector in ((False, shift), (True, shift - benign)):
        carrier = site.mean_difference(corrected=corrected)
        assert carrier is not None
        torch.testing.assert_close(carrier.unit.double(), vector / vector.norm(), rtol=0, atol=1e-5)
    alone, other = make_evidence(SITES[0]), make_evidence(SITES[1])
    found = mean_differences([alone, other], corrected=False)
    assert [len(candidate.carriers) for candidate in found] == [1, 1, 2]
    assert len(mean_differences([alone], corrected=False)) == 1


def test_models_that_do_not_differ_have_no_difference_of_means() -> None:
    site = make_evidence(SITES[1])
    still = type(site)(site.site, site.base_mean, site.base_mean, (), 0.5)
    assert still.mean_difference(corrected=False) is None
    assert mean_differences([still], corrected=False) == []
    assert still.candidates(5) == []


def test_candidates_are_the_largest_of_each_ranking_either_way() -> None:
    plain = make_evidence(SITES[1])
    assert sorted(plain.candidates(3)) == [D_SAE - 3, D_SAE - 2, D_SAE - 1]
    assert 0 not in plain.candidates(D_SAE)  # it did not move
    tested = make_evidence(SITES[1], benign=1)
    assert sorted(tested.candidates(2)) == [0, 1, D_SAE - 2, D_SAE - 1]
    assert plain.size_of_shift(7) == pytest.approx(0.7)


def test_sites_have_short_names() -> None:
    assert block_name("blocks.12.hook_resid_post") == "12"
    assert block_name("blocks.12.hook_mlp_out") == "12.mlp_out"
