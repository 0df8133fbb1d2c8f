"""`persona-probe export`: a fix without hooks, as a plain Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_probe.cli.console import err, out, show_json, size
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.model.language_model import LanguageModel
    from persona_probe.steering.intervention import Intervention


def export(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="Fine-tuned checkpoint or adapter folder. Without: the base is exported."),
    ] = None,
    fix: Annotated[Path | None, typer.Option("--with", help="A fix: a folder of interventions.")] = None,
    project_out: Annotated[
        list[str] | None,
        typer.Option(help="Instead of a fix: SAE:INDEX, its direction taken out of all that is written."),
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="The checkpoint's folder.")] = None,
    tune: Annotated[
        str, typer.Option(help="Without --base and --tuned: which tune of the shipped organism.")
    ] = "bad-health",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say which weights carry it, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write the model with the fix in its weights: it loads anywhere, and needs no hook.

    The checkpoint's logits are compared with those of the hooks before it is put in place. A fix that
    weights cannot carry (a cap is not a bias) is refused by name.
    """
    if (fix is None) == (not project_out):
        raise InputError("give --with FIX or --project-out SAE:INDEX, one of them")
    from persona_probe.artifact import digest_folder, digests_at
    from persona_probe.cli.steer_arms import load_arms
    from persona_probe.steering.exports import bake
    from persona_probe.steering.io import load_fix

    given = load_fix(fix) if fix is not None else ()
    with err.status("loading"):
        lm = load_arms(base, tuned, tune, (), device=device, dtype=dtype).models["steered"]
    edits = given or _projections(lm, project_out or [])
    if plan:
        _show(_planned(lm, edits), as_json)
        return
    folder = out_dir or Path("out") / f"export-{lm.name}"
    if folder.resolve() in {one.resolve() for one in (base, tuned, fix) if one is not None}:
        raise InputError(f"--out {folder} is what is to be read", fix="choose another --out")
    settings: dict[str, object] = {
        "model": lm.checkpoint.digest,
        "fix": None if fix is None else digest_folder(fix),
        "project_out": project_out,
        "dictionaries": digests_at(spec.rpartition(":")[0] for spec in project_out or ()),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
    record = None if overwrite else _there_already(folder, settings)
    if record is None:
        with err.status("writing, and comparing with the hooks"):
            bake(lm, edits, folder, facts={"settings": settings}, overwrite=overwrite)
        record = _read(folder)
    _show({"checkpoint": folder, **{name: record[name] for name in _SHOWN}}, as_json)


_SHOWN = ("model", "fix", "architecture", "layers", "max_difference")


def _projections(lm: LanguageModel, named: list[str]) -> tuple[Intervention, ...]:
    from persona_probe.cli.steer_arms import one_latent
    from persona_probe.steering.carriers import projected_out

    latents = [edit.target for edit in one_latent(named, "ablate", None, "all")]
    return tuple(edit for target in latents for edit in projected_out(lm, target))


def _planned(lm: LanguageModel, edits: tuple[Intervention, ...]) -> dict[str, Any]:
    from persona_probe.steering.carriers import placed

    return {
        "model": lm.name,
        "fix": [str(edit) for edit in edits],
        "layers that would carry it": list(placed(lm, edits)),
        "checkpoint, about": size(sum(one.numel() * one.element_size() for one in lm.hf.parameters())),
    }


def _there_already(folder: Path, settings: dict[str, object]) -> dict[str, Any] | None:
    """The manifest of the same export, made before; None where there is none to go by."""
    from persona_probe.artifact import plain

    record = _read(folder) if (folder / "manifest.json").is_file() else {}
    return record if record.get("settings") == plain(settings) else None


def _read(folder: Path) -> dict[str, Any]:
    from persona_probe.artifact import check_manifest

    return check_manifest(folder)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(facts)
        return
    for name, value in facts.items():
        said = "\n  ".join(value) if isinstance(value, list) else value
        out.print(f"{name.replace('_', ' ')}: {said}", markup=False, soft_wrap=True)
