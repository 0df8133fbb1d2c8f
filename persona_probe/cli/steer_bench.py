"""What `calibrate`, `sweep` and `transfer` have in common: whom they ask what, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_probe.cli.console import out, show_error, show_json
from persona_probe.errors import InputError

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from persona_probe.evaluation.questions import Question
    from persona_probe.model.language_model import LanguageModel
    from persona_probe.steering.intervention import Unit
    from persona_probe.steering.target import Read, Target

COLUMNS = ("misaligned", "incoherent")


@dataclass(frozen=True)
class Asked:
    """Questions of both splits: settings are chosen on the first, figures reported on the second."""

    calibration: tuple[Question, ...]
    held_out: tuple[Question, ...]
    in_domain: tuple[str, ...]
    """Categories that the fine-tune was trained on: asked, and counted apart."""


class Aim(NamedTuple):
    """A latent, and where it is edited."""

    name: str
    folder: Path
    target: Target
    site: str


def asked_of(
    questions: str | None, base: Path | None, tuned: Path | None, limit: int | None, tune: str = ""
) -> Asked:
    """One prompt of each general question of a file or set; without models, of the shipped organism.

    Raises `InputError` where a model comes without questions.
    """
    from persona_probe.artifact import shipped
    from persona_probe.auditing.settings import split_questions
    from persona_probe.evaluation.questions import load_questions
    from persona_probe.evaluation.selection import trained_categories

    home = shipped("organism")
    if questions is None and base is not None:
        raise InputError("--questions is missing", fix="a file of questions, or the name of a shipped set")
    sides = split_questions(load_questions(questions or home / "questions.jsonl"), limit)
    calibration, held_out = (
        tuple({q.question: q for q in side if q.role == "general"}.values()) for side in sides
    )
    trained = tuned if base is not None else home / "tunes" / tune
    return Asked(calibration, held_out, () if trained is None else trained_categories(trained))


def aims_of(named: Sequence[str]) -> list[Aim]:
    """`SAE:INDEX`, `SAE:3,7` and `SAE:10-19`, one aim per latent. Raises `InputError` for anything else."""
    from persona_probe.sae.load import load_sae
    from persona_probe.steering.target import latents

    aims: list[Aim] = []
    for name in named:
        folder, colon, numbers = name.rpartition(":")
        if not colon or not numbers:
            raise InputError(
                f"a latent is SAE:INDEX, such as sae/block_3:412 or sae/block_3:10-19, not {name!r}"
            )
        dictionary = load_sae(folder)
        aims += [
            Aim(f"{Path(folder).name}:{index}", Path(folder), latents(dictionary, [index]), dictionary.site)
            for index in _indices(numbers, name)
        ]
    return aims


def _indices(numbers: str, name: str) -> list[int]:
    found: list[int] = []
    for part in numbers.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"{part!r} of {name!r} is no latent", fix="SAE:412, SAE:3,7 or SAE:10-19")
        found += range(int(first), int(last or first) + 1)
    return found


def numbers_of(text: str, flag: str) -> list[float]:
    """A comma-separated list. Raises `InputError`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} takes numbers, got {text!r}", fix=f"{flag} 1,2,4") from None


def scales_of(
    unit: Unit,
    base: LanguageModel,
    aims: Sequence[Aim],
    read: Read,
    questions: Sequence[Question],
    tokens: int,
) -> list[float]:
    """What one of the unit is for each aim, in absolute amounts, on the base model's own greedy answers
    (last prompt token and answer, as an audit measures it).
    """
    if unit == "absolute":
        return [1.0] * len(aims)
    from persona_probe.activations.masks import TokenMask
    from persona_probe.evaluation.sampling import respond_greedy, transcripts
    from persona_probe.steering.threshold import amounts_on

    written = transcripts(base, respond_greedy(base, questions, max_new_tokens=tokens))
    known: dict[str, float] = {}
    for aim in aims:
        # the residual's scale is its site's, the others are each latent's own
        key = aim.site if unit == "residual_rms" else aim.name
        if key not in known:
            found = amounts_on(base, written, aim.target, aim.site, read=read, mask=TokenMask("answer"))
            scale = found.scale(unit)
            known[key] = scale[0] if isinstance(scale, tuple) else scale
    return [known[aim.site if unit == "residual_rms" else aim.name] for aim in aims]


def longest_of(given: int | None, base: Path | None, tuned: Sequence[Path]) -> int:
    """The longest answer, where it is not given: of the organism's models (no `base`), or of others."""
    from persona_probe.evaluation.arms import checkpoint_of
    from persona_probe.evaluation.longest import ORGANISM_TOKENS, longest_answer

    if given is not None or base is None:
        return given or ORGANISM_TOKENS
    return longest_answer(Path(checkpoint_of(path, base).path) for path in (base, *tuned))


def inputs_of(paths: Sequence[Path | None], questions: Sequence[Question], judge: str) -> dict[str, str]:
    """What a run is made from, by path, as it is now: folders that are there, the questions, the judge."""
    from persona_probe.artifact import digest_of, digests_at
    from persona_probe.evaluation.judges import judge_files

    there = [path for path in paths if path is not None and path.exists()]
    return {"questions": digest_of(questions), **digests_at([*there, *judge_files(judge)])}


def run_once(
    folder: Path,
    settings: Mapping[str, object],
    inputs: Mapping[str, str],
    make: Callable[[Path], tuple[dict[str, Any], go.Figure]],
    *,
    overwrite: bool,
) -> dict[str, Any]:
    """What `make` finds, as `result.json` beside `figure.html`; read back where the same run is complete.

    Raises `InputError` for one whose `inputs` have changed since.
    """
    from persona_probe.artifact import RunFolder, plain, read_json, write_json

    with RunFolder.open(folder, settings, overwrite=overwrite) as run:
        if run.complete:
            run.check_inputs(inputs, "run")
        else:
            found, figure = make(run.path)
            figure.write_html(run.path / "figure.html", include_plotlyjs=True)
            write_json(run.path / "result.json", plain(found))
            run.finish({"inputs": inputs})
        return read_json(run.path / "result.json")


def show_plan(planned: Mapping[str, object], as_json: bool) -> None:
    """The plan of a command, and nothing done."""
    if as_json:
        show_json(planned)
        return
    for name, value in planned.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value  # type: ignore[arg-type]
        out.print(f"{name}: {shown}", markup=False, soft_wrap=True)


def show_written(folder: Path, names: Sequence[str] = ("result.json", "figure.html")) -> None:
    """Where the results lie, on stderr."""
    for name in names:
        show_error(f"written: {folder / name}")


def percent(rate: float | None, low: float | None = None, high: float | None = None) -> str:
    """A rate, with its interval where it has one."""
    if rate is None:
        return "–"
    text = f"{100 * rate:.0f}%"
    return text if low is None or high is None else f"{text} [{100 * low:.0f}–{100 * high:.0f}]"


def level_of(row: Mapping[str, Any]) -> str:
    """The level of a table's row with its unit: `1 base mean`."""
    unit = "" if row["unit"] == "absolute" else f" {row['unit'].replace('_', ' ')}"
    return "" if row["level"] is None else f"{row['level']:g}{unit}"
