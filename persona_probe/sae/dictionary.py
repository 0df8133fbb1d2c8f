"""A sparse autoencoder as plain tensors, whatever file it came from.

One form is computed with: an encoder `act(x @ W_enc + b_enc)` (with `b_dec` subtracted from x first
where its file says so) and a decoder `f @ W_dec + b_dec`, on raw activations of one site.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError

Activation = Literal["relu", "jumprelu", "topk"]
NEURONPEDIA = "https://neuronpedia.org"


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder at one site. A *latent* is one of its units (papers say feature)."""

    site: str
    """TransformerLens name of the activation that it reads, such as `blocks.3.hook_resid_post`."""
    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"] | None
    """JumpReLU: a latent fires above its threshold and is exactly 0 below; in units of the
    activation.
    """
    activation: Activation
    k: int | None
    """Top-k: how many latents fire on a token."""
    apply_b_dec_to_input: bool
    """Whether `b_dec` is subtracted before encoding."""
    normalisation: str
    """Run-time normalisation of the input; only `none` is accepted."""
    path: str
    """Folder or registry name that it came from."""
    digest: str
    """Of its configuration and weights."""
    meta: dict[str, Any] = field(default_factory=dict[str, Any], repr=False)
    """What its file says about itself (model name, training figures)."""

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def neuronpedia(self) -> str | None:
        """Its page on Neuronpedia, where the registry names one."""
        name = self.meta.get("neuronpedia_id")
        return f"{NEURONPEDIA}/{name}" if name else None

    def latent(self, index: int) -> Latent:
        """The latent `index`. Raises `InputError` when there is none."""
        return Latent(self, index)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dictionary:
        """This dictionary with its tensors on `device` (in `dtype`)."""
        moved = {
            name: cast("Tensor", getattr(self, name)).to(device, dtype)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)

    def __repr__(self) -> str:
        rule = f"{self.activation}, k={self.k}" if self.k else self.activation
        return f"Dictionary({self.site}, {self.d_sae} latents of {self.d_model}, {rule}, {self.path})"


@dataclass(frozen=True)
class Latent:
    """One unit of a dictionary."""

    sae: Dictionary
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.sae.d_sae:
            raise InputError(
                f"there is no latent {self.index}: {self.sae.path} has latents 0 to {self.sae.d_sae - 1}"
            )

    @property
    def decoder(self) -> Float[Tensor, " d_model"]:
        """What one unit of activation adds to the residual stream."""
        return self.sae.W_dec[self.index]

    @property
    def neuronpedia(self) -> str | None:
        """Its page on Neuronpedia: top activations, explanations."""
        page = self.sae.neuronpedia
        return None if page is None else f"{page}/{self.index}"
