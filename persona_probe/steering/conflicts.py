"""Edits of one row that cannot be made together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from persona_probe.errors import InputError, MismatchError
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.matched import RandomMatched
from persona_probe.steering.positions import may_overlap

PlannedEdit = Intervention | RandomMatched

_SAME_DIRECTION = 0.9999


def check_row(number: int, row: Sequence[PlannedEdit]) -> None:
    """Raise `InputError` for two edits that fight over one direction at the same tokens of a site, and
    for random and plain ones mixed at one; `MismatchError` for different widths.
    """
    by_site: dict[str, list[PlannedEdit]] = {}
    for edit in row:
        by_site.setdefault(edit.site, []).append(edit)
    for site, edits in by_site.items():
        random = [edit for edit in edits if isinstance(edit, RandomMatched)]
        if random and (
            len(random) < len(edits) or any(not torch.equal(edit.vector, random[0].vector) for edit in random)
        ):
            raise InputError(
                f"row {number}: a random direction stands for all the edits at {site}, or none",
                fix="make the null of the whole fix: matched_random(fix, generator)",
            )
        if random:
            edits = [edit.intervention for edit in random]
        _check_apart(number, [e for e in edits if isinstance(e, Intervention)])


def _check_apart(number: int, edits: Sequence[Intervention]) -> None:
    for i, one in enumerate(edits):
        for other in edits[i + 1 :]:
            if not may_overlap(one.positions, other.positions):
                continue
            if one.target.d_model != other.target.d_model:
                raise MismatchError(f"row {number}: {one} and {other} differ in width")
            cosines = one.target.unit @ other.target.unit.T
            if float(cosines.abs().max()) > _SAME_DIRECTION:
                raise InputError(
                    f"row {number}: two edits act on the same direction at the same tokens: {one}, "
                    f"and {other}",
                    fix="keep one of them, or nest two steer blocks to do one after the other",
                )
