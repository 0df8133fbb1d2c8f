"""What an intervention acts on: directions in the residual stream, and how their amounts are read.

A target carries its own tensors, so that a saved fix needs no dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.sae.load import Dictionary, Latent

Read = Literal["encoder", "projection"]


@dataclass(frozen=True, eq=False)
class Encoder:
    """What reads the latents in a dictionary: `act((x - b_dec) @ weight + bias)`.

    A plain top-k dictionary decides between all of its latents: then `weight` holds every column,
    `k` says how many fire and `columns` which are read. Everywhere else only the targeted columns
    are held and computed.
    """

    weight: Float[Tensor, "d_model latent"]
    bias: Float[Tensor, " latent"]
    threshold: Float[Tensor, " latent"] | None = None
    """JumpReLU: 0 at or below it. None: ReLU (or top-k)."""
    b_dec: Float[Tensor, " d_model"] | None = None
    """Subtracted from x first; None when the dictionary does not."""
    k: int | None = None
    columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "bias", "threshold", "b_dec"):
            tensor = getattr(self, name)
            if tensor is not None:
                object.__setattr__(self, name, held(tensor, f"encoder {name}"))
        if self.weight.ndim != 2:
            raise InputError(f"an encoder's weight is [d_model, latent], got {tuple(self.weight.shape)}")
        d_model, width = self.weight.shape
        expected = {"bias": (width,), "threshold": (width,), "b_dec": (d_model,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(
                    f"an encoder of weight {tuple(self.weight.shape)} has {name} of shape {shape}, "
                    f"got {tuple(tensor.shape)}"
                )
        if (self.k is None) != (self.columns is None):
            raise InputError("a top-k encoder needs both k and the columns that are read")
        if self.k is not None and not (self.threshold is None and 1 <= self.k <= width):
            raise InputError(f"k must be 1 to {width} (and excludes a threshold), got {self.k}")
        if any(not 0 <= column < width for column in self.columns or ()):
            raise InputError(f"the encoder has columns 0 to {width - 1}, asked for {self.columns}")

    @property
    def n_latents(self) -> int:
        """How many latents it reads."""
        return self.weight.shape[1] if self.columns is None else len(self.columns)

    def amounts(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch latent"]:
        """The activations of the latents on x."""
        centred = x if self.b_dec is None else x - self.b_dec.to(x)
        z = centred @ self.weight.to(x) + self.bias.to(x)
        if self.k is not None:
            top = z.topk(self.k, dim=-1, sorted=False)
            fired = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())
            return fired[..., list(self.columns or ())]
        fired = z.relu()
        return fired if self.threshold is None else fired * (z > self.threshold.to(x))


@dataclass(frozen=True, eq=False)
class Target:
    """One or several directions: an SAE's latents, or a plain vector. Tensors are kept in fp32 on
    the CPU.
    """

    decoder: Float[Tensor, "latent d_model"]
    """What one unit of each latent adds to the residual stream."""
    encoder: Encoder | None = None
    indices: tuple[int, ...] | None = None
    """Which latents of the dictionary these are."""
    dictionary_digest: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder", held(self.decoder, "decoder"))
        if self.decoder.ndim != 2 or self.decoder.numel() == 0:
            raise InputError(f"a decoder is [latent, d_model], got {tuple(self.decoder.shape)}")
        if bool((self.decoder.abs().amax(dim=-1) == 0).any()):
            raise InputError("a direction of length zero points nowhere", fix="leave it out")
        n, d_model = self.decoder.shape
        if self.encoder is not None:
            if self.encoder.weight.shape[0] != d_model:
                raise MismatchError(
                    f"the encoder reads width {self.encoder.weight.shape[0]}, the decoder writes {d_model}"
                )
            if self.encoder.n_latents != n:
                raise MismatchError(f"the encoder reads {self.encoder.n_latents} latents, not {n}")
        if self.indices is not None and (len(self.indices) != n or len(set(self.indices)) != n):
            raise InputError(f"{n} latents need {n} different indices, got {self.indices}")

    @property
    def n_latents(self) -> int:
        return self.decoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.decoder.shape[1]

    @property
    def unit(self) -> Float[Tensor, "latent d_model"]:
        """The decoder rows at length 1."""
        wide = self.decoder.double()
        return (wide / wide.norm(dim=-1, keepdim=True)).float()

    def amounts(self, x: Float[Tensor, "*batch d_model"], read: Read) -> Float[Tensor, "*batch latent"]:
        """z: what the encoder gives for x, or the projection of x on the unit decoder rows.

        This is the quantity that a level is compared with, to measure levels by. Raises
        `InputError` for the encoder of a target that has none.
        """
        if read == "projection":
            return x @ self.unit.to(x).T
        if self.encoder is None:
            raise InputError(f"{self} has no encoder", fix="read its projection")
        return self.encoder.amounts(x)

    def __str__(self) -> str:
        if self.label:
            return self.label
        if self.indices is not None:
            return f"latent{'s' if self.n_latents > 1 else ''} {', '.join(map(str, self.indices))}"
        return f"{self.n_latents} directions" if self.n_latents > 1 else "a direction"


def latents(dictionary: Dictionary | Latent, ids: Sequence[int] | None = None, *, label: str = "") -> Target:
    """The latents `ids` of a dictionary (or one `Latent`) as a target, with their encoder.

    Raises `InputError` for an index that the dictionary does not have.
    """
    if isinstance(dictionary, Latent):
        dictionary, ids = dictionary.sae, [dictionary.index]
    if not ids:
        raise InputError("no latent was named", fix="latents(dictionary, [412])")
    for index in ids:
        if not 0 <= index < dictionary.d_sae:
            raise InputError(
                f"there is no latent {index}: {dictionary.path} has latents 0 to {dictionary.d_sae - 1}"
            )
    chosen = list(ids)
    b_dec = dictionary.b_dec if dictionary.apply_b_dec_to_input else None
    if dictionary.activation == "topk":
        encoder = Encoder(dictionary.W_enc, dictionary.b_enc, None, b_dec, dictionary.k, tuple(chosen))
    else:
        threshold = None if dictionary.threshold is None else dictionary.threshold[chosen]
        encoder = Encoder(dictionary.W_enc[:, chosen], dictionary.b_enc[chosen], threshold, b_dec)
    return Target(
        dictionary.W_dec[chosen],
        encoder,
        indices=tuple(chosen),
        dictionary_digest=dictionary.digest,
        label=label,
    )


def direction(vector: Float[Tensor, "..."], label: str = "direction") -> Target:
    """One direction (`[d_model]`) or several (`[latent, d_model]`) as a target, read by projection.

    Raises `NonFiniteError`, and `InputError` for a zero vector.
    """
    return Target(vector[None] if vector.ndim == 1 else vector, label=label)


def held(tensor: Float[Tensor, "..."], what: str) -> Float[Tensor, "..."]:
    """The tensor detached, in fp32 on the CPU; `NonFiniteError` unless every number is finite."""
    kept = tensor.detach().to("cpu", torch.float32).contiguous()
    if not bool(kept.isfinite().all()):
        raise NonFiniteError(f"the {what} of a target holds NaN or infinite numbers")
    return kept
