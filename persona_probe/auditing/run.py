"""The audit: is the tuned model misaligned, which persona carries it, and what switches it off?

Composed from the floors below; nothing here computes a figure of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from persona_probe.artifact import (
    RunFolder,
    atomic_file,
    disk_full_named,
    read_json,
    write_json,
    write_jsonl,
)
from persona_probe.auditing import record
from persona_probe.auditing.cards import latent_cards
from persona_probe.auditing.command import command_lines
from persona_probe.auditing.contract import audit_record
from persona_probe.auditing.inputs import check_paths, digests_of, load_inputs
from persona_probe.auditing.inquiry import Clock, Inquiry, Progress
from persona_probe.auditing.kept import Kept
from persona_probe.auditing.settings import AuditRequest
from persona_probe.auditing.verdict import exceeds
from persona_probe.evaluation.judges import spec_identity
from persona_probe.report.page import write_report
from persona_probe.steering.io import save_fix


@dataclass(frozen=True, eq=False)
class Audit:
    """A finished audit. ``record`` is the content of ``audit.json``."""

    path: Path
    record: dict[str, Any]

    @property
    def verdict(self) -> str:
        return str(self.record["verdict"])

    @property
    def after(self) -> str | None:
        return self.record["after"]

    def _repr_html_(self) -> str:
        from persona_probe.report.card import audit_card

        return audit_card(self.record)


def audit(
    request: AuditRequest,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit a fine-tune and write everything to ``out``; a finished audit there is read back, and one
    that was stopped goes on where it was.

    Writes ``audit.json``, ``report.html``, ``latents.parquet``, ``interventions/`` (when a fix was
    found), ``latent_cards.json`` (what the latents of the fix fire on), ``samples.jsonl``, ``judge.jsonl``
    (a model judge's raw replies, which a rerun does not ask for again) and, last, ``manifest.json``.
    ``batch_size`` is how many answers are drawn at once; by default as many as fit in memory.

    Raises:
        InputError: an input that is missing, malformed, or does not fit the others; ``out`` holds
            something else, or a finished audit of inputs that have changed since.
        BusyError: another audit is writing to ``out``.
        JudgeError: the judge cannot be reached, refuses the key, or answers nothing usable.
        DiskFullError: no room to write.
    """
    request = request.settled()
    asked = asdict(request)
    asked["judge"] = spec_identity(request.judge)  # how fast it is asked changes no figure
    settings = {**asked.pop("settings"), **asked, "device": device, "dtype": dtype}
    with RunFolder.open(out, settings, overwrite=overwrite) as run, disk_full_named(run.path):
        if run.complete:
            check_paths(request)
            run.check_inputs(digests_of(request), "audit")
            return Audit(run.path, read_json(run.path / "audit.json"))
        clock = Clock(progress or (lambda _: None))
        with clock.stage("load", "loading models, dictionaries and questions"):
            inputs = load_inputs(request, device=device, dtype=dtype, judge_record=run.path / "judge.jsonl")
        kept = Kept(run, inputs.digests, batch_size=batch_size, progress=clock.count)
        found = Inquiry(inputs, request, clock, kept)
        found.measure()
        if exceeds(found.tuned.rates["misaligned"], found.base.rates["misaligned"]):
            found.search()
        written = audit_record(found)
        with clock.stage("report", "writing the report"):
            _write(run, request, found, written, command_lines(request, device=device, dtype=dtype))
        return Audit(run.path, read_json(run.path / "audit.json"))


def _write(
    run: RunFolder, request: AuditRequest, found: Inquiry, written: dict[str, Any], command: list[str]
) -> None:
    assert found.seen is not None
    chosen = found.chosen
    latents = written["latents"]
    if found.seen.diffs:
        tables = [
            table.table.with_columns(pl.lit(site).alias("site")) for site, table in found.seen.diffs.items()
        ]
        with atomic_file(run.path / "latents.parquet") as file:
            pl.concat(tables).write_parquet(file)
    if chosen is not None:
        fix = chosen.finding.candidate.cure(*chosen.finding.cure.best.knob)
        save_fix(fix, run.path / "interventions", overwrite=True)
    named = [("base", found.base), ("tuned", found.tuned)]
    named += [("steered", chosen.control)] if chosen else []
    write_jsonl(
        run.path / "samples.jsonl",
        [{"arm": name, **row} for name, result in named for row in result.records()],
    )
    doses: list[dict[str, Any]] = []
    if found.screen:
        one_a_kind = {one.candidate.kind: one for one in reversed(found.screen.headline)}
        controls = found.nulls.latent_doses if found.nulls else ()
        doses = record.dose_records(found.screen, list(one_a_kind.values())[::-1], controls)
    cards = latent_cards(found, latents, doses)
    if cards:
        write_json(run.path / "latent_cards.json", cards)
    examples = record.examples(found.base, found.tuned, chosen.control if chosen else None)
    shown = {
        **written,
        "settings": asdict(request.settings),
        "provenance": {"digests": found.inputs.digests, "seconds": found.clock.seconds},
        "cards": cards,
        "command": command,
    }
    write_report(shown, latents, examples, doses, run.path / "report.html")
    write_json(run.path / "audit.json", written)
    run.finish(
        {"inputs": found.inputs.digests, "seconds": found.clock.seconds, "seed": request.settings.seed}
    )
