"""The controls: latents that are not the winner, directions that are moved as far."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from persona_probe.model.chat import pad
from persona_probe.model.pair import ModelPair
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.screening.margin import Contrast
from persona_probe.screening.nulls import random_directions, random_latents
from persona_probe.steering.matched import RandomMatched
from persona_probe.steering.plan import SteeringPlan, steer
from tests.screening.conftest import D_MODEL, SITES, make_evidence

LIVE = (2, 3, 5, 8, 13, 21, 34)


def test_the_winner_is_never_among_them() -> None:
    evidence = [make_evidence(site, live=LIVE) for site in SITES[:2]]
    winner = Candidate("set", (evidence[0].latent(5), evidence[1].latent(8), evidence[1].latent(21)))
    taken = {(carrier.site, carrier.index) for carrier in winner.carriers}
    seen: set[tuple[str, int | None]] = set()
    for seed in range(20):
        drawn = random_latents(evidence, winner, 2, seed=seed, exclude=[(SITES[0], 2)])
        assert len(drawn) == 2
        members = [(carrier.site, carrier.index) for one in drawn for carrier in one.carriers]
        assert len(set(members)) == len(members)  # each control is of latents of its own
        assert not set(members) & {*taken, (SITES[0], 2)}
        assert {index for _, index in members} <= set(LIVE)
        for one in drawn:
            assert one.kind == "random latent"
            assert [carrier.site for carrier in one.carriers] == [c.site for c in winner.carriers]
        seen |= set(members)
    assert len(seen) == 2 * len(LIVE) - len(taken) - 1  # and any other may be


def test_fewer_where_there_are_fewer() -> None:
    evidence = [make_evidence(SITES[0], live=LIVE)]
    single = Candidate("latent", (evidence[0].latent(5),))
    assert len(random_latents(evidence, single, 100, seed=0)) == len(LIVE) - 1
    twins = Candidate("set", (evidence[0].latent(5), evidence[0].latent(8)))
    assert len(random_latents(evidence, twins, 100, seed=0)) == (len(LIVE) - 2) // 2
    elsewhere = Candidate("latent", (make_evidence(SITES[1]).latent(1),))
    assert random_latents(evidence, elsewhere, 5, seed=0) == []


def test_the_seed_decides() -> None:
    evidence = [make_evidence(SITES[0])]
    winner = Candidate("latent", (evidence[0].latent(5),))
    drawn = [
        [one.carriers[0].index for one in random_latents(evidence, winner, 8, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_a_random_direction_is_moved_as_far_at_every_token(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Callable[..., Carrier], gain: float
) -> None:
    members = (carrier_at(SITES[1], seed=2), carrier_at(SITES[1], seed=3, rises=False))
    fix = Candidate("set", members).cure(gain)
    nulls = random_directions(fix, 6, seed=3)
    rows = [contrast.tuned for contrast in contrasts]
    ids, mask, _ = pad(rows, pair.tuned.pad_id, side="right")
    lengths = [row.prompt_length for row in rows]

    def norms(edits: tuple[object, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        plan = SteeringPlan((edits,) * len(rows))  # type: ignore[arg-type]
        with steer(pair.tuned, plan, prompt_lengths=lengths) as receipt:
            pair.tuned.forward(ids, mask)
        mean, largest = receipt.mean_norm[SITES[1]], receipt.max_norm[SITES[1]]
        return torch.tensor([norm or 0.0 for norm in mean]), torch.tensor(largest)

    expected = norms(fix)
    assert expected[0].min() > 0
    for null in nulls:
        assert all(isinstance(edit, RandomMatched) for edit in null)
        for found, wanted in zip(norms(null), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_random_directions_are_random_and_one_to_a_site(carrier_at: Callable[..., Carrier]) -> None:
    members = (carrier_at(SITES[0], 1), carrier_at(SITES[0], 2), carrier_at(SITES[1], 3))
    fix = Candidate("set", members).cure(1.0)
    nulls = random_directions(fix, 50, seed=3)
    assert len(nulls) == 50
    vectors = torch.stack([null[0].vector for null in nulls])
    assert all(torch.equal(null[0].vector, null[1].vector) for null in nulls)
    assert not any(torch.equal(null[0].vector, null[2].vector) for null in nulls)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(50))
    overlap = (vectors @ vectors.T).fill_diagonal_(0)
    assert overlap.square().mean() < 2 / D_MODEL  # 1/d for directions drawn evenly
    again = random_directions(fix, 50, seed=3)
    assert all(torch.equal(one[0].vector, other[0].vector) for one, other in zip(nulls, again, strict=True))
    other = random_directions(fix, 1, seed=4)
    assert not torch.equal(other[0][0].vector, nulls[0][0].vector)
