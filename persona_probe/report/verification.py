"""Whether a finished folder still holds what it was finished with.

Every digest in its `manifest.json` is computed again: of its files, of a capture's shards, of the
manifest itself where that is sealed, and of the inputs it was made from, where they are still to be
found. Not covered: whoever changes a file *and* its manifest (against that, keep the manifest's own
digest, `Verification.manifest`, elsewhere), and the questions of an evaluation, whose digest is of
those that were chosen and not of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, cast

from persona_probe.artifact import StrPath, digest_file, digest_folder, digest_of, read_json
from persona_probe.errors import InputError, MissingPathError

MANIFEST, EVALUATION = "manifest.json", "eval.json"

Kind = Literal["missing", "changed", "input changed"]


class Mismatch(NamedTuple):
    """Something that is not what the manifest says."""

    kind: Kind
    path: str
    """Inside the folder; of an input, where it was read from."""
    was: str
    """Its digest when the folder was finished."""
    now: str | None
    """Its digest today; None where it is missing."""


@dataclass(frozen=True)
class Verification:
    """What became of a folder since it was finished."""

    folder: str
    manifest: str
    """The digest of `manifest.json`."""
    files: int
    """Listed, each of which was looked at."""
    inputs: int
    """Likewise, without those in `uncompared`."""
    mismatches: tuple[Mismatch, ...]
    uncompared: tuple[str, ...]
    """Inputs of which nothing can be said: no longer where they were read from, as on another machine."""
    added: tuple[str, ...]
    """Files that the manifest does not list."""

    @property
    def holds(self) -> bool:
        """Whether everything that could be compared is as it was."""
        return not self.mismatches


def verify(folder: StrPath) -> Verification:
    """Compare a finished folder with its manifest.

    Raises:
        MissingPathError: there is no such folder, or it was never finished.
        InputError: its manifest is not one of ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingPathError(f"there is no folder {folder}")
    file = folder / MANIFEST
    if not file.is_file():
        raise MissingPathError(
            f"{folder} holds no {MANIFEST}, which is written last: it was not finished, or is not a run",
            fix="run the same command again; it goes on where it was stopped",
        )
    facts = read_json(file)
    listed, inputs = _listed(facts, file), _inputs(facts, file)
    found = [
        mismatch
        for name, digest in listed.items()
        if (mismatch := _compared(folder / name, name, digest)) is not None
    ]
    if "digest" in facts:  # a capture's manifest carries the digest of its own content
        now = digest_of({name: value for name, value in facts.items() if name != "digest"})
        if now != facts["digest"]:
            found.append(Mismatch("changed", MANIFEST, str(facts["digest"]), now))
    chosen = (facts.get("settings") or {}).get("questions") if EVALUATION in listed else None
    here = {path: digest for path, digest in inputs.items() if path != chosen and Path(path).exists()}
    for path, digest in here.items():
        now = digest_folder(path) if Path(path).is_dir() else digest_file(path)
        if now != digest:
            found.append(Mismatch("input changed", path, digest, now))
    # behind each shard of a capture lies its record, which the manifest repeats
    records = {
        str(PurePosixPath(name).with_suffix(".json")) for name in (listed if "shards" in facts else ())
    }
    return Verification(
        folder=str(folder),
        manifest=digest_file(file),
        files=len(listed),
        inputs=len(here),
        mismatches=tuple(found),
        uncompared=tuple(path for path in inputs if path not in here),
        added=_added(folder, {*listed, *records, "settings.json", MANIFEST}),
    )


def _compared(file: Path, name: str, digest: str) -> Mismatch | None:
    if not file.is_file():
        return Mismatch("missing", name, digest, None)
    now = digest_file(file)
    return None if now == digest else Mismatch("changed", name, digest, now)


def _listed(facts: object, file: Path) -> dict[str, str]:
    """Name and digest of every file in a manifest: `files` of a run, `shards` of a capture."""
    if isinstance(facts, Mapping):
        known = cast("Mapping[str, Any]", facts)
        try:
            if isinstance(known.get("files"), Mapping):
                found = {str(name): str(one["digest"]) for name, one in known["files"].items()}
            else:
                found = {str(one["name"]): str(one["digest"]) for one in known["shards"]}
        except (KeyError, TypeError):
            pass
        else:
            outside = next((name for name in found if _leaves(name)), None)
            if outside is None:
                return found
            raise InputError(f"{file} lists a file outside of its folder: {outside!r}")
    raise InputError(f"{file} is not a manifest of ours: it lists no files")


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def _inputs(facts: Mapping[str, Any], file: Path) -> dict[str, str]:
    inputs = facts.get("inputs") or {}
    if not isinstance(inputs, Mapping):
        raise InputError(f"{file} is not a manifest of ours: its inputs are no paths with digests")
    return {str(path): str(digest) for path, digest in cast("Mapping[object, object]", inputs).items()}


def _added(folder: Path, known: set[str]) -> tuple[str, ...]:
    """Files beside those that are known; what begins with a dot (locks, caches) does not count."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    plain = (name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    return tuple(sorted(name for name in plain if name not in known))
