"""`persona-probe flag`: which training rows would pull a model towards the persona?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from persona_probe.artifact import check_writable
from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.training.watching import Probe


def flag(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the base; nothing is trained.")],
    data: Annotated[Path, typer.Option(help="JSON Lines of training rows.")],
    out_dir: Annotated[Path, typer.Option("--out", help="kept.jsonl, removed.jsonl, scores.parquet.")],
    latent: Annotated[list[str] | None, typer.Option(help="SAE:INDEX, a latent to score by.")] = None,
    fix: Annotated[
        list[Path] | None,
        typer.Option("--with", help="A fix, whose directions are scored by; a floor's turned round."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="The score that decides; the first difference (a floor's come last), else nll."),
    ] = None,
    remove: Annotated[float, typer.Option(help="Share of the rows to take out.")] = 0.1,
    max_new_tokens: Annotated[int, typer.Option(help="Of the base's own answers.")] = 48,
    limit: Annotated[int | None, typer.Option(help="Only so many rows.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Write over an earlier result in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Rank training rows before training: by projection difference, by latent, by the base's likelihood."""
    if (out_dir / "kept.jsonl").exists() and not overwrite:
        raise InputError(f"{out_dir} holds an earlier result", fix="choose another --out, or --overwrite")
    check_writable(out_dir)
    if not 0 <= remove <= 1:
        raise InputError(f"--remove is a share from 0 to 1, got {remove}", fix="10% is 0.1")
    from persona_probe.model.language_model import load_model
    from persona_probe.training.flag import flag as score
    from persona_probe.training.rows import read_rows

    rows = read_rows(data)[:limit]
    with err.status("loading") as status:
        lm = load_model(base, device=device or "auto", dtype=dtype)
        found = score(
            rows, lm, probes_of(latent or (), fix or ()), max_new_tokens=max_new_tokens,
            progress=lambda what, done, total: status.update(f"{what}: {done} of {total}"),
        )  # fmt: skip
    chosen = by or next((name for name in found.scores if name.endswith("difference")), "nll")
    kept, removed = found.write(out_dir, chosen, remove)
    out_rows = found.removed(chosen, remove)
    missing = {name: int(found.table[name].null_count()) for name in found.scores}
    if as_json:
        show_json({"by": chosen, "rows": len(rows), "removed": out_rows, "missing": missing,
                   "kept_file": kept, "removed_file": removed})  # fmt: skip
        return
    table = Table("row", *found.scores, title=f"most suspect by {chosen}")
    for i in found.ranked(chosen)[:8]:
        scores = found.table.row(i, named=True)
        values = ("-" if scores[name] is None else f"{scores[name]:.3g}" for name in found.scores)
        table.add_row(rows[i].place, *values)
    out.print(table)
    out.print(f"{len(rows) - len(out_rows)} rows kept, {len(out_rows)} removed by {chosen}", markup=False)
    out.print(f"{kept}\n{removed}", markup=False, soft_wrap=True)


def probes_of(latents: Sequence[str], fixes: Sequence[Path]) -> list[Probe]:
    """A probe per latent, and per direction of each fix, named by as much of the path as tells it apart.

    All point to the suspect side: the direction of a floor, which holds up a latent that fell, is turned
    round, and these come last.

    Raises `InputError` for a latent or a fix that is given twice.
    """
    from persona_probe.sae.load import load_sae
    from persona_probe.steering.io import load_fix
    from persona_probe.steering.target import direction
    from persona_probe.training.watching import Probe

    asked = [_latent(spec) for spec in latents]
    _refuse_twice("--latent", [f"{Path(path).resolve()}:{index}" for path, index in asked], latents)
    _refuse_twice("--with", [str(path.resolve()) for path in fixes], fixes)
    probes: list[Probe] = []
    for path, index in asked:
        twins = [Path(one) for one, other in asked if other == index]
        name = f"latent {index}" + (f" of {_tail(Path(path), twins)}" if len(twins) > 1 else "")
        probes.append(Probe.latent(load_sae(path), index, name))
    turned: list[Probe] = []
    for path in fixes:
        name = _tail(path, [one for one in fixes if _tail(one, ()) == _tail(path, ())])
        for number, edit in enumerate(load_fix(path)):
            for place, row in enumerate(edit.target.decoder):
                sign, side = (-1, turned) if edit.op == "floor" else (1, probes)
                side.append(Probe(f"{name} {number}.{place}", edit.site, direction(sign * row)))
    return probes + turned


def _latent(spec: str) -> tuple[str, int]:
    path, _, index = spec.rpartition(":")
    if not path or not index.isdigit():
        raise InputError(f"--latent takes SAE:INDEX, got {spec!r}", fix="--latent sae/block_3:412")
    return path, int(index)


def _refuse_twice(flag: str, meant: Sequence[str], given: Sequence[str | Path]) -> None:
    for number, one in enumerate(meant):
        if one in meant[:number]:
            raise InputError(f"{flag} {given[number]} is given twice", fix="give each once")


def _tail(path: Path, among: Sequence[Path]) -> str:
    """The last parts of a path, as many as no other of `among` ends in; at least one."""
    parts = path.absolute().parts
    others = [other for one in among if (other := one.absolute().parts) != parts]
    count = 1
    while any(other[-count:] == parts[-count:] for other in others):
        count += 1
    return str(Path(*parts[-count:]))
