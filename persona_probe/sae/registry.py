"""Published dictionaries: sae-lens's registry of `release/sae_id` names, with their Neuronpedia pages."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from persona_probe.errors import InputError, MissingPathError
from persona_probe.sae.convert import from_sae_lens
from persona_probe.sae.dictionary import Dictionary

if TYPE_CHECKING:  # sae-lens takes seconds to import, and most commands open a fix, not a dictionary
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup


def find(name: str) -> tuple[str, str, PretrainedSAELookup]:
    """The release, the id in it, and the registry's entry of `release/sae_id`; fetches nothing.

    Raises `MissingPathError` for a name that is not in the registry, with the nearest that are.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    release, _, sae_id = name.partition("/")
    if release not in directory:
        near = difflib.get_close_matches(release, directory, n=3)
        raise MissingPathError(
            f"there is no folder {name}, and no release {release!r} in sae-lens's registry"
            + (f" (near it: {', '.join(near)})" if near else ""),
            fix="give a dictionary's folder, or a registry name release/sae_id",
        )
    entry = directory[release]
    if sae_id not in entry.saes_map:
        near = difflib.get_close_matches(sae_id, entry.saes_map, n=3) or list(entry.saes_map)[:3]
        raise MissingPathError(
            f"the release {release!r} has no dictionary {sae_id!r} (near it: {', '.join(near)})"
        )
    return release, sae_id, entry


def from_registry(name: str, site: str | None = None) -> Dictionary:
    """The dictionary `release/sae_id`, fetched from Hugging Face or read from its cache.

    Raises as `find` does, `InputError` when it cannot be fetched, or as `from_sae_lens` does.
    """
    from sae_lens import SAE

    release, sae_id, entry = find(name)
    try:
        sae: SAE[Any] = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except Exception as error:  # a loader per release, each with errors of its own
        path = entry.saes_map[sae_id]
        raise InputError(
            f"{name} is neither in Hugging Face's cache nor to be had from {entry.repo_id}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="fetch it once where there is a network, and it is read from the cache from then on",
            command=f"hf download {entry.repo_id} --include '{path}*'",
        ) from error
    page = entry.neuronpedia_id.get(sae_id)
    if page:
        sae.cfg.metadata.neuronpedia_id = page
    return from_sae_lens(sae, path=name, site=site)
