"""`persona-probe steer`: base, tuned and steered answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_probe.artifact import check_writable
from persona_probe.cli.asked import check_unsaid
from persona_probe.cli.console import err, out, show_error, show_json
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.cli.steer_arms import Arms
    from persona_probe.evaluation.questions import Question
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.steering.intervention import Intervention


def steer(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to ask, each prompt in quotes.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base checkpoint folder.")] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(help="Fine-tuned checkpoint or adapter folder. Without: the base is steered."),
    ] = None,
    fix: Annotated[Path | None, typer.Option("--with", help="A fix: a folder of interventions.")] = None,
    latent: Annotated[
        list[str] | None, typer.Option(help="Instead of a fix: SAE:INDEX, a latent of a dictionary's folder.")
    ] = None,
    op: Annotated[
        str | None, typer.Option(help="With --latent: ablate (the default), add, scale, clamp, cap, floor.")
    ] = None,
    level: Annotated[float | None, typer.Option(help="With --latent: the op's level, absolute.")] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="With --latent: all (the default), prompt, response, last_prompt, think, answer, or "
            "indices: 0,3,-1."
        ),
    ] = None,
    gain: Annotated[
        float | None, typer.Option(help="Instead of each edit's own gain. Above 1 over-corrects.")
    ] = None,
    tune: Annotated[
        str, typer.Option(help="Without --base and --tuned: which tune of the shipped organism.")
    ] = "bad-health",
    system: Annotated[str | None, typer.Option(help="A system prompt, for all arms.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Chat with all arms.")] = False,
    jsonl: Annotated[Path | None, typer.Option(help="A file of prompts, JSON Lines.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="The answers, as JSON Lines.")] = None,
    html: Annotated[Path | None, typer.Option(help="The answers, as one page to open offline.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the most probable token each time.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Only so many prompts of --jsonl.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The same for all arms.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the files of --out and --html.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, then stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what base, tuned and steered model answer, side by side.

    Tokens are coloured by how strongly the fix's targets are there. Without --base and --tuned: the
    shipped pocket organism, tuned on bad health advice.
    """
    _check_call(bool(prompts), interactive, jsonl is not None, as_json)
    if base is None and tuned is not None:
        raise InputError("--tuned needs --base, the checkpoint that it was tuned from")
    if (fix is None) == (not latent):
        raise InputError(
            "there is nothing to steer with" if fix is None else "--with and --latent exclude each other",
            fix="--with FIX, a folder that an audit (its interventions/) or save_fix wrote; or "
            "--latent SAE:INDEX",
        )
    if fix is not None:
        check_unsaid("--with", {"op": op, "level": level, "positions": positions})
    for path in (out_file, html):
        if path is None:
            continue
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already", fix="give another name, or --overwrite")
        check_writable(path.absolute().parent)
    from persona_probe.cli.steer_arms import load_arms, one_latent
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.steering.io import load_fix

    edits = (
        load_fix(fix)
        if fix is not None
        else one_latent(latent or [], op or "ablate", level, positions or "all")
    )
    if gain is not None:
        edits = tuple(edit.with_gain(gain) for edit in edits)
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    questions = _asked(prompts or [], jsonl, limit)
    if plan:
        _show_plan(edits, questions, sampling, 2 if base is not None and tuned is None else 3, as_json)
        return
    with err.status("loading"):
        arms = load_arms(base, tuned, tune, edits, device=device, dtype=dtype)
    if interactive:
        from persona_probe.cli.steer_chat import chat

        _write(chat(arms, sampling, system), out_file, html)
    else:
        found = _answered(arms, questions, sampling, system, lines=jsonl is not None, as_json=as_json)
        if as_json:
            show_json(found)
        elif jsonl is not None and out_file is None and html is None:
            _show_lines(found["prompts"])
        _write(found, out_file, html)


def _check_call(prompts: bool, interactive: bool, jsonl: bool, as_json: bool) -> None:
    if prompts + interactive + jsonl != 1:
        raise InputError(
            "give prompts, --jsonl FILE or --interactive, one of the three",
            command='persona-probe steer --with FIX "how do i save money ?"',
        )
    if interactive and as_json:
        raise InputError("--interactive has no --json", fix="--out FILE writes the chat as JSON Lines")


def _asked(prompts: Sequence[str], jsonl: Path | None, limit: int | None) -> tuple[Question, ...]:
    from persona_probe.evaluation.prompts import load_prompts, prompt

    return load_prompts(jsonl)[:limit] if jsonl is not None else tuple(map(prompt, prompts))


def _show_plan(
    edits: Sequence[Intervention], questions: Sequence[Question], sampling: Sampling, arms: int, as_json: bool
) -> None:
    planned = {
        "fix": [str(edit) for edit in edits],
        "prompts": len(questions),
        "answers to sample": arms * len(questions),
        "new tokens, at most": arms * len(questions) * sampling.max_new_tokens,
        "judge calls": 0,
    }
    if as_json:
        show_json(planned)
        return
    for name, value in planned.items():
        out.print(f"{name}: {'; '.join(value) if isinstance(value, list) else value}", markup=False)


def _answered(
    arms: Arms,
    questions: Sequence[Question],
    sampling: Sampling,
    system: str | None,
    *,
    lines: bool,
    as_json: bool,
) -> dict[str, Any]:
    from persona_probe.cli.steer_view import show_legend, show_prompt

    with err.status("answering") as status:
        spoken, receipt = arms.answer(
            dict.fromkeys(arms.models, questions),
            sampling,
            system,
            progress=lambda arm, done, total: status.update(f"{arm}: {done} of {total} answers"),
        )
    found = arms.document(spoken, sampling)
    data_on_stdout = lines or as_json
    if not data_on_stdout:
        for record in found["prompts"]:
            show_prompt(record, found["arms"])
        show_legend(found)
    for line in receipt:
        (err if data_on_stdout else out).print(line, markup=False, soft_wrap=True)
    return found


def _show_lines(records: Sequence[dict[str, Any]]) -> None:
    import json

    from persona_probe.artifact import plain

    for record in records:
        out.file.write(json.dumps(plain(record), ensure_ascii=False) + "\n")


def _write(found: dict[str, Any] | None, out_file: Path | None, html: Path | None) -> None:
    from persona_probe.artifact import write_jsonl, write_text

    if found is None:
        return
    if out_file is not None:
        write_jsonl(out_file, found["prompts"])
        show_error(f"written: {out_file}")
    if html is not None:
        from persona_probe.report.answers import answers_page

        write_text(html, answers_page(found))
        show_error(f"written: {html}")
