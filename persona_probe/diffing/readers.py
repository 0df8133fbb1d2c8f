"""What is added up of a model's activations: a dictionary's latents, or a site's means alone.

Several may read one site, in one pass. Each has a name, by which its result is found: the site, where it
is alone there; else the site and what tells the dictionaries' folders apart,
`blocks.4.hook_resid_post/width_16k`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from persona_probe.errors import InputError
from persona_probe.sae.load import Dictionary

Reader = Dictionary | str
"""A dictionary, which knows its site; or the hook name of a site, for means alone."""

Readers = Mapping[str, Reader]
"""By name."""


def site_of(reader: Reader) -> str:
    """Where it reads."""
    return reader if isinstance(reader, str) else reader.site


def by_name(dictionaries: Sequence[Dictionary]) -> dict[str, Dictionary]:
    """Dictionaries by their names, in their order.

    Raises `InputError` for none, and for the same one twice.
    """
    if not dictionaries:
        raise InputError("no dictionary given", fix="without one, use mean_difference")
    seen: dict[tuple[str, str], str] = {}
    for one in dictionaries:
        key = (one.site, one.digest)
        if key in seen:
            raise InputError(f"{seen[key]} and {one.path} are the same dictionary", fix="give it once")
        seen[key] = one.path
    at = Counter(one.site for one in dictionaries)
    labels = {
        id(one): label
        for site in at
        for its in [[one for one in dictionaries if one.site == site]]
        for one, label in zip(its, told_apart([one.path for one in its]), strict=True)
    }
    return {one.site if at[one.site] == 1 else f"{one.site}/{labels[id(one)]}": one for one in dictionaries}


def told_apart(paths: Iterable[str]) -> list[str]:
    """Short names for different folders: the end of each path, as much of it as tells them apart."""
    parts = [[part for part in PurePath(path).parts if part not in ("/", "..")] for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["-".join(each[-depth:]) for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{'-'.join(each[-1:])}-{number}" for number, each in enumerate(parts)]


def placed(readers: Readers, device: object) -> dict[str, Reader]:
    """The same with every dictionary on `device`."""
    return {name: one if isinstance(one, str) else one.to(str(device)) for name, one in readers.items()}
