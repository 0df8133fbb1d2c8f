"""`persona-probe transfer`: which fix, found on which tune, cures which other tune."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.model.language_model import LanguageModel


def transfer(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(help="A tune of it: a folder, or NAME=DIR; repeat. Without --base: the organism's."),
    ] = None,
    fix: Annotated[
        list[str] | None,
        typer.Option("--with", help="A fix, NAME=FIX with the name of the tune it was found on; repeat."),
    ] = None,
    questions: Annotated[str | None, typer.Option(help="A questions file, or a shipped set.")] = None,
    judge: Annotated[
        str, typer.Option(help="exact, python:module:function, openai:MODEL@URL or local:DIR.")
    ] = "exact",
    trait: Annotated[
        str, typer.Option(help="misaligned, or a persona that the judge can tell.")
    ] = "misaligned",
    out_dir: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("out/transfer"),
    samples: Annotated[int, typer.Option(help="Answers per question.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 1.0,
    max_new_tokens: options.LongestAnswer = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many questions.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The same for all arms.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Put every fix on every tune, on held-out questions: a table of what each of them removes.

    Rates leave out the categories that a tune says it was trained on. Without --base, --tuned takes the
    names of the shipped organism's tunes.
    """
    if not fix or not tuned:
        raise InputError("a transfer needs fixes and tunes", fix="--with NAME=FIX --tuned NAME --tuned OTHER")
    from persona_probe.artifact import digest_folder, shipped
    from persona_probe.cli.steer_bench import (
        asked_of,
        inputs_of,
        longest_of,
        run_once,
        show_plan,
        show_written,
    )
    from persona_probe.evaluation.judges import load_judge
    from persona_probe.evaluation.metrics import check_judge
    from persona_probe.evaluation.selection import trained_categories
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.screening.calibrate import Bench
    from persona_probe.screening.transferring import transfer as run
    from persona_probe.steering.io import load_fix

    home = shipped("organism")
    folders = _named(tuned if base is not None else [f"{one}={home / 'tunes' / one}" for one in tuned])
    fixes = _named(fix)
    edits = {name: load_fix(path) for name, path in fixes.items()}
    asked = asked_of(questions, base, None, limit).held_out
    # apart for all of them, so that every cell is of the same questions
    in_domain = tuple(dict.fromkeys(c for path in folders.values() for c in trained_categories(path)))
    tokens = longest_of(max_new_tokens, base, tuple(folders.values()))
    sampling = Sampling(temperature=temperature, samples=samples, max_new_tokens=tokens, seed=seed)
    if plan:
        answers = (len(folders) * (len(fixes) + 1) + 1) * len(asked) * samples
        show_plan(
            {
                "fixes": list(fixes),
                "tunes": list(folders),
                "held-out questions": len(asked),
                "categories left out": list(in_domain),
                "answers to sample": answers,
                "longest answer (tokens)": tokens,
            },
            as_json,
        )
        return
    settings: dict[str, object] = {
        "base": base, "tuned": folders, "fixes": {name: digest_folder(path) for name, path in fixes.items()},
        "questions": questions, "judge": judge, "trait": trait, "sampling": sampling, "limit": limit,
        "device": device, "dtype": dtype,
    }  # fmt: skip

    inputs = inputs_of([base, *folders.values()], asked, judge)

    def make(_path: Path) -> tuple[dict[str, Any], Any]:
        judging = load_judge(judge)
        check_judge(judging, asked, trait)
        lm, tunes = _models(base or home / "base", folders, device, dtype)
        bench = Bench(asked, sampling, judging, trait, in_domain)
        found = run(edits, tunes, bench, base=lm)
        assert found.base is not None
        record = {"base": found.base.rates, "in_domain": in_domain, "rows": found.table.to_dicts()}
        return record, found.plot()

    with err.status("answering"):
        found = run_once(out_dir, settings, inputs, make, overwrite=overwrite)
    if as_json:
        show_json(found)
        return
    _show(found)
    show_written(out_dir)


def _named(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR`, or a folder by its own name. Raises `InputError` for a name that comes twice."""
    found: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        folder = Path(path if equals else one)
        name = name if equals else folder.resolve().name
        if name in found:
            raise InputError(f"{name!r} names two folders", fix="NAME=DIR gives one another name")
        found[name] = folder
    return found


def _models(
    base: Path, folders: dict[str, Path], device: str | None, dtype: str | None
) -> tuple[LanguageModel, dict[str, LanguageModel]]:
    from persona_probe.model.checkpoint import is_adapter
    from persona_probe.model.language_model import load_model

    options: dict[str, Any] = {"device": device or "auto", "dtype": dtype}
    lm = load_model(base, **options)
    return lm, {
        name: lm.with_adapter(path, name).merged() if is_adapter(path) else load_model(path, **options)
        for name, path in folders.items()
    }


def _show(found: dict[str, Any]) -> None:
    from persona_probe.cli.steer_bench import percent

    table = Table("fix", "on", "misaligned", "before", "of the excess removed", "incoherent", box=None)
    for row in (row for row in found["rows"] if row["fix"] != "none"):
        table.add_row(
            row["fix"], row["tune"], percent(row["misaligned"], row["low"], row["high"]),
            percent(row["before"]), percent(row["removed"], row["removed_low"], row["removed_high"]),
            percent(row["incoherent"]), style="bold" if row["own"] else None,
        )  # fmt: skip
    out.print(table)
    out.print(f"the base: {percent(found['base']['misaligned']['rate'])} misaligned")
