"""sae-lens's dictionaries in the one form that is computed with; what has no such form is refused.

Standard, top-k and JumpReLU dictionaries have it; so has what BatchTopK and Matryoshka training saves,
which is a JumpReLU. A *gated* one, `1[x W + b_gate > 0] relu(x W exp(r_mag) + b_mag)`, is a JumpReLU
with the encoder `W exp(r_mag)`, the bias b_mag and the threshold `b_mag - b_gate exp(r_mag)`
(Rajamanoharan et al. 2024, "Improving dictionary learning with gated SAEs", appendix E).

Not covered: transcoders, crosscoders, absolute and signed top-k, matching pursuit, temporal
dictionaries; activations that are normalised at run time; attention-head (`hook_z`) sites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from persona_probe.artifact import digest_of
from persona_probe.errors import InputError, MismatchError, NonFiniteError
from persona_probe.hooks.sites import parse_site
from persona_probe.sae.dictionary import Activation, Dictionary

if TYPE_CHECKING:
    from sae_lens import SAE

_ACTIVATIONS: dict[str, Activation] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "gated": "jumprelu",
}
_NORMALISATION_FIX = {
    "expected_average_only_in": (
        "fold the scaling factor it was trained with into the weights and save it again: "
        "sae.fold_activation_norm_scaling_factor(factor); sae.save_model(folder)"
    ),
}


def from_sae_lens(
    sae: SAE[Any], *, path: str = "memory", digest: str | None = None, site: str | None = None
) -> Dictionary:
    """A `Dictionary` with the weights of an open sae-lens inference SAE (copied, fp32).

    Raises as `load_sae` does.
    """
    config: dict[str, Any] = sae.cfg.to_dict()
    activation = check_kind(path, config)
    meta = cast("dict[str, Any]", config.get("metadata") or {})
    named = cast("str | None", meta.get("hook_name"))
    if site is not None and named is not None and site != named:
        raise MismatchError(f"{path} was trained at {named}, not at {site}", fix=f"site={named!r}")
    found = named or site
    if found is None:
        raise InputError(
            f"{path} does not say which activation it reads (no hook_name in its metadata)",
            fix="say it: load_sae(path, site='blocks.3.hook_resid_post')",
        )
    parse_site(found)
    tensors = {name: tensor.detach().float().clone() for name, tensor in sae.state_dict().items()}
    check_tensors(path, tensors, int(config["d_in"]), int(config["d_sae"]))
    if "r_mag" in tensors:
        tensors = _gated_as_jumprelu(tensors)
    if activation == "topk" and config.get("rescale_acts_by_decoder_norm"):
        # sae-lens ranks such latents by pre-activation x decoder norm; folding the norms makes that
        # a plain top-k
        norm = tensors["W_dec"].norm(dim=-1).clamp(min=1e-8)
        tensors["W_enc"] = tensors["W_enc"] * norm
        tensors["b_enc"] = tensors["b_enc"] * norm
        tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
    return Dictionary(
        site=found,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors.get("threshold") if activation == "jumprelu" else None,
        activation=activation,
        k=int(config["k"]) if activation == "topk" else None,
        apply_b_dec_to_input=bool(config["apply_b_dec_to_input"]),
        normalisation=str(config["normalize_activations"]),
        path=path,
        digest=digest or _digest_tensors(tensors),
        meta=meta,
    )


def _gated_as_jumprelu(gated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scale = gated["r_mag"].exp()
    return {
        "W_enc": gated["W_enc"] * scale,
        "b_enc": gated["b_mag"],
        "threshold": gated["b_mag"] - gated["b_gate"] * scale,
        "W_dec": gated["W_dec"],
        "b_dec": gated["b_dec"],
    }


def check_kind(path: str, config: Mapping[str, Any]) -> Activation:
    """The activation rule of a dictionary with sae-lens's `config`.

    Raises `InputError` for a kind, a normalisation or a shape of input that would be misread.
    """
    architecture = str(config.get("architecture", "standard"))
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        architecture = "topk"  # how sae-lens wrote top-k dictionaries before version 6
    if architecture not in _ACTIVATIONS:
        raise InputError(
            f"{path} is a dictionary of the kind {architecture!r}; what can be used is "
            f"{', '.join(sorted(_ACTIVATIONS))} (BatchTopK and Matryoshka ones are saved as jumprelu)",
            fix="a dictionary saved in mid-training must be saved with save_inference_model"
            if "batchtopk" in architecture
            else "use or train a dictionary of one of these kinds",
        )
    normalisation = config.get("normalize_activations") or "none"
    if normalisation != "none":
        raise InputError(
            f"{path} normalises its input by {normalisation!r}, which is not supported",
            fix=_NORMALISATION_FIX.get(
                str(normalisation), "use a dictionary of raw activations (normalisation 'none')"
            ),
        )
    if config.get("reshape_activations", "none") != "none":
        raise InputError(
            f"{path} reads attention heads (reshape_activations="
            f"{config['reshape_activations']!r}), not the residual stream",
            fix="use a dictionary of the residual stream, of attn_out or of mlp_out",
        )
    return _ACTIVATIONS[architecture]


def check_tensors(path: str, tensors: Mapping[str, Tensor], d_model: int, d_sae: int) -> None:
    """Raise `InputError` for a tensor of another shape, `NonFiniteError` for NaN or infinity."""
    shapes = {
        "W_enc": (d_model, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
    }
    for name, tensor in tensors.items():
        expected = shapes.get(name, (d_sae,))
        if tuple(tensor.shape) != expected:
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, not {expected}")
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{path}: {name} holds NaN or infinite weights")


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(
        {
            name: hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in tensors.items()
        }
    )
