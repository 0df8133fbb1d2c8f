"""The controls of a screen: random latents given the winner's search, random directions its distance.

A random *latent* gets what the winner got: its site, its operation, its levels, the whole grid of gains,
and the best setting on the calibration questions. A random *direction* gets the distance that the
winner's edit realises at each token (the same settings would hardly touch it).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from random import Random

import torch

from persona_probe.screening.candidate import Candidate
from persona_probe.screening.evidence import SiteEvidence
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.matched import RandomMatched, matched_random


def random_latents(
    evidence: Sequence[SiteEvidence],
    like: Candidate,
    count: int,
    *,
    seed: int,
    exclude: Collection[tuple[str, int | None]] = (),
) -> list[Candidate]:
    """``count`` candidates of as many live latents at the same sites as ``like``, none of them in it.

    Fewer where the dictionaries have fewer live latents than that.
    """
    rng = Random(seed)
    at = {site.site: site for site in evidence if site.table is not None}
    taken = {(carrier.site, carrier.index) for carrier in like.carriers} | set(exclude)
    pools = {
        site: [index for index in at[site].live() if (site, index) not in taken]
        for site in dict.fromkeys(carrier.site for carrier in like.carriers)
        if site in at
    }
    for pool in pools.values():
        rng.shuffle(pool)
    drawn: list[Candidate] = []
    for _ in range(count):
        sites = [carrier.site for carrier in like.carriers]
        if any(len(pools.get(site, ())) < sites.count(site) for site in sites):
            break
        carriers = tuple(at[site].latent(pools[site].pop()) for site in sites)
        drawn.append(Candidate("random latent", carriers))
    return drawn


def random_directions(
    fix: tuple[Intervention, ...], count: int, *, seed: int
) -> list[tuple[RandomMatched, ...]]:
    """``count`` nulls of a fix: one random direction per site, moved as far as the fix moves each token."""
    generator = torch.Generator().manual_seed(seed)
    return [matched_random(fix, generator) for _ in range(count)]
