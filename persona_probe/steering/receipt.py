"""What steering did, in numbers: a hook that does not fire is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_probe.errors import NotFiredError, NothingSelectedError
from persona_probe.steering.firing import Firing, moved

_SELECTED, _EDITED, _CHANGED, _NORM = range(4)
_TOGETHER = 64


@dataclass
class _SiteTally:
    edits: str
    firings: int = 0
    batch: int = 0
    waiting: list[Firing] = field(default_factory=list[Firing])
    """Of passes over `batch` rows, not summed up yet."""
    sums: Float[Tensor, "4 row"] = field(default_factory=lambda: torch.zeros(4, 0))
    largest: Float[Tensor, " row"] = field(default_factory=lambda: torch.zeros(0))


class Receipt:
    """Counts and distances per site and row of the plan (of the batch, where one entry serves every
    row).

    Rows repeated by `num_return_sequences` are counted together. Numbers are kept on the model's
    device until read.
    """

    def __init__(self, sites: Mapping[str, str], rows: int, *, kl: bool = False) -> None:
        self._rows = rows
        self._sites = {site: _SiteTally(edits) for site, edits in sites.items()}
        self._origin: Int[Tensor, " batch"] | None = None
        self._kl: Float[Tensor, "2 row"] | None = torch.zeros(2, 0) if kl else None

    def select(self, rows: Int[Tensor, " row"], batch: int) -> None:
        """From now on row i of the batch counts as what was row `rows[i]` of one of this size."""
        for _ in self._tallies():
            pass  # what is waiting belongs to the batch as it was
        self._origin = self._of(batch)[rows]

    def _of(self, batch: int) -> Int[Tensor, " batch"]:
        """Which row here each row of a batch is counted as."""
        if self._origin is not None:
            return self._origin
        repeats = batch // self._rows if self._rows > 1 else 1
        return torch.arange(batch) // repeats

    def _counted(self, sums: Float[Tensor, "n some_row"], batch: int, rows: Tensor | None) -> Tensor:
        """Per-row sums of (some rows of) a batch, by row here."""
        origin = self._of(batch).to(sums.device)
        origin = origin if rows is None else origin[rows]
        n = self._rows if self._rows > 1 else int(self._of(batch).max()) + 1
        return sums.new_zeros(len(sums), n).index_add(1, origin, sums)

    def record_kl(self, kl: Float[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"]) -> None:
        """Add the divergences of one pass at the tokens that count."""
        assert self._kl is not None
        kl = kl.double()
        sums = torch.stack([torch.where(counted, kl, 0.0).sum(dim=1), counted.sum(dim=1).double()])
        self._kl = _added(self._kl, self._counted(sums, len(kl), None))

    def record(self, site: str, batch: int, firing: Firing | None) -> None:
        """Add one forward pass of `batch` rows at `site`."""
        tally = self._sites[site]
        tally.firings += 1
        if firing is None:
            return
        # summed up together: one by one would cost as much as the edit itself
        same = tally.waiting and tally.waiting[0].write is firing.write and tally.batch == batch
        if len(tally.waiting) >= _TOGETHER or not same:
            self._sum_up(tally)
        tally.batch = batch
        tally.waiting.append(firing)
        if firing.change.shape[1] > 1:  # a long prompt is not kept waiting in memory
            self._sum_up(tally)

    def _sum_up(self, tally: _SiteTally) -> _SiteTally:
        if not tally.waiting:
            return tally
        rows, batch = tally.waiting[0].rows, tally.batch
        *counts, largest = moved(tally.waiting)
        tally.waiting.clear()
        sums = torch.stack([each.double() for each in counts])
        tally.sums = _added(tally.sums, self._counted(sums, batch, rows))
        origin = self._of(batch).to(sums.device)
        origin = origin if rows is None else origin[rows]
        grown = sums.new_zeros(tally.sums.shape[1])
        grown[: len(tally.largest)] = tally.largest
        tally.largest = grown.scatter_reduce(0, origin, largest.double(), "amax")
        return tally

    def _tallies(self) -> Iterator[tuple[str, _SiteTally]]:
        for site, tally in self._sites.items():
            yield site, self._sum_up(tally)

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
            for site, tally in self._tallies()
        }

    @property
    def max_norm(self) -> dict[str, tuple[float, ...]]:
        """Largest distance that a token was moved, per site and row."""
        return {site: tuple(tally.largest.tolist()) for site, tally in self._tallies()}

    @property
    def kl(self) -> tuple[float | None, ...] | None:
        """Mean KL(steered || unsteered) of the next token, in nats, per row, over the tokens that
        produce the response; None for a row without any, and altogether where it was not asked for.
        """
        if self._kl is None:
            return None
        return tuple(total / n if n else None for total, n in self._kl.T.tolist())

    @property
    def zero_effect(self) -> bool:
        """Whether edits were due and not one token moved: a level that nothing reaches, or the
        wrong site.
        """
        return bool(self._sites) and self.tokens_changed == 0

    def check(self) -> None:
        """Raise `NotFiredError` when a site was never reached, `NothingSelectedError` (one of those) when
        none of its positions ever came up.
        """
        for site, tally in self._tallies():
            if not tally.firings:
                raise NotFiredError(
                    f"nothing was steered: no forward pass went through {site} ({tally.edits})",
                    fix="run the model that was given to steer, inside the block",
                )
            if not float(tally.sums[_SELECTED].sum()):
                raise NothingSelectedError(
                    f"nothing was steered at {site}: {tally.firings} forward passes, and no token "
                    f"at the positions asked for ({tally.edits})",
                    fix="check the positions against the rows' lengths",
                )

    def _counts(self, which: int) -> dict[str, tuple[int, ...]]:
        return {
            site: tuple(int(count) for count in tally.sums[which].tolist()) for site, tally in self._tallies()
        }

    def __str__(self) -> str:
        if not self._sites:
            return "no edit (gain 0 or an empty plan)"
        lines: list[str] = []
        for site, tally in self._tallies():
            selected, edited, changed, norm = tally.sums.sum(dim=1).tolist()
            mean = f", moved {norm / edited:.3g} on average" if edited else ""
            lines.append(
                f"{site}: {tally.edits}; {tally.firings} passes, {edited:.0f} of {selected:.0f} "
                f"tokens edited, {changed:.0f} changed{mean}"
            )
        if self._kl is not None and float(self._kl[1].sum()):
            total, n = self._kl.sum(dim=1).tolist()
            lines.append(f"KL to the unsteered next token: {total / n:.3g} nats on average of {n:.0f} tokens")
        if self.zero_effect:
            lines.append("warning: no token moved at all")
        return "\n".join(lines)

    __repr__ = __str__


def _added(sums: Float[Tensor, "n row"], more: Float[Tensor, "n more_row"]) -> Float[Tensor, "n most_row"]:
    """Row by row; the one with fewer rows has nothing in the others."""
    wide, narrow = (more, sums) if more.shape[1] > sums.shape[1] else (sums, more)
    out = wide.to(more).clone()
    out[:, : narrow.shape[1]] += narrow.to(more)
    return out
