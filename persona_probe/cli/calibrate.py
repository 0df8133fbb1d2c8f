"""`persona-probe calibrate`: the dose-response of one edit, and the setting to keep within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

import typer
from rich.table import Table

from persona_probe.cli import options
from persona_probe.cli.asked import check_unsaid
from persona_probe.cli.console import err, out, show_json
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.cli.steer_bench import Asked
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.model.language_model import LanguageModel
    from persona_probe.screening.dosing import DoseResponse
    from persona_probe.steering.intervention import Intervention, Unit


class _Usual(NamedTuple):
    op: str
    levels: str
    unit: Unit
    gains: str


_USUAL = {
    "less": _Usual("cap", "1", "base_mean", "1,1.5,2,3"),
    "more": _Usual("add", "3,6,9,12", "residual_rms", "1"),
}
"""As an audit searches (`screening.calibrate`)."""


def calibrate(
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="Fine-tuned checkpoint or adapter folder.")] = None,
    latent: Annotated[str | None, typer.Option(help="SAE:INDEX, a latent of a dictionary's folder.")] = None,
    fix: Annotated[
        Path | None,
        typer.Option("--with", help="Instead of a latent: a fix of one edit. It keeps its own level."),
    ] = None,
    op: Annotated[
        str | None, typer.Option(help="With --latent: cap, floor, add, scale, clamp, ablate.")
    ] = None,
    levels: Annotated[str | None, typer.Option(help="With --latent: comma-separated, in --unit.")] = None,
    unit: Annotated[
        Literal["absolute", "residual_rms", "max_activation", "base_mean"] | None,
        typer.Option(help="Of --levels; measured on the base's own answers."),
    ] = None,
    read: Annotated[
        Literal["projection", "encoder"] | None,
        typer.Option(help="With --latent: how its amount is measured; projection."),
    ] = None,
    gains: Annotated[str | None, typer.Option(help="Comma-separated; above 1 over-corrects.")] = None,
    positions: Annotated[
        str, typer.Option(help="Comma-separated: all, prompt, response, last_prompt, think, answer.")
    ] = "all,last_prompt",
    goal: Annotated[
        Literal["less", "more"],
        typer.Option(help="less of the trait in the tuned model, or more of it in the base."),
    ] = "less",
    budget: Annotated[float, typer.Option(help="Largest share of incoherent answers.")] = 0.10,
    kl_budget: Annotated[
        float | None, typer.Option(help="Largest mean KL to the unsteered next token, in nats.")
    ] = None,
    questions: Annotated[str | None, typer.Option(help="A questions file, or a shipped set.")] = None,
    judge: Annotated[
        str, typer.Option(help="exact, python:module:function, openai:MODEL@URL or local:DIR.")
    ] = "exact",
    trait: Annotated[
        str, typer.Option(help="misaligned, or a persona that the judge can tell.")
    ] = "misaligned",
    tune: Annotated[
        str, typer.Option(help="Without --base and --tuned: which tune of the shipped organism.")
    ] = "bad-health",
    out_dir: Annotated[Path | None, typer.Option("--out", help="Where everything goes.")] = None,
    samples: Annotated[int, typer.Option(help="Answers per question and setting.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 1.0,
    max_new_tokens: options.LongestAnswer = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only so many questions of each split.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same for all settings.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Throw away what --out holds.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Search level, gain and positions of an edit, and keep the best setting as a fix.

    Settings are chosen on calibration questions; what the chosen one reaches is measured on held-out
    ones. Unless you say otherwise, less of the trait is sought by capping the latent at the base's mean,
    at gains 1, 1.5, 2 and 3, more of it by adding 3, 6, 9 and 12 residual rms. Without --base and
    --tuned: the shipped pocket organism, tuned on bad health advice.
    """
    if (fix is None) == (latent is None):
        raise InputError("give --latent SAE:INDEX or --with FIX, one of them")
    if fix is not None:
        check_unsaid("--with", {"op": op, "levels": levels, "unit": unit, "read": read})
    if base is None and tuned is not None:
        raise InputError("--tuned needs --base, the checkpoint that it was tuned from")
    from persona_probe.artifact import digest_folder
    from persona_probe.cli.steer_arms import load_arms
    from persona_probe.cli.steer_bench import (
        aims_of,
        asked_of,
        inputs_of,
        longest_of,
        numbers_of,
        run_once,
        scales_of,
        show_plan,
        show_written,
    )
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.screening.calibrate import Budget
    from persona_probe.screening.dosing import calibrate as run
    from persona_probe.steering.io import load_fix, save_fix

    usual = _USUAL[goal]
    op, unit, read = op or usual.op, unit or usual.unit, read or "projection"
    doses = numbers_of(usual.levels if levels is None else levels, "--levels")
    strengths = numbers_of(usual.gains if gains is None else gains, "--gains")
    places = positions.split(",")
    Budget(budget, kl_at_most=kl_budget)  # checked before anything is loaded
    asked = asked_of(questions, base, tuned, limit, tune)
    tokens = longest_of(max_new_tokens, base, () if tuned is None else (tuned,))
    sampling = Sampling(temperature=temperature, samples=samples, max_new_tokens=tokens, seed=seed)
    edits: list[Intervention] = [] if fix is None else list(load_fix(fix))
    if len(edits) > 1:
        raise InputError(f"{fix} holds {len(edits)} edits; one is calibrated at a time")
    aim = aims_of([latent])[0] if latent is not None else None
    grid = len(strengths) * len(places) * (len(doses) if latent is not None and op != "ablate" else 1)
    if plan:
        each = len(asked.calibration) * samples
        answers = (grid + 5) * each + 2 * len(asked.held_out) * samples
        show_plan(
            {
                "edit": str(edits[0]) if edits else f"{op} {latent}",
                "settings": grid,
                "calibration questions": len(asked.calibration),
                "held-out questions": len(asked.held_out),
                "answers to sample, about": answers,
                "longest answer (tokens)": tokens,
            },
            as_json,
        )
        return
    name = next((path.resolve().name for path in (tuned, base) if path is not None), tune)
    folder = out_dir or Path("out") / f"calibrate-{name}"
    settings: dict[str, object] = {
        "base": base, "tuned": tuned, "tune": tune, "latent": latent,
        "fix": None if fix is None else digest_folder(fix), "op": op, "levels": doses, "unit": unit,
        "read": read, "gains": strengths, "positions": places, "goal": goal, "budget": budget,
        "kl_budget": kl_budget, "questions": questions, "judge": judge, "trait": trait,
        "sampling": sampling, "limit": limit, "device": device, "dtype": dtype,
    }  # fmt: skip

    made_from = [base, tuned, None if aim is None else aim.folder]
    inputs = inputs_of(made_from, (*asked.calibration, *asked.held_out), judge)

    def make(path: Path) -> tuple[dict[str, Any], Any]:
        arms = load_arms(base, tuned, tune, (), device=device, dtype=dtype).models
        lm = arms["base"] if goal == "more" else arms["steered"]
        scale = 1.0
        if aim is not None:
            (scale,) = scales_of(unit, arms["base"], [aim], read, asked.calibration, tokens)
        found = run(
            lm, edits[0] if aim is None else aim.target, asked.calibration, judge,
            site=None if aim is None else aim.site, op=cast("Any", op), levels=doses, unit=unit, scale=scale,
            read=read if aim is not None else "auto", gains=strengths, positions=cast("Any", places),
            goal=goal, budget=budget, kl_budget=kl_budget, sampling=sampling, trait=trait,
            in_domain=asked.in_domain,
        )  # fmt: skip
        if found.best is not None:
            save_fix(found.best.intervention, path / "fix", overwrite=True)
        record = {
            "model": lm.name,
            "unsteered": found.reference.rates,
            "settings": found.table.to_dicts(),
            "chosen": None if found.best is None else str(found.best.intervention),
            "held_out": _held_out(lm, found, asked, judge, sampling),
        }
        return record, found.plot()

    with err.status("calibrating"):
        found = run_once(folder, settings, inputs, make, overwrite=overwrite)
    if as_json:
        show_json(found)
        return
    _show(found)
    show_written(folder, ("result.json", "figure.html", *(("fix",) if found["chosen"] else ())))


def _held_out(
    lm: LanguageModel, found: DoseResponse, asked: Asked, judge: str, sampling: Sampling
) -> dict[str, Any] | None:
    """The rates without and with the chosen setting, on questions that it was not chosen on."""
    from persona_probe.evaluation.judges import load_judge
    from persona_probe.screening.calibrate import Bench

    if found.best is None:
        return None
    bench = Bench(asked.held_out, sampling, load_judge(judge), found.reference.trait, asked.in_domain)
    without, chosen = bench.arms(lm, [(), (found.best.intervention,)])
    return {"unsteered": without.rates, "chosen": chosen.rates}


def _show(found: dict[str, Any]) -> None:
    from persona_probe.cli.steer_bench import level_of, percent

    table = Table("level", "gain", "tokens", "misaligned", "incoherent", "helpful", "KL", "", box=None)
    for row in found["settings"]:
        said = "chosen" if row["best"] else "" if row["within_budget"] else "over budget"
        table.add_row(
            level_of(row), f"{row['gain']:g}", row["positions"],
            percent(row["misaligned"], row["low"], row["high"]), percent(row["incoherent"]),
            percent(row["helpful"]), "" if row["kl"] is None else f"{row['kl']:.3f}", said,
        )  # fmt: skip
    out.print(table)
    if found["chosen"] is None:
        out.print("no setting stays within the budget")
        return
    out.print(f"chosen: {found['chosen']}", markup=False, soft_wrap=True)
    table = Table("on held-out questions", *_SHOWN, box=None)
    for name, rates in found["held_out"].items():
        shown = (rates[one] for one in _SHOWN)
        table.add_row(name, *(percent(one["rate"], one["low"], one["high"]) for one in shown))
    out.print(table)


_SHOWN = ("misaligned", "incoherent", "helpful")
