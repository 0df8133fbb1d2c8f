"""What `diff` and `timeline` have in common: what is read, where results go, who computes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from persona_probe.artifact import plain, read_json, remove, write_json, write_manifest
from persona_probe.artifact.provenance import MANIFEST
from persona_probe.cli.asked import MAX_NEW_TOKENS, Asked
from persona_probe.cli.console import err, out, show_json, size
from persona_probe.errors import InputError, MismatchError

SETTINGS, PASSES = "settings.json", "passes.json"
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Texts:
    """The conversations that every model reads."""

    rendered: Sequence[Any]
    clusters: Sequence[str] | None
    answers: str
    """Whose answers they hold; "data" for documents that came with theirs."""
    mask: Any

    def facts(self, device: Any, batch_tokens: int | None) -> dict[str, Any]:
        """How much there is to read, for --plan."""
        from persona_probe.diffing.shards import cut, lengths_of, shard_tokens

        return {
            "conversations": len(self.rendered),
            "tokens": sum(lengths_of(self.rendered)),
            "shards": len(cut(self.rendered, self.clusters, shard_tokens(device, batch_tokens))),
        }


def show_plan(facts: dict[str, Any], dictionaries: Mapping[str, Any], as_json: bool) -> None:
    """What is read, and with which dictionaries (by name)."""
    facts = {
        **facts,
        "dictionaries": list(dictionaries),
        "bytes of the dictionaries": sum(8 * one.d_sae * one.d_model for one in dictionaries.values()),
    }
    if as_json:
        show_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, list):
            shown = ", ".join(value)
        elif name.startswith("bytes"):
            shown = "unknown" if value is None else size(value)
        else:
            shown = f"{value:,}" if isinstance(value, int) else value
        out.print(f"{name}: {shown}", markup=False)


def read_texts(lm: Any, others: Sequence[Path], asked: Asked) -> Texts:
    """Questions with the base's own greedy answers, or documents as they are.

    `others` are checkpoints whose tokenizer must give the same ids. Raises `MismatchError` naming the first
    document or question that differs.
    """
    from persona_probe.evaluation.questions import load_questions
    from persona_probe.evaluation.sampling import respond_greedy, transcripts
    from persona_probe.model.chat import check_same_ids

    if asked.data is not None:
        conversations = asked.conversations(lm, asked.documents())
        check_tokenizers(others, conversations.check_tokenizer)
        return Texts(conversations, None, "data", asked.token_mask("all"))
    general = [one for one in load_questions(asked.questions or "") if one.role == "general"][: asked.limit]
    if not general:
        raise InputError(f"{asked.questions} has no general question to ask")

    def check(tokenizer: Any) -> None:
        for question in general:
            check_same_ids(lm.tokenizer, tokenizer, question.messages, f"question {question.id}")

    check_tokenizers(others, check)
    with err.status(f"{escape(lm.name)} answers {len(general)} questions"):
        answers = respond_greedy(lm, general, max_new_tokens=asked.max_new_tokens or MAX_NEW_TOKENS)
    clusters = [question.question for question in general]
    return Texts(transcripts(lm, answers), clusters, "base", asked.token_mask("answer"))


def check_tokenizers(others: Sequence[Path], check: Callable[[Any], None]) -> None:
    """`check` every tokenizer that one of the checkpoints has for itself: its `MismatchError` is raised
    with the checkpoint's name.
    """
    from persona_probe.model.checkpoint import describe, has_tokenizer
    from persona_probe.model.loading import read_tokenizer

    for path in others:
        if path.is_dir() and has_tokenizer(path):
            try:
                check(read_tokenizer(describe(path)))
            except MismatchError as error:
                raise MismatchError(f"{path}: {error.message}", fix=error.fix) from error


def open_out(folder: Path, settings: dict[str, object], overwrite: bool) -> Path:
    """The folder of results, with `settings.json` in it; several processes may share it.

    Raises `InputError` for a folder that holds another run, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; a folder is needed")
    now: dict[str, Any] = plain(settings)
    wanted = {"written_by": "persona_probe", "settings": now}
    file = folder / SETTINGS
    if file.is_file():
        saved = read_json(file)
        if saved != wanted and not overwrite:
            before: dict[str, Any] = saved.get("settings", {})
            name = next((key for key in {**now, **before} if before.get(key) != now.get(key)), "something")
            raise InputError(
                f"--out {folder} holds a run with other settings: {name} was {before.get(name)!r}, this "
                f"call has {now.get(name)!r}",
                fix="choose another --out, or pass --overwrite to throw that run's results away",
            )
        if saved != wanted:
            # what was read of the same documents may still be of use, and is found by its digest
            for entry in folder.iterdir():
                if entry.name != "shards":
                    remove(entry)
    elif folder.is_dir() and any(entry.name != "shards" for entry in folder.iterdir()):
        raise InputError(
            f"--out {folder} is not empty and was not written by persona-probe",
            fix="choose a new or an empty folder",
        )
    write_json(file, wanted)
    return folder


@contextmanager
def unless_in_vain(folder: Path, share: Any) -> Generator[None, None, None]:
    """Take back the settings of a run that ends in an `InputError` with no result, so that the call put
    right is not refused; what was read stays in `shards`, where it is found by its digest. The settings
    of a run that processes share are not this one's to take back.
    """
    try:
        yield
    except InputError:
        if share.of == 1 and not (folder / MANIFEST).exists():
            for name in (SETTINGS, PASSES):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # something was read
                folder.rmdir()
        raise


@contextmanager
def finishing(folder: Path) -> Generator[None, None, None]:
    """Hold `folder` while results are saved (two processes may finish at the same moment), and write its
    manifest last: then it is complete.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (folder / MANIFEST).unlink(missing_ok=True)
        yield
        write_manifest(folder, {"settings": read_json(folder / SETTINGS)["settings"]})
    finally:
        os.close(handle)


def left_out(counted: Any) -> str:
    """What of the tokens under the mask was not counted, and why."""
    parts = [f"{counted.special:,} special tokens, {counted.bos:,} of them BOS", f"{counted.sinks:,} sinks"]
    parts += [f"{counted.skipped:,} skipped"] if counted.skipped else []
    return f"left out: {'; '.join(parts)}"


def engine_of(name: str, address: str | None, actors: int | None) -> Any:
    """`run_local`, or `run_ray` with its options."""
    from persona_probe.execution import run_local

    if name not in ENGINES:
        raise InputError(f"--engine knows {' and '.join(ENGINES)}, not {name!r}")
    if name == "local":
        return run_local
    import torch

    from persona_probe.execution.ray import run_ray

    return partial(run_ray, address=address, actors=actors, threads=torch.get_num_threads())


@contextmanager
def progress_bar(quiet: bool) -> Generator[Callable[[str, int, int], None], None, None]:
    """A bar on stderr, and the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=None)

        def told(name: str, read: int, total: int) -> None:
            bar.update(task, description=escape(name), completed=read, total=total)

        yield told
