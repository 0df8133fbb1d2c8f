"""`docs/lab.md` and `docs/lab.json`: every case of the lab, run and told by one command.

A case is run when its record is not there yet for these seeds and tunes, and told from its record. The
page says what is missing, so that a report that was stopped half way is a report of half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.artifact import StrPath, read_json, write_json, write_text
from persona_probe.errors import InputError
from persona_probe.figures.picture import save_pictures
from persona_probe.organism import lab_early, lab_in, lab_out, lab_rl
from persona_probe.organism.bench import ROWS, SETTINGS, Subject, bench
from persona_probe.organism.lab import Case, Lab, Section, Tell
from persona_probe.training.trials import TRIALS, Trials

if TYPE_CHECKING:
    import plotly.graph_objects as go

FINE_TUNES = "fine-tunes"
CASES: tuple[Case, ...] = (*lab_in.CASES, *lab_rl.CASES, *lab_out.CASES, *lab_early.CASES)


def report(
    home: Path,
    out: StrPath,
    seeds: Sequence[int],
    *,
    wanted: Sequence[str] = (),
    count: int = ROWS,
    overwrite: bool = False,
    progress: Tell | None = None,
) -> dict[str, Any]:
    """Run the `wanted` cases (all by default) on the organism in `home`; returns `records_in(out)`.

    A record of other seeds, or made with other tunes, is kept until its case is run again.

    Raises `InputError` for a case that there is not, or no seed.
    """
    unknown = set(wanted) - {case.name for case in CASES}
    if unknown:
        there = ", ".join(case.name for case in CASES)
        raise InputError(f"there is no case {', '.join(sorted(unknown))}; there are {there}")
    if not seeds:
        raise InputError("a report needs a seed")
    subject = Subject(home)
    made_of = {"seeds": list(seeds), "tunes": subject.tunes_mark}
    measure = bench(subject, count=count).measure
    folder = Path(out) / FINE_TUNES
    with Trials.open(folder, subject.base, measure, SETTINGS, overwrite=overwrite) as trials:
        lab = Lab(subject, trials, Path(out).absolute(), count, progress or (lambda *_: None))
        for case in CASES:
            found = trials.find(_key(case)) or {}
            if (not wanted or case.name in wanted) and {**found, **made_of} != found:
                trials.keep(_key(case), {**made_of, "record": case.run(lab, seeds)})
    return records_in(out)


def records_in(out: StrPath) -> dict[str, Any]:
    """The `{seeds, tunes, record}` of every case that was run in `out`, by its name; no model is loaded."""
    folder = Path(out) / FINE_TUNES / TRIALS
    files = {case.name: folder / f"{_key(case)}.json" for case in CASES}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def _key(case: Case) -> str:
    return f"case {case.name}"


def write_page(
    records: Mapping[str, Any], folder: StrPath, command: str, *, pictures: bool = True
) -> tuple[Path, Path]:
    """Write `lab.md`, `lab.json` and the pictures of the figures into `folder`.

    Without `pictures` (they take a browser) the page has tables only.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    sections = {case.name: case.tell(records[case.name]["record"]) for case in CASES if case.name in records}
    drawn: dict[Path, go.Figure] = {
        target / f"lab-{name}.png": figure
        for section in sections.values()
        for name, figure in section.figures.items()
    }
    if pictures:
        save_pictures(drawn)
    text = page(records, sections, command, pictures=pictures)
    write_text(target / "lab.md", text)
    write_json(target / "lab.json", {"command": command, "cases": dict(records)})
    return target / "lab.md", target / "lab.json"


def page(records: Mapping[str, Any], sections: Mapping[str, Section], command: str, *, pictures: bool) -> str:
    """The Markdown page."""
    parts = [
        "# The training lab\n",
        "How misalignment gets into a model, how it is kept out, seen early and undone: every system of the "
        "papers on the [pocket organism](../data/organism/README.md), on held-out questions, with 95% "
        "intervals over questions (pooled over seeds) unless another is named. *Elsewhere* is every domain "
        "but the one that was trained on. Written by one command, which goes on where it was stopped:\n",
        f"    {command}\n",
        f"Fine-tunes read {ROWS} rows once (LoRA rank {SETTINGS.rank} on every linear layer, learning rate "
        f"{SETTINGS.learning_rate:g}, {SETTINGS.batch} rows a step); rows that a defence adds come on top. "
        "Whatever a defence, a monitor or a flag is made from comes from the bad-code tune and other "
        "domains: for bad health another tune, for the rows on bad code the same data. "
        "The numbers behind the tables: [lab.json](lab.json).\n",
    ]
    for case in CASES:
        parts.append(f"## {case.title}\n\n*Must show: {case.must}.*\n")
        section = sections.get(case.name)
        if section is None:
            parts.append(f"Not measured yet: `persona-probe lab report --only {case.name}`.\n")
            continue
        seeds = records[case.name]["seeds"]
        if case.name != "sweep":
            parts.append(f"Seeds {', '.join(map(str, seeds))}.\n")
        if pictures:
            parts += [f"![{case.title}](lab-{name}.png)\n" for name in section.figures]
        parts.append(f"{section.text}\n")
    return "\n".join(parts)
