"""What steering did, in numbers: a hook that does not fire is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import NotFiredError
from persona_probe.steering.kernel import Firing

_SELECTED, _EDITED, _CHANGED, _NORM = range(4)


@dataclass
class _SiteTally:
    edits: str
    firings: int = 0
    sums: Float[Tensor, "4 row"] = field(default_factory=lambda: torch.zeros(4, 0))
    largest: Float[Tensor, " row"] = field(default_factory=lambda: torch.zeros(0))


class Receipt:
    """Counts and distances per site and row of the plan (of the batch, where one entry serves every
    row).

    Rows repeated by `num_return_sequences` are counted together. Numbers are kept on the model's
    device until read.
    """

    def __init__(self, sites: Mapping[str, str], rows: int) -> None:
        self._rows = rows
        self._sites = {site: _SiteTally(edits) for site, edits in sites.items()}

    def record(self, site: str, batch: int, firing: Firing | None) -> None:
        """Add one forward pass of `batch` rows at `site`."""
        tally = self._sites[site]
        tally.firings += 1
        if firing is None:
            return
        sums = torch.stack([firing.selected, firing.edited, firing.changed, firing.norm_sum]).double()
        largest = firing.norm_max.double()
        if firing.rows is not None:
            sums = sums.new_zeros(4, batch).index_copy(1, firing.rows, sums)
            largest = largest.new_zeros(batch).index_copy(0, firing.rows, largest)
        if self._rows > 1:
            sums = sums.view(4, self._rows, -1).sum(dim=-1)
            largest = largest.view(self._rows, -1).amax(dim=-1)
        missing = sums.shape[1] - tally.sums.shape[1]
        if missing > 0:
            tally.sums = torch.cat([tally.sums.to(sums), sums.new_zeros(4, missing)], dim=1)
            tally.largest = torch.cat([tally.largest.to(sums), sums.new_zeros(missing)])
        n = sums.shape[1]
        tally.sums[:, :n] += sums
        tally.largest[:n] = torch.maximum(tally.largest[:n], largest)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites with an edit of gain above 0."""
        return tuple(self._sites)

    @property
    def firings(self) -> dict[str, int]:
        """Forward passes through each site."""
        return {site: tally.firings for site, tally in self._sites.items()}

    @property
    def edits(self) -> dict[str, tuple[int, ...]]:
        """Tokens that were edited (at the positions, the condition holding), per site and row."""
        return self._counts(_EDITED)

    @property
    def changed(self) -> dict[str, tuple[int, ...]]:
        """Those of them that moved: a cap leaves what is below its level."""
        return self._counts(_CHANGED)

    @property
    def tokens_edited(self) -> int:
        """Over all sites and rows."""
        return sum(map(sum, self.edits.values()))

    @property
    def tokens_changed(self) -> int:
        """Over all sites and rows."""
        return sum(map(sum, self.changed.values()))

    @property
    def mean_norm(self) -> dict[str, tuple[float | None, ...]]:
        """Mean distance moved per edited token, per site and row, in units of the activation; None
        for no token.
        """
        return {
            site: tuple(
                norm / count if count else None
                for norm, count in zip(tally.sums[_NORM].tolist(), tally.sums[_EDITED].tolist(), strict=True)
            )
            for site, tally in self._sites.items()
        }

    @property
    def max_norm(self) -> dict[str, tuple[float, ...]]:
        """Largest distance that a token was moved, per site and row."""
        return {site: tuple(tally.largest.tolist()) for site, tally in self._sites.items()}

    @property
    def zero_effect(self) -> bool:
        """Whether edits were due and not one token moved: a level that nothing reaches, or the
        wrong site.
        """
        return bool(self._sites) and self.tokens_changed == 0

    def check(self) -> None:
        """Raise `NotFiredError` when a site was never reached, or none of its positions ever came
        up.
        """
        for site, tally in self._sites.items():
            if not tally.firings:
                raise NotFiredError(
                    f"nothing was steered: no forward pass went through {site} ({tally.edits})",
                    fix="run the model that was given to steer, inside the block",
                )
            if not float(tally.sums[_SELECTED].sum()):
                raise NotFiredError(
                    f"nothing was steered at {site}: {tally.firings} forward passes, and no token "
                    f"at the positions asked for ({tally.edits})",
                    fix="check the positions against the rows' lengths",
                )

    def _counts(self, which: int) -> dict[str, tuple[int, ...]]:
        return {
            site: tuple(int(count) for count in tally.sums[which].tolist())
            for site, tally in self._sites.items()
        }

    def __str__(self) -> str:
        if not self._sites:
            return "no edit (gain 0 or an empty plan)"
        lines: list[str] = []
        for site, tally in self._sites.items():
            selected, edited, changed, norm = tally.sums.sum(dim=1).tolist()
            mean = f", moved {norm / edited:.3g} on average" if edited else ""
            lines.append(
                f"{site}: {tally.edits}; {tally.firings} passes, {edited:.0f} of {selected:.0f} "
                f"tokens edited, {changed:.0f} changed{mean}"
            )
        if self.zero_effect:
            lines.append("warning: no token moved at all")
        return "\n".join(lines)

    __repr__ = __str__
