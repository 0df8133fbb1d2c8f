"""Open a dictionary: from a folder that sae-lens or sparsify wrote, or from sae-lens's registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from persona_probe.artifact import digest_file, digest_of, read_json
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.hooks.sites import check_site
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.convert import check_kind, from_sae_lens
from persona_probe.sae.dictionary import Dictionary, Latent
from persona_probe.sae.registry import find, from_registry
from persona_probe.sae.sparsify import check_hookpoint, is_sparsify, read_sparsify

__all__ = [
    "Dictionary",
    "Latent",
    "check_fits",
    "check_source",
    "from_sae_lens",
    "load_sae",
    "weights_digest",
]


def load_sae(source: str | os.PathLike[str], *, site: str | None = None) -> Dictionary:
    """Read a dictionary from a folder in sae-lens's or sparsify's format, or from sae-lens's registry
    (`release/sae_id`; fetched once, then read from Hugging Face's cache).

    Nothing is fetched when `source` is a folder. `site` names the activation when the file does
    not; it must agree when both do. Weights are held in fp32 on the CPU (`Dictionary.to` moves
    them).

    Raises `MissingPathError` (no such folder, nor such a name in the registry), `InputError` (a
    kind of dictionary, normalisation or file that cannot be used), `NonFiniteError` (NaN or
    infinity in the weights)."""
    folder = Path(source)
    if not folder.exists():
        return from_registry(os.fspath(source), site)
    if is_sparsify(folder):
        return read_sparsify(folder, site)
    from sae_lens import SAE
    from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (folder / name).is_file():
            raise MissingPathError(
                f"{folder} is no dictionary of sae-lens's or sparsify's format: it has no {name}",
                fix="give the folder that save_inference_model or train_sae wrote",
            )
    config = read_json(folder / SAE_CFG_FILENAME)
    if not isinstance(config, dict):
        raise InputError(f"{folder / SAE_CFG_FILENAME} holds no JSON object")
    check_kind(str(folder), cast("dict[str, Any]", config))
    try:
        sae: SAE[Any] = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:
        raise InputError(
            f"sae-lens cannot open {folder}: {type(error).__name__}: {error}",
            fix="the folder may be incomplete or from another version of sae-lens; save it again",
        ) from error
    digest = digest_of([digest_file(folder / name) for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)])
    return from_sae_lens(sae, path=str(folder), digest=digest, site=site)


def check_source(source: str | os.PathLike[str]) -> None:
    """Raise `MissingPathError` unless `load_sae` would find something at `source`; opens and fetches
    nothing.
    """
    if not Path(source).exists():
        find(os.fspath(source))


def check_fits(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Raise unless `dictionary` can read `lm`: the site exists, the width is the model's, and,
    where the dictionary records the weights it was trained on, `lm` has them (an adapter on top is
    no matter).

    A dictionary of *another* model of the same width that records nothing passes here; the
    explained variance on the base (`validity`) is what tells it. Raises `UnknownSiteError`,
    `MismatchError`."""
    check_site(lm.hf, dictionary.site)
    check_hookpoint(dictionary, lm)
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
    return lm.checkpoint.weights_digest
