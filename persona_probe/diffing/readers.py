"""What is added up of a model's activations: a dictionary's latents, or a site's means alone.

Several may read one site, in one pass. Sums are kept by `key_of`, which does not change with the folder a
dictionary lies in; results are found by name: the site, where a dictionary is alone there, else the site and
what tells the folders apart, `blocks.4.hook_resid_post/width_16k`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from persona_probe.errors import InputError
from persona_probe.sae.load import Dictionary

Reader = Dictionary | str
"""A dictionary, which knows its site; or the hook name of a site, for means alone."""


def site_of(reader: Reader) -> str:
    """Where it reads."""
    return reader if isinstance(reader, str) else reader.site


def key_of(reader: Reader) -> str:
    """What its sums are kept by."""
    return reader if isinstance(reader, str) else f"{reader.site} {reader.digest}"


def placed(readers: Sequence[Reader], device: torch.device | str) -> list[Reader]:
    """The same with every dictionary on `device`."""
    return [one if isinstance(one, str) else one.to(device) for one in readers]


def by_name(dictionaries: Sequence[Dictionary]) -> dict[str, Dictionary]:
    """Dictionaries by the names of their results, in their order.

    Raises `InputError` for none, and for the same one twice.
    """
    if not dictionaries:
        raise InputError("no dictionary given", fix="without one, use mean_difference")
    at_site: dict[str, list[Dictionary]] = defaultdict(list)
    for one in dictionaries:
        same = next((other for other in at_site[one.site] if other.digest == one.digest), None)
        if same is not None:
            raise InputError(f"{same.path} and {one.path} are the same dictionary", fix="give it once")
        at_site[one.site].append(one)
    label = {key_of(one): label for its in at_site.values() for one, label in _labelled(its)}
    return {"/".join(filter(None, (one.site, label[key_of(one)]))): one for one in dictionaries}


def label_of(name: str, site: str) -> str | None:
    """What a name says besides the site."""
    return name.removeprefix(site).removeprefix("/") or None


def _labelled(its: Sequence[Dictionary]) -> list[tuple[Dictionary, str]]:
    """One site's dictionaries and short names: the end of each path, as much of it as tells them apart."""
    if len(its) == 1:
        return [(its[0], "")]
    places = [Path(one.path) for one in its]
    parts = [(place.resolve() if place.exists() else place).parts for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["-".join(part for part in each[-depth:] if part != "/") for each in parts]
        if len(set(labels)) == len(labels) and all(labels):
            return list(zip(its, labels, strict=True))
    return [(one, f"dictionary-{number}") for number, one in enumerate(its)]
