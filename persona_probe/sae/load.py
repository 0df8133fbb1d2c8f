"""A sparse autoencoder as plain tensors, read through sae-lens.

sae-lens owns the file format and the registry of published dictionaries; a `Dictionary` is what the
rest of the package computes with. One kind is accepted, and everything else is refused by name: an
encoder `act(x @ W_enc + b_enc)` (with `b_dec` subtracted from x first where the file says so) and a
decoder `f @ W_dec + b_dec`, on raw activations of a residual-stream site.

Not covered: gated, transcoder, crosscoder, signed top-k and matching-pursuit dictionaries;
activations that are normalised at run time; attention-head (`hook_z`) sites."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import Tensor

from persona_probe.artifact import digest_file, digest_of, read_json
from persona_probe.errors import InputError, MismatchError, MissingPathError, NonFiniteError
from persona_probe.hooks.sites import check_site, parse_site
from persona_probe.model.language_model import LanguageModel

Activation = Literal["relu", "jumprelu", "topk"]

_ACTIVATIONS: dict[str, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
_NORMALISATION_FIX = {
    "expected_average_only_in": (
        "fold the scaling factor it was trained with into the weights and save it again: "
        "sae.fold_activation_norm_scaling_factor(factor); sae.save_model(folder)"
    ),
}


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


def load_sae(source: str | os.PathLike[str], *, site: str | None = None) -> Dictionary:
    """Read a dictionary from a folder in sae-lens's format, or from sae-lens's registry
    (`release/sae_id`).

    Nothing is fetched when `source` is a folder. `site` names the activation when the file does
    not; it must agree when both do. Weights are held in fp32 on the CPU (`Dictionary.to` moves
    them).

    Raises `MissingPathError` (no such folder, nor such a name in the registry), `InputError` (a
    kind of dictionary, normalisation or file that cannot be used), `NonFiniteError` (NaN or
    infinity in the weights)."""
    folder = Path(source)
    if not folder.exists():
        return _from_registry(os.fspath(source), site)
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (folder / name).is_file():
            raise MissingPathError(
                f"{folder} is not a dictionary in sae-lens's format: it has no {name}",
                fix="give the folder that save_inference_model or train_sae wrote",
            )
    config = read_json(folder / SAE_CFG_FILENAME)
    if not isinstance(config, dict):
        raise InputError(f"{folder / SAE_CFG_FILENAME} holds no JSON object")
    _check_kind(str(folder), cast("dict[str, Any]", config))
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:
        raise InputError(
            f"sae-lens cannot open {folder}: {type(error).__name__}: {error}",
            fix="the folder may be incomplete or from another version of sae-lens; save it again",
        ) from error
    digest = digest_of([digest_file(folder / name) for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)])
    return from_sae_lens(sae, path=str(folder), digest=digest, site=site)


def from_sae_lens(
    sae: SAE[Any], *, path: str = "memory", digest: str | None = None, site: str | None = None
) -> Dictionary:
    """A `Dictionary` with the weights of an open sae-lens inference SAE (copied, fp32).

    Raises as `load_sae` does.
    """
    config: dict[str, Any] = sae.cfg.to_dict()
    activation = _check_kind(path, config)
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
    _check_tensors(path, tensors, int(config["d_in"]), int(config["d_sae"]))
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
        threshold=tensors["threshold"] if activation == "jumprelu" else None,
        activation=activation,
        k=int(config["k"]) if activation == "topk" else None,
        apply_b_dec_to_input=bool(config["apply_b_dec_to_input"]),
        normalisation=str(config["normalize_activations"]),
        path=path,
        digest=digest or _digest_tensors(tensors),
        meta=meta,
    )


def check_fits(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Raise unless `dictionary` can read `lm`: the site exists, the width is the model's, and,
    where the dictionary records the weights it was trained on, `lm` has them (an adapter on top is
    no matter).

    A dictionary of *another* model of the same width that records nothing passes here; the
    explained variance on the base (`validity`) is what tells it. Raises `UnknownSiteError`,
    `MismatchError`."""
    check_site(lm.hf, dictionary.site)
    if dictionary.d_model != lm.d_model:
        raise MismatchError(
            f"{dictionary.path} reads activations of width {dictionary.d_model}, and {lm.name} "
            f"has width {lm.d_model}",
            fix="use a dictionary trained on this model",
        )
    trained_on = dictionary.meta.get("model_digest")
    here = weights_digest(lm) if trained_on is not None else None
    if here is not None and trained_on != here:
        raise MismatchError(
            f"{dictionary.path} was trained on another model than {lm.checkpoint.path}: on weights "
            f"with the digest {trained_on}, and these have {here}",
            fix="use a dictionary trained on this base model, or train one on it",
        )


def weights_digest(lm: LanguageModel) -> str | None:
    """Of the weight files of `lm`, adapters aside; None where it was not read from a folder."""
    folder = Path(lm.checkpoint.path)
    files = sorted((*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")))
    return digest_of({file.name: digest_file(file) for file in files}) if files else None


def _check_kind(path: str, config: Mapping[str, Any]) -> Activation:
    architecture = str(config.get("architecture", "standard"))
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        architecture = "topk"  # how sae-lens wrote top-k dictionaries before version 6
    if architecture not in _ACTIVATIONS:
        raise InputError(
            f"{path} is a dictionary of the kind {architecture!r}; what can be used is "
            f"{', '.join(sorted(_ACTIVATIONS))} (a BatchTopK dictionary is saved as jumprelu)",
            fix="a dictionary saved in mid-training must be saved with save_inference_model"
            if architecture == "batchtopk"
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


def _check_tensors(path: str, tensors: Mapping[str, Tensor], d_model: int, d_sae: int) -> None:
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


def _from_registry(name: str, site: str | None) -> Dictionary:
    directory = get_pretrained_saes_directory()
    release, _, sae_id = name.partition("/")
    if release not in directory:
        near = difflib.get_close_matches(release, directory, n=3)
        raise MissingPathError(
            f"there is no folder {name}, and no release {release!r} in sae-lens's registry"
            + (f" (near it: {', '.join(near)})" if near else ""),
            fix="give a dictionary's folder, or a registry name release/sae_id",
        )
    known = directory[release].saes_map
    if sae_id not in known:
        near = difflib.get_close_matches(sae_id, known, n=3) or list(known)[:3]
        raise MissingPathError(
            f"the release {release!r} has no dictionary {sae_id!r} (near it: {', '.join(near)})"
        )
    sae: SAE[Any] = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    return from_sae_lens(sae, path=name, site=site)
