"""What an edit did in a forward pass, kept as it fell out, and worked out for many passes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Firing(NamedTuple):
    """What one forward pass did at one site, per edited row."""

    rows: Int[Tensor, " row"] | None
    """Their indices in the batch; None means all."""
    change: Float[Tensor, "row pos latent"]
    """How far each amount was moved."""
    write: Float[Tensor, "row latent d_model"] | Float[Tensor, "latent d_model"]
    """What a change of one adds to the activation."""
    selected: Bool[Tensor, "row pos slot"] | None
    """Tokens at the positions asked for; None means all."""
    keep: Bool[Tensor, "row pos kept"] | None
    """Those of them where the condition held; None means all."""


class Moved(NamedTuple):
    """What some forward passes did together, per edited row."""

    selected: Int[Tensor, " row"]
    """Tokens at the positions asked for."""
    edited: Int[Tensor, " row"]
    """Those of them where the condition held."""
    changed: Int[Tensor, " row"]
    """Those of them that moved."""
    norm_sum: Float[Tensor, " row"]
    """Realised distances moved, in units of the activation."""
    norm_max: Float[Tensor, " row"]


@torch.no_grad()
def moved(firings: Sequence[Firing]) -> Moved:
    """What passes over the same rows, with the same edit, did together."""
    change = torch.cat([each.change for each in firings], dim=1)
    norm = torch.linalg.vector_norm(change @ firings[0].write, dim=-1)
    selected, edited = (
        sum(_tokens(each.change, mask) for each, mask in zip(firings, masks, strict=True))
        for masks in ([each.selected for each in firings], [each.keep for each in firings])
    )
    assert isinstance(selected, Tensor) and isinstance(edited, Tensor)
    return Moved(selected, edited, (norm > 0).sum(dim=-1), norm.sum(dim=-1), norm.amax(dim=-1))


def _tokens(
    change: Float[Tensor, "row pos latent"], mask: Bool[Tensor, "row pos slot"] | None
) -> Int[Tensor, " row"]:
    """How many tokens of each row a mask has."""
    if mask is None:
        return torch.full(change.shape[:1], change.shape[1], device=change.device)
    return mask.any(dim=-1).sum(dim=-1)
