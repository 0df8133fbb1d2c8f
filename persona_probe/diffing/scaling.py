"""Is a latent of the tuned model really absent from the base? Latent scaling (Minder et al. 2025,
"Overcoming sparsity artifacts in crosscoders", section 2.3).

A latent can look new because a dictionary spends nothing on it in the base, though the base holds it
all the same: in what is left unexplained, or spelt with other latents. So its direction d is fitted,
with its activations f in the tuned model, to what each model has beside it:

    beta = argmin sum ||y - beta f d||^2 = sum f d.y / (sum f^2 ||d||^2)

y being the error (h minus the reconstruction without this latent) or that reconstruction itself, and

    nu = beta of the base / beta of the tuned model

A latent is tuned-only when nu of the error is below .2 and nu of the reconstruction below .5.

Departure: the paper's two decoders are one here (a dictionary that both models are read through), and
what a latent itself contributes is left out of the reconstruction of both models, so that two models
that read the same have nu = 1. Reconstructions are taken without the decoder's bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.errors import InputError, MismatchError
from persona_probe.model.chat import Rendered
from persona_probe.model.pair import ModelPair
from persona_probe.sae.encode import encode_dense
from persona_probe.sae.load import Dictionary, check_fits

ERROR_LIMIT, RECONSTRUCTION_LIMIT = 0.2, 0.5


def latent_scaling(
    pair: ModelPair,
    dictionary: Dictionary,
    rendered: Sequence[Rendered],
    latents: Sequence[int],
    *,
    mask: TokenMask | None = None,
    batch_tokens: int | None = None,
) -> pl.DataFrame:
    """One row for each of `latents`, in that order:

        index, tokens                           tokens of the tuned model at which it fires
        error_base, error_tuned                 beta of the error
        reconstruction_base, _tuned             beta of the reconstruction
        nu_error, nu_reconstruction             base over tuned; null where the tuned beta is 0
        tuned_only                              both below their limits; null where one is missing

    A latent that never fires has null throughout. Raises what `diff` raises, and `InputError` for
    no latent or one that does not exist.
    """
    if not latents:
        raise InputError("no latent to scale", fix="such as diff(...).top(20)['index']")
    for index in latents:
        dictionary.latent(index)
    check_fits(dictionary, pair.base)
    placed = dictionary.to(pair.base.device)
    ids = torch.tensor(list(latents), device=placed.W_dec.device)
    products = torch.zeros(2, 2, len(ids), dtype=torch.float64)
    squares = torch.zeros(len(ids), dtype=torch.float64)
    tokens = torch.zeros(len(ids), dtype=torch.long)
    site = dictionary.site
    chunks = stream(
        (pair.base, pair.tuned), rendered, [site], mask or TokenMask("answer"), batch_tokens=batch_tokens
    )
    for chunk in chunks:
        read = [chunk.activations[i, site].to(ids.device) for i in range(2)]
        fires, found = fitted(placed, read, ids)
        products += found
        squares += fires.double().square().sum(dim=0).cpu()
        tokens += (fires > 0).sum(dim=0).cpu()
    norms = placed.W_dec[ids].double().square().sum(dim=-1).cpu()
    beta = (products / (squares * norms)).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        nu = np.where(beta[1] == 0, np.nan, beta[0] / beta[1])
    table = pl.DataFrame(
        {
            "index": list(latents),
            "tokens": tokens.tolist(),
            "error_base": beta[0, 0],
            "error_tuned": beta[1, 0],
            "reconstruction_base": beta[0, 1],
            "reconstruction_tuned": beta[1, 1],
            "nu_error": nu[0],
            "nu_reconstruction": nu[1],
        },
        nan_to_null=True,
    )
    only = (pl.col("nu_error") < ERROR_LIMIT) & (pl.col("nu_reconstruction") < RECONSTRUCTION_LIMIT)
    return table.with_columns(only.alias("tuned_only"))


@torch.no_grad()
def fitted(
    dictionary: Dictionary, read: Sequence[Float[Tensor, "token d_model"]], ids: Tensor
) -> tuple[Float[Tensor, "token latent"], Float[Tensor, "model target latent"]]:
    """Activations in the tuned model, and `sum f d.y` by model (base, tuned) and target (error,
    reconstruction), over the tokens of a batch.
    """
    directions = dictionary.W_dec[ids]
    norms = directions.square().sum(dim=-1)
    codes = [encode_dense(dictionary, h) for h in read]
    fires = codes[1][:, ids]
    sums: list[Tensor] = []
    for h, code in zip(read, codes, strict=True):
        reconstruction = code @ dictionary.W_dec
        own = code[:, ids] * norms
        beside = reconstruction @ directions.T - own
        error = (h - dictionary.b_dec) @ directions.T - beside
        sums += [(fires * y).double().sum(dim=0).cpu() for y in (error, beside)]
    return fires, torch.stack(sums).view(2, 2, -1)


def relative_decoder_norms(
    base: Float[Tensor, "latent d_model"], tuned: Float[Tensor, "..."]
) -> Float[Tensor, " latent"]:
    """`||d_tuned|| / (||d_base|| + ||d_tuned||)` of a crosscoder's two decoders: 0 base-only, 1
    tuned-only, NaN where both are 0. With an L1 penalty its ends are often artefacts: check them by
    `latent_scaling`, or train with BatchTopK.

    Raises `MismatchError` for decoders of different shapes.
    """
    if base.shape != tuned.shape:
        raise MismatchError(f"two decoders of one shape are needed, got {base.shape} and {tuned.shape}")
    one, other = base.norm(dim=-1), tuned.norm(dim=-1)
    return other / (one + other)
