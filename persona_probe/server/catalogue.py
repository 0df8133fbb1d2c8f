"""The fixes that a server was started with, by name.

A request names a fix; the name is looked up in a table made at the start, and never becomes a path.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from persona_probe.artifact import StrPath, digest_folder
from persona_probe.errors import InputError, MissingPathError
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.load import Dictionary
from persona_probe.server.answering import Probe
from persona_probe.server.limits import Refusal
from persona_probe.steering import Intervention, Steering, latents, load_fix

NONE = "none"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEPT = 256
"""Fixes at other gains, and latents to read, that are made once and shared by requests."""
_MAX_PROBES = 16


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Fixes by name, each checked against the model; and dictionaries whose latents may be read."""

    fixes: Mapping[str, tuple[Intervention, ...]] = field(default_factory=dict[str, tuple[Intervention, ...]])
    digests: Mapping[str, str] = field(default_factory=dict[str, str])
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict[str, Dictionary])
    """By site."""
    _regained: dict[tuple[str, float], tuple[Intervention, ...]] = field(
        default_factory=dict[tuple[str, float], tuple[Intervention, ...]], repr=False
    )
    _read: dict[str, tuple[Probe, ...]] = field(default_factory=dict[str, tuple[Probe, ...]], repr=False)

    @classmethod
    def load(
        cls, lm: LanguageModel, sources: Sequence[StrPath], dictionaries: Sequence[Dictionary] = ()
    ) -> Catalogue:
        """Read fixes from folders: a fix itself, `NAME=FOLDER` to name it, or a folder of fixes.

        Raises `MissingPathError` for a folder without a fix, `InputError` for a malformed one, a
        name that will not do or that two have, `MismatchError` for a fix of another model; each
        names the folder. NaN in a vector is a `NonFiniteError`.
        """
        folders: dict[str, Path] = {}
        for source in sources:
            for name, folder in _named(str(source)):
                if name in folders:
                    raise InputError(
                        f"two fixes are called {name!r}: {folders[name]} and {folder}",
                        fix="name one of them: NAME=FOLDER",
                    )
                if not _NAME.fullmatch(name) or name == NONE:
                    raise InputError(
                        f"{folder} cannot be served as {name!r}",
                        fix="letters, digits, dot, dash and underscore, but not 'none'",
                    )
                folders[name] = folder
        fixes = {name: _checked(lm, folder) for name, folder in folders.items()}
        by_site: dict[str, Dictionary] = {}
        for dictionary in dictionaries:
            if dictionary.site in by_site:
                raise InputError(f"two dictionaries read {dictionary.site}", fix="leave one out")
            by_site[dictionary.site] = dictionary
        return cls(fixes, {name: digest_folder(folder) for name, folder in folders.items()}, by_site)

    def fix(self, name: str, gain: float | None = None) -> tuple[Intervention, ...]:
        """The fix `name` (`none`: none), with `gain` in the place of its own.

        Raises `Refusal` for a name that is not there, with the nearest that are.
        """
        if name == NONE:
            return ()
        if name not in self.fixes:
            raise Refusal(
                400,
                f"there is no intervention {name[:100]!r}",
                code="unknown_intervention",
                param="intervention",
                fix=self._nearest(name),
            )
        if gain is None:
            return self.fixes[name]
        if (name, gain) not in self._regained:
            if len(self._regained) >= _KEPT:
                self._regained.clear()
            self._regained[name, gain] = tuple(edit.with_gain(gain) for edit in self.fixes[name])
        return self._regained[name, gain]

    def probes(self, asked: bool | Sequence[str] | None, intervention: str) -> tuple[Probe, ...]:
        """What `latent_scores` asks for: True is what the request's own fix acts on; a name is a fix,
        or a latent as `SITE#INDEX` of a dictionary that the server was started with.
        """
        if not asked:
            return ()
        if asked is True and intervention == NONE:
            raise Refusal(
                400,
                "latent_scores is true, and the request has no intervention whose latents to read",
                param="latent_scores",
                fix='name what to read: "latent_scores": ["FIX", "blocks.3.hook_resid_post#412"]',
            )
        names = [intervention] if asked is True else list(dict.fromkeys(asked))
        if len(names) > _MAX_PROBES:
            raise Refusal(400, f"{len(names)} things to read, at most {_MAX_PROBES}", param="latent_scores")
        if len(self._read) >= _KEPT:
            self._read.clear()
        found: list[Probe] = []
        for name in names:
            if name not in self._read:
                self._read[name] = self._probes_of(name)
            found += self._read[name]
        return tuple(found)

    def _probes_of(self, name: str) -> tuple[Probe, ...]:
        if name in self.fixes:
            return tuple(
                Probe(name, edit.site, edit.target, "encoder" if edit.read == "encoder" else "projection")
                for edit in self.fixes[name]
            )
        site, _, index = name.rpartition("#")
        dictionary = self.dictionaries.get(site)
        if dictionary is None or not (index.isascii() and index.isdigit() and len(index) < 10):
            raise Refusal(
                400,
                f"there is nothing to read called {name[:100]!r}",
                code="unknown_latent",
                param="latent_scores",
                fix=self._nearest(name) + "".join(f"; {one}#INDEX" for one in self.dictionaries),
            )
        return (Probe(name, site, latents(dictionary, [int(index)]), "encoder"),)

    def _nearest(self, name: str) -> str:
        if not self.fixes:
            return "this server was started without fixes"
        near = difflib.get_close_matches(name[:100], list(self.fixes), n=3, cutoff=0.0)
        return f"nearest names: {', '.join(near)}"


def _named(source: str) -> list[tuple[str, Path]]:
    name, equals, folder = source.partition("=")
    if equals and _NAME.fullmatch(name) and not Path(source).exists():
        return [(name, Path(folder))]
    path = Path(source)
    if not path.is_dir():
        raise MissingPathError(f"there is no folder {path}", fix="--fixes takes folders")
    if (path / "intervention.json").is_file():
        return [(path.resolve().name, path)]
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not inside:
        raise MissingPathError(
            f"{path} is neither a fix nor a folder of fixes",
            fix="give a folder that save_fix or an audit (interventions/) wrote, or one that holds such",
        )
    return [(entry.name, entry) for entry in inside]


def _checked(lm: LanguageModel, folder: Path) -> tuple[Intervention, ...]:
    fix = load_fix(folder)
    try:
        Steering(lm, fix)
    except InputError as error:
        error.message = f"{folder}: {error.message}"
        raise
    return fix
