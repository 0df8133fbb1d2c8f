"""Directions that need no dictionary, and the scale of a site."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, MismatchError, NonFiniteError


def difference_of_means(
    tuned_mean: Float[Tensor, "..."],
    base_mean: Float[Tensor, "..."],
    benign_means: Sequence[Float[Tensor, "..."]] = (),
) -> Float[Tensor, " d_model"]:
    """The shift `tuned - base` of the mean activation, in fp64, `[d_model]`.

    With the means of benign fine-tunes of the same base, their mean shift is taken off (difference
    in differences): every fine-tune moves the residual stream, mostly alike. Not scaled to length
    1: its length is the shift. Raises `MismatchError` for different widths, `NonFiniteError`.
    """
    means = [tuned_mean, base_mean, *benign_means]
    for mean in means:
        if mean.ndim != 1 or mean.shape != base_mean.shape:
            raise MismatchError(f"means of one width are needed, got {[tuple(m.shape) for m in means]}")
        if not bool(mean.isfinite().all()):
            raise NonFiniteError("a mean activation holds NaN or infinite numbers")
    base = base_mean.detach().double()
    shift = tuned_mean.detach().to(base) - base
    if not benign_means:
        return shift
    return shift - torch.stack([mean.detach().to(base) - base for mean in benign_means]).mean(dim=0)


def residual_rms(x: Float[Tensor, "..."]) -> float:
    """The scale of a site: the root mean square of its activations' entries.

    `x` is `[*, d_model]`, real tokens only. Raises `InputError` when there is none,
    `NonFiniteError`.
    """
    if x.ndim < 2 or x.numel() == 0:
        raise InputError(f"activations [token, d_model] are needed, got {tuple(x.shape)}")
    rms = float(x.detach().double().square().mean().sqrt())
    if rms != rms or rms == float("inf"):
        raise NonFiniteError("the activations hold NaN or infinite numbers")
    return rms
