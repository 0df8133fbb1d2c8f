"""Captured activations on disk: shards, and a manifest that says what they are and what made them.

    store = ActivationStore.open("activations")
    for chunk in store.chunks(): ...                      # as `stream` yields them, document after document
    for x in store.batches(1024, seed=0): ...             # shuffled, [token, d_model]

    activations/
      settings.json              what was asked for, written first
      shards/00000.safetensors   the tokens of a run of conversations
      shards/00000.json          written behind it: this shard is whole, and this is its digest
      manifest.json              written last: the store is complete

A shard is compared with its digest when it is first read, so a flipped byte is found before it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.shard import Shard, read_shard
from persona_probe.activations.stream import Chunk
from persona_probe.artifact import StrPath, digest_file, digest_of, read_json
from persona_probe.errors import InputError, MismatchError, MissingPathError
from persona_probe.model.language_model import LanguageModel

StoredType = Literal["float32", "bfloat16"]
MANIFEST, SHARDS, KIND = "manifest.json", "shards", "activation store"


@dataclass(frozen=True)
class StoredModel:
    """A model that was read."""

    name: str
    digest: str
    """Of its checkpoint's files, the adapter's included (`Checkpoint.digest`)."""
    weights: str | None
    """Of its full weights alone: what a dictionary records that it was trained on."""


@dataclass(frozen=True)
class Counts:
    """Tokens that were read, and what became of them."""

    conversations: int
    tokens: int
    """Of the whole conversations."""
    covered: int
    """In the place that the mask names; `special + skipped + sinks + counted`."""
    special: int
    """Left out because the tokenizer calls them special, `bos` of them its BOS."""
    bos: int
    skipped: int
    """Left out by `first_k` and `skip_first`."""
    sinks: int
    """Left out because of their norm in the first model."""
    counted: int
    """What is here."""


@dataclass(frozen=True)
class ShardFile:
    """A whole shard on the disk."""

    name: str
    conversations: tuple[int, int]
    """From, and up to."""
    tokens: int
    bytes: int
    digest: str


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """Activations that `capture(..., out=...)` left on the disk, complete."""

    path: Path
    models: tuple[StoredModel, ...]
    sites: tuple[str, ...]
    d_model: int
    dtype: StoredType
    mask: TokenMask
    counts: Counts
    shards: tuple[ShardFile, ...]
    source: str
    """Where the conversations came from."""
    digest: str
    """Of the manifest's content, and so of every shard's."""
    verify: bool = True
    """Compare a shard with its digest when it is first read."""
    _checked: set[str] = field(default_factory=set[str], repr=False)

    @classmethod
    def open(cls, path: StrPath, *, verify: bool = True) -> ActivationStore:
        """The store in a folder. Reads the manifest, and no shard but its size.

        `verify=False` trusts the shards' content, as for a store on a slow disk that was checked before.

        Raises `MissingPathError`, or `InputError` for a folder that is no store, whose capture is not
        done, whose manifest was changed, or that has a shard of the wrong size.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise MissingPathError(f"there is no folder {folder}")
        if not (folder / MANIFEST).is_file():
            done = len(list(folder.glob(f"{SHARDS}/*.json")))
            raise MissingPathError(
                f"{folder} has no {MANIFEST}"
                + (f": its capture was stopped after {done} shards" if done else ", so it is no store"),
                fix="run the same capture again; it goes on where it was stopped" if done else None,
            )
        store = _from_manifest(folder, read_json(folder / MANIFEST), verify)
        for shard in store.shards:
            file = folder / shard.name
            if not file.is_file():
                raise MissingPathError(f"{file} is in the manifest and not on the disk", fix=_again(file))
            if file.stat().st_size != shard.bytes:
                raise InputError(
                    f"{file} has {file.stat().st_size} bytes and was written with {shard.bytes}",
                    fix=_again(file),
                )
        return store

    def __len__(self) -> int:
        return self.counts.counted

    def shard(self, number: int) -> Shard:
        """One shard, mapped from the disk. Raises `InputError` when it was changed since it was written."""
        listed = self.shards[number]
        file = self.path / listed.name
        if self.verify and listed.name not in self._checked:
            check_shard(file, listed)
            self._checked.add(listed.name)
        return read_shard(file)

    def kept(self, number: int) -> Int[Tensor, " conversation"]:
        """Tokens that one shard holds of each of its conversations; reads nothing else, compares nothing."""
        return read_shard(self.path / self.shards[number].name).kept

    def chunks(self) -> Iterator[Chunk]:
        """Shard after shard as `stream` yields batches, in fp32; so conversations come in their order."""
        for number, listed in enumerate(self.shards):
            if listed.tokens:
                yield self.shard(number).chunk()

    def rows(
        self, number: int, model: int | str = 0, site: str | None = None
    ) -> Float[Tensor, "token d_model"]:
        """The activations of one shard, in the stored type."""
        return self.shard(number).activations[self.index_of(model), self.site_of(site)]

    def batches(
        self,
        batch_tokens: int,
        *,
        model: int | str = 0,
        site: str | None = None,
        seed: int = 0,
        pool: int = 4,
    ) -> Iterator[Float[Tensor, "token d_model"]]:
        """Every token once, in batches of `batch_tokens` (the last may be smaller), in fp32, shuffled.

        Shards come in a random order and `pool` of them are mixed at a time, which is what is in memory.
        The same seed gives the same batches.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        left: Tensor | None = None
        for start in range(0, len(order), pool):
            read = [self.rows(number, model, site) for number in order[start : start + pool]]
            mixed = torch.cat(read)
            mixed = mixed[torch.randperm(len(mixed), generator=generator)].float()
            mixed = mixed if left is None else torch.cat([left, mixed])
            whole = len(mixed) // batch_tokens * batch_tokens
            for begin in range(0, whole, batch_tokens):
                yield mixed[begin : begin + batch_tokens]
            left = mixed[whole:]
        if left is not None and len(left):
            yield left

    def check(self) -> None:
        """Compare every shard with its digest. Raises `InputError` naming the first that was changed."""
        for listed in self.shards:
            check_shard(self.path / listed.name, listed)

    def check_made_by(self, lm: LanguageModel, model: int | str = 0) -> None:
        """Raise `MismatchError` unless these are activations of `lm`'s weights."""
        stored = self.models[self.index_of(model)]
        if stored.digest != lm.checkpoint.digest:
            raise MismatchError(
                f"{self.path} holds activations of {stored.name} ({stored.digest[:19]}...), and "
                f"{lm.checkpoint} has the digest {lm.checkpoint.digest[:19]}...",
                fix="capture this model's activations, or pass the model they are of",
            )

    def index_of(self, model: int | str) -> int:
        """The index of a model given by index or name. Raises `MismatchError`."""
        names = [each.name for each in self.models]
        index = names.index(model) if model in names else model
        if not isinstance(index, int) or not 0 <= index < len(names):
            raise MismatchError(f"{self.path} has no model {model!r}; it has {', '.join(names)}")
        return index

    def site_of(self, site: str | None) -> str:
        """`site`, or the only one there is. Raises `MismatchError` for one that was not captured."""
        if site is None and len(self.sites) == 1:
            return self.sites[0]
        if site not in self.sites:
            raise MismatchError(
                f"{self.path} holds {', '.join(self.sites)}" + (f", not {site}" if site else ""),
                fix="name one of these sites, or capture the other one",
            )
        return site


def check_shard(file: Path, listed: ShardFile) -> None:
    """Raise `InputError`, naming the file, unless it is byte for byte what was written."""
    if not file.is_file() or file.stat().st_size != listed.bytes or digest_file(file) != listed.digest:
        raise InputError(f"{file} was changed since it was written", fix=_again(file))


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest that carries the digest of its own content."""
    return {**facts, "digest": digest_of(facts)}


def shard_file(record: Mapping[str, Any]) -> ShardFile:
    """What a shard's record, or a line of the manifest, says."""
    first, last = record["conversations"]
    return ShardFile(record["name"], (first, last), record["tokens"], record["bytes"], record["digest"])


def _from_manifest(folder: Path, found: object, verify: bool) -> ActivationStore:
    path = folder / MANIFEST
    manifest = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if manifest.get("kind") != KIND:
        raise InputError(f"{path} is not the manifest of an activation store")
    facts = {name: value for name, value in manifest.items() if name != "digest"}
    if manifest.get("digest") != digest_of(facts):
        raise InputError(f"{path} was changed since it was written", fix="capture again, into another folder")
    return ActivationStore(
        path=folder,
        models=tuple(StoredModel(**model) for model in facts["models"]),
        sites=tuple(facts["sites"]),
        d_model=facts["d_model"],
        dtype=facts["dtype"],
        mask=TokenMask(**facts["mask"]),
        counts=Counts(**facts["counts"]),
        shards=tuple(shard_file(record) for record in facts["shards"]),
        source=facts["source"],
        digest=manifest["digest"],
        verify=verify,
    )


def _again(file: Path) -> str:
    record, manifest = file.with_suffix(".json"), file.parent.parent / MANIFEST
    return f"remove {record} and {manifest}, and run the same capture again: it makes this shard anew"
