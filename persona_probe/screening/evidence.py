"""What diffing measured at one site, in the form a screen reads: means, scale, latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
from jaxtyping import Float
from torch import Tensor

from persona_probe.sae.load import Dictionary
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.steering.direction import difference_of_means
from persona_probe.steering.target import Target, direction, latents

LIVE = 1e-3  # share of tokens on which a latent must fire, in either model, to be a random control


@dataclass(frozen=True, eq=False)
class SiteEvidence:
    """Base, tuned and benign models at one site, on the same tokens."""

    site: str
    base_mean: Float[Tensor, " d_model"]
    tuned_mean: Float[Tensor, " d_model"]
    benign_means: tuple[Float[Tensor, " d_model"], ...]
    residual_rms: float
    dictionary: Dictionary | None = None
    table: pl.DataFrame | None = None
    """The diff's table (a row per latent), when there is a dictionary."""

    def carrier(self, target: Target, label: str, index: int | None = None) -> Carrier:
        """Measure one direction here."""
        unit = target.unit[0]
        base = float(self.base_mean.float() @ unit)
        return Carrier(
            site=self.site,
            target=target,
            label=label,
            index=index,
            unit=unit,
            base_mean=base,
            shift=float(self.tuned_mean.float() @ unit) - base,
            residual_rms=self.residual_rms,
        )

    def latent(self, index: int) -> Carrier:
        """One latent of the dictionary."""
        assert self.dictionary is not None
        label = f"{block_name(self.site)}:{index}"
        return self.carrier(latents(self.dictionary, [index], label=label), label, index)

    def mean_difference(self, *, corrected: bool) -> Carrier | None:
        """The difference of means, less the mean benign shift if ``corrected``; None where it is 0."""
        benign = self.benign_means if corrected else ()
        vector = difference_of_means(self.tuned_mean, self.base_mean, benign)
        if float(vector.norm()) == 0.0:
            return None
        label = f"{block_name(self.site)}:mean difference" + (" − benign" if benign else "")
        return self.carrier(direction(vector.float(), label=label), label)

    def candidates(self, per_ranking: int) -> list[int]:
        """Latents worth a look: the largest |Δ| and the largest |difference in differences|."""
        if self.table is None:
            return []
        rankings = [name for name in ("delta", "did") if self.table[name].null_count() == 0]
        chosen: dict[int, None] = {}
        for name in rankings:
            moved = self.table.filter(pl.col(name) != 0)
            top = moved.sort(pl.col(name).abs(), descending=True).head(per_ranking)
            chosen.update(dict.fromkeys(top["index"].to_list()))
        return list(chosen)

    def size_of_shift(self, index: int) -> float:
        """|Δ| of one latent."""
        assert self.table is not None
        return abs(float(self.table.filter(pl.col("index") == index)["delta"][0]))

    def live(self) -> list[int]:
        """Latents that fire often enough to be a fair random control."""
        assert self.table is not None
        fires = (pl.col("fires_base") > LIVE) | (pl.col("fires_tuned") > LIVE)
        return self.table.filter(fires)["index"].to_list()


def block_name(site: str) -> str:
    """`blocks.3.hook_resid_post` -> `3`, a short name for tables; other tensors keep their name."""
    _, block, kind = site.split(".")
    return block if kind == "hook_resid_post" else f"{block}.{kind.removeprefix('hook_')}"


def mean_differences(evidence: Sequence[SiteEvidence], *, corrected: bool) -> list[Candidate]:
    """The direction path: each site's difference of means alone, then all of them together."""
    found = [site.mean_difference(corrected=corrected) for site in evidence]
    carriers = [carrier for carrier in found if carrier is not None]
    alone = [Candidate("difference of means", (carrier,)) for carrier in carriers]
    return [*alone, Candidate("difference of means", tuple(carriers))] if len(alone) > 1 else alone
