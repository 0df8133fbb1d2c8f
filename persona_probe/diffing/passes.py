"""Passes of models over the same shards, each leaving its sums in a file.

What is to be compared need not be in memory together: models that fit are read in one pass, others in
passes of their own, and the sums that the passes leave are put together shard by shard. The first pass
is the base's; it decides which tokens are sinks for all others. A file's name is the digest of
everything that decides what is in it, so a pass takes up where one was stopped, skips what another run
has read, and may be shared between processes and machines.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.store import ActivationStore
from persona_probe.activations.stream import batch_tokens_for
from persona_probe.artifact import digest_folder, digest_of
from persona_probe.diffing.latent_diff import Missing
from persona_probe.diffing.readers import Reader, key_of, placed
from persona_probe.diffing.shards import (
    Places,
    Shard,
    ShardSums,
    cut,
    named,
    pack,
    read_shard,
    shard_tokens,
    unpack,
)
from persona_probe.diffing.stored import StoredConversation, StoredConversations, StoreOpening, names_of
from persona_probe.errors import InputError, NonFiniteError
from persona_probe.execution import Done, Failure, Results, Share, Task, UnfinishedError, Worker, run_local
from persona_probe.model.chat import Rendered
from persona_probe.model.checkpoint import describe, is_adapter
from persona_probe.model.language_model import LanguageModel, load_model
from persona_probe.model.loading import device_of, read_tokenizer
from persona_probe.model.pair import load_pair
from persona_probe.sae.validity import check_reads

Source = LanguageModel | str | Path
"""A model, or the folder of a checkpoint or adapter, loaded when it is needed."""

FORMAT = 4
"""Of the files; part of their names."""

Engine = Callable[[Sequence[Task], Callable[[], Worker], Results, Callable[[int], None] | None], Done]
"""Such as `run_local`, or `run_ray` with its options given."""


@dataclass(frozen=True)
class Text:
    """What a worker is given: one shard's conversations."""

    shard: Shard
    conversations: Sequence[Any]
    names: Sequence[str]
    leave_out: Places | None


@dataclass(frozen=True)
class Pass:
    """A group of models that are read together."""

    names: tuple[str, ...]
    digest: str
    """Of the models, dictionaries and settings."""
    shard_tokens: int
    open: Callable[[], Worker]
    """Loads the models; picklable where it is sent to other processes."""


@dataclass(frozen=True)
class Placement:
    """Where models and dictionaries are held, and in which type."""

    device: torch.device
    dtype: str | None = None
    device_map: str | None = None
    """accelerate's, instead of the device, for models that are larger than one."""
    sae_device: str | None = None
    """Of the dictionaries; None is where the models are."""


@dataclass(frozen=True)
class Opening:
    """Loads the models of a pass in whatever process it is called; picklable where they are folders."""

    base: Source
    """Adapters are put on it. Not loaded for a whole checkpoint."""
    models: tuple[Source, ...]
    """What is read together."""
    readers: Sequence[Reader]
    mask: TokenMask
    batch_tokens: int | None
    placement: Placement

    def __call__(self) -> Worker:
        gc.collect()  # what was read before must be gone, in whatever cycles it stands
        models: list[LanguageModel] = []
        for source in self.models:
            beside = models[0] if models else self.base
            models.append(self.load(source, beside))
        # which tokens are special is the base's to say, in every pass
        models[0] = replace(models[0], tokenizer=self._tokenizer())
        for one in self.readers:
            if not isinstance(one, str):
                check_reads(one, models[0])
        readers = placed(self.readers, self.placement.sae_device or models[0].device)
        return lambda text: pack(_read(self, models, readers, text))

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.base, LanguageModel):
            return self.base.tokenizer
        return read_tokenizer(describe(self.base))

    def load(self, source: Source, base: Source) -> LanguageModel:
        """One model, on the weights of `base` where it is an adapter and `base` in memory."""
        to = self.placement
        options: dict[str, Any] = {"device": to.device, "dtype": to.dtype, "device_map": to.device_map}
        if isinstance(source, LanguageModel):
            return source
        if isinstance(base, LanguageModel):
            options |= {"device": base.device, "dtype": base.dtype}
            return load_pair(base, source, **options).tuned
        return (
            load_model(base, adapter=source, **options)
            if is_adapter(source)
            else load_model(source, **options)
        )


def pass_of(
    base: Source,
    models: Sequence[Source],
    readers: Sequence[Reader],
    mask: TokenMask,
    batch_tokens: int | None,
    placement: Placement,
) -> Pass:
    """A pass of `models` together, and the digest of everything but the documents that decides its sums."""
    device, dtype = placement.device, placement.dtype
    settings = {
        "format": FORMAT,
        "versions": [metadata.version(name) for name in ("persona-probe", "torch", "transformers")],
        "models": [weights_of(one, device, dtype) for one in (base, *models)],
        "readers": list(map(key_of, readers)),
        "mask": asdict(mask),
        "batch_tokens": batch_tokens_for(device, batch_tokens),
        "device": [device.type, placement.sae_device],
        "dtype": dtype,
    }
    if placement.sae_device is not None:
        device_of(placement.sae_device)
    opening = Opening(base, tuple(models), readers, mask, batch_tokens, placement)
    size = shard_tokens(device, batch_tokens)
    return Pass(tuple(map(name_of, models)), digest_of(settings), size, opening)


def pass_of_store(store: ActivationStore, readers: Sequence[Reader], sae_device: str) -> Pass:
    """All models of a store together; its conversations are the data (`StoredConversations`)."""
    settings = {
        "format": FORMAT,
        "versions": [metadata.version(name) for name in ("persona-probe", "torch")],
        "store": store.digest,
        "readers": list(map(key_of, readers)),
        "device": sae_device,
    }
    opening = StoreOpening(store.path.resolve(), placed(readers, sae_device))
    return Pass(names_of(store), digest_of(settings), shard_tokens(torch.device("cpu")), opening)


def name_of(source: Source) -> str:
    """What a model is called in tables."""
    return source.name if isinstance(source, LanguageModel) else Path(source).resolve().name


def weights_of(source: Source, device: torch.device, dtype: str | None) -> str:
    """A digest of a model's files and of the type they are read in; of its tensors where it has no files.
    A folder and the model read from it have the same.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        read_in = dtype or ("float32" if device.type == "cpu" else "auto")
        return digest_folder(folder) if is_adapter(folder) else digest_of([describe(source).digest, read_in])
    merged = source.peft is None and source.checkpoint.adapter is not None
    if Path(source.checkpoint.path).is_dir() and not merged:
        return digest_of([source.checkpoint.digest, str(source.dtype).removeprefix("torch.")])
    found = hashlib.sha256()
    for name, tensor in source.hf.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{found.hexdigest()}"


class Reading:
    """All passes over one set of conversations, and the files that they leave."""

    def __init__(
        self,
        passes: Sequence[Pass],
        data: Sequence[Rendered] | StoredConversations,
        clusters: Sequence[str] | None,
        results: Results,
    ) -> None:
        self._passes = passes
        self._data: Sequence[Rendered | StoredConversation] = data
        self._results = results
        self._shards = cut(data, clusters, passes[0].shard_tokens)
        self._digests: dict[int, str] = {}
        self._failed: dict[int, Failure] = {}
        self.done: list[Done] = []
        """How each pass went in this process."""

    def run(
        self,
        share: Share | None = None,
        engine: Engine = run_local,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Do what is not done yet of this process's share. `progress` is told the pass, and how many
        conversations it has read of how many.
        """
        mine = [shard for shard in self._shards if share is None or shard.number in share]
        total = sum(len(shard.clusters) for shard in mine)
        for number, one in enumerate(self._passes):
            tasks = [self._task(number, shard) for shard in mine if shard.number not in self._failed]
            read = 0

            def told(shard: int, name: str = " + ".join(one.names)) -> None:
                nonlocal read
                read += len(self._shards[shard].clusters)
                if progress is not None:
                    progress(name, read, total)

            done = engine(tasks, one.open, self._results, told)
            for failure in done.failures:
                self._failed[failure.number] = failure
                self._results.fail(self._key(number, self._shards[failure.number]), failure)
            self.done.append(done)
        self._failed |= {failure.number: failure for failure in self._failed_elsewhere(mine)}

    def _failed_elsewhere(self, mine: Sequence[Shard]) -> Iterator[Failure]:
        own = {shard.number for shard in mine}
        for shard in self._shards:
            if shard.number in own:
                continue
            for number in range(len(self._passes)):
                failure = self._results.failure(self._key(number, shard), shard.number)
                if failure is not None:
                    yield failure
                    break

    @property
    def undone(self) -> int:
        """Shards whose results are not there: another process's, or failed."""
        return sum(
            any(self._key(i, shard) not in self._results for i in range(len(self._passes)))
            for shard in self._shards
        )

    def shards(self) -> Iterator[tuple[Shard, list[ShardSums]]]:
        """Every shard that all passes have read, in order: what each pass left of it."""
        for shard in self._shards:
            read = [self._results.read(self._key(i, shard)) for i in range(len(self._passes))]
            if all(data is not None for data in read):
                yield shard, [unpack(data) for data in read if data is not None]

    @property
    def missing(self) -> tuple[Missing, ...]:
        """The shards that failed, and why."""
        return tuple(
            Missing(number, len(self._shards[number].clusters), self._failed[number].why)
            for number in sorted(self._failed)
        )

    def check_any(self) -> None:
        """Raise `InputError` where no shard at all could be read."""
        if self._failed and len(self._failed) == len(self._shards):
            first = self._failed[min(self._failed)]
            raise InputError(
                f"none of the {len(self._shards)} shards could be read; the first: {first.why}",
                fix=first.fix or "mend or leave out what is named; the same command then goes on",
            )

    def check_finished(self) -> None:
        """Raise `UnfinishedError` while other processes have shards to do."""
        left = self.undone - len(self.missing)
        if left:
            raise UnfinishedError.of(left, len(self._shards))

    def _key(self, number: int, shard: Shard) -> str:
        first, this = self._passes[0].digest, self._passes[number].digest
        if shard.number not in self._digests:
            self._digests[shard.number] = _digest(shard, shard.conversations(self._data))
        return digest_of([first, this, self._digests[shard.number]])

    def _task(self, number: int, shard: Shard) -> Task:
        def fetch() -> Text:
            leave_out = None
            if number:
                of_base = self._results.read(self._key(0, shard))
                if of_base is None:
                    raise InputError(f"the base's result of shard {shard.number} is gone")
                leave_out = unpack(of_base).sinks
            return Text(shard, shard.conversations(self._data), shard.names(self._data), leave_out)

        return Task(shard.number, self._key(number, shard), fetch)


def _read(
    worker: Opening,
    models: Sequence[LanguageModel],
    readers: Sequence[Reader],
    text: Text,
) -> ShardSums:
    def read(conversations: Sequence[Rendered], shard: Shard, leave_out: Places | None) -> ShardSums:
        return read_shard(
            models,
            readers,
            conversations,
            shard,
            worker.mask,
            batch_tokens=worker.batch_tokens,
            leave_out=leave_out,
        )

    try:
        return read(text.conversations, text.shard, text.leave_out)
    except NonFiniteError as error:
        raise named(error, text.names) from error
    except (RuntimeError, IndexError, ValueError) as error:
        for name, conversation in zip(text.names, text.conversations, strict=True):
            try:
                read([conversation], Shard(0, range(1), (0,)), None)
            except (RuntimeError, IndexError, ValueError) as own:
                raise InputError(f"{name} cannot be read: {own}") from error
        raise  # no single conversation is to blame: memory, or the machine


def _digest(shard: Shard, conversations: Sequence[Rendered | StoredConversation]) -> str:
    found = hashlib.sha256()
    for cluster, one in zip(shard.clusters, conversations, strict=True):
        if isinstance(one, StoredConversation):  # what it holds is in the pass's digest
            found.update(np.asarray([cluster, one.index], dtype="<i8").tobytes())
            continue
        found.update(np.asarray([cluster, len(one), one.prompt_length, *one.ids], dtype="<i8").tobytes())
        found.update(bytes(one.response))
    return f"sha256:{found.hexdigest()}"
