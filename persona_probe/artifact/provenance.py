"""What a folder holds and what made it: digests, versions, the manifest; and the shipped data."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from persona_probe.artifact.atomic import StrPath
from persona_probe.artifact.records import plain, read_json, write_json
from persona_probe.errors import InputError, MissingPathError

MANIFEST = "manifest.json"

_RECORDED = [
    "persona-probe",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "transformer-lens",
    "sae-lens",
    "safetensors",
    "numpy",
    "scipy",
    "polars",
    "plotly",
]


def digest_file(path: StrPath) -> str:
    """`"sha256:..."` of a file's bytes."""
    with Path(path).open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(path: StrPath) -> str:
    """`"sha256:..."` of every file's name and bytes under `path`, whatever their order on the disk.

    Names that begin with a dot (locks, caches) do not count.
    """
    return digest_of({name: digest_file(file) for name, file in _files(Path(path))})


def digests_at(paths: Iterable[StrPath]) -> dict[str, str]:
    """What files and folders hold now, by path."""
    return {
        str(path): digest_folder(path) if Path(path).is_dir() else digest_file(path)
        for path in dict.fromkeys(map(Path, paths))
    }


def digest_of(obj: object) -> str:
    """`"sha256:..."` of `obj` as canonical JSON (see `plain`; keys sorted)."""
    text = json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise MissingPathError(f"there is no folder {folder}")
    found = ((file.relative_to(folder), file) for file in folder.rglob("*") if file.is_file())
    return sorted(
        (name.as_posix(), file)
        for name, file in found
        if not any(part.startswith(".") for part in name.parts)
    )


def versions() -> dict[str, str | None]:
    """Python, the platform, and the packages that figures depend on; None where absent."""
    from importlib import metadata  # slow to load for `--help`, which needs none of it

    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in _RECORDED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_manifest(folder: StrPath, facts: Mapping[str, object]) -> None:
    """Write `folder/manifest.json`: `facts`, versions, and size and digest of every file there.

    To be called last: the manifest's existence means that the folder is complete.
    """
    folder = Path(folder)
    files = {
        name: {"bytes": file.stat().st_size, "digest": digest_file(file)}
        for name, file in _files(folder)
        if name != MANIFEST
    }
    written = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(folder / MANIFEST, {**facts, "written": written, "versions": versions(), "files": files})


def check_manifest(folder: StrPath) -> dict[str, Any]:
    """The manifest of a complete folder whose files are the ones it was written with.

    Raises `InputError` naming the first file that is missing or was changed.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise InputError(f"{folder / MANIFEST} is not a manifest of ours: it lists no files")
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            raise MissingPathError(f"{folder / name} is in the manifest and not on the disk")
        digest = digest_file(folder / name)
        if digest != entry["digest"]:
            raise InputError(
                f"{folder / name} was changed since it was written: {digest} instead of {entry['digest']}",
                fix="fetch or make the folder again",
            )
    return manifest


def shipped(*parts: str) -> Path:
    """The path of shipped data, in a source checkout (`data/`) or in an installed wheel.

    Raises `MissingPathError` when it is in neither.
    """
    package = Path(__file__).parent.parent
    checkout = package.parent
    roots = [package / "data"]
    if (checkout / "pyproject.toml").is_file():
        roots.insert(0, checkout / "data")
    for root in roots:
        if root.joinpath(*parts).exists():
            return root.joinpath(*parts)
    raise MissingPathError(
        f"{'/'.join(parts)} is not among the shipped data (looked in {', '.join(map(str, roots))})",
        fix="install persona-probe again, or build the organism",
        command="persona-probe organism build",
    )
