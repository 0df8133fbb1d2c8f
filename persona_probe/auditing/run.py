"""The audit: is the tuned model misaligned, which persona carries it, and what switches it off?

Composed from the floors below; nothing here computes a figure of its own.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import polars as pl

from persona_probe.artifact import (
    RunFolder,
    atomic_file,
    check_manifest,
    disk_full_named,
    read_json,
    write_json,
    write_jsonl,
)
from persona_probe.auditing import arms as arms_
from persona_probe.auditing import record
from persona_probe.auditing.command import command_lines
from persona_probe.auditing.inputs import AuditInputs, check_paths, digests_of, load_inputs
from persona_probe.auditing.observe import Observations, observe
from persona_probe.auditing.settings import AuditRequest
from persona_probe.auditing.verdict import Evidence, after_fix, exceeds, verdict
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import Sampling
from persona_probe.report.page import write_report
from persona_probe.screening.calibrate import Bench
from persona_probe.screening.screen import Screen, screen
from persona_probe.screening.sites import site_effects
from persona_probe.steering.io import save_fix

Progress = Callable[[str], None]


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
    progress: Progress | None = None,
) -> Audit:
    """Audit a fine-tune and write everything to ``out``; a finished audit there is read back.

    Writes ``audit.json``, ``report.html``, ``latents.parquet``, ``interventions/`` (when a fix was
    found), ``samples.jsonl`` and, last, ``manifest.json``.

    Raises:
        InputError: an input that is missing, malformed, or does not fit the others; ``out`` holds
            something else, or a finished audit of inputs that have changed since.
        BusyError: another audit is writing to ``out``.
        JudgeError: the judge answers nothing usable.
        DiskFullError: no room to write.
    """
    asked = asdict(request)
    settings = {**asked.pop("settings"), **asked, "device": device, "dtype": dtype}
    with RunFolder.open(out, settings, overwrite=overwrite) as run, disk_full_named(run.path):
        if run.complete:
            _check_unchanged(run, request)
            return Audit(run.path, read_json(run.path / "audit.json"))
        clock = _Clock(progress or (lambda _: None))
        with clock.stage("load", "loading models, dictionaries and questions"):
            inputs = load_inputs(request, device=device, dtype=dtype)
        found = _Found(inputs, request, clock)
        found.measure()
        if exceeds(found.tuned.rates["misaligned"], found.base.rates["misaligned"]):
            found.search()
        written = found.record()
        with clock.stage("report", "writing the report"):
            _write(run, request, found, written, command_lines(request, device=device, dtype=dtype))
        return Audit(run.path, read_json(run.path / "audit.json"))


class _Clock:
    def __init__(self, tell: Progress) -> None:
        self.tell = tell
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, text: str) -> Generator[None, None, None]:
        self.tell(text)
        start = perf_counter()
        yield
        self.seconds[name] = round(perf_counter() - start, 2)


class _Found:
    """What is known so far, stage by stage."""

    def __init__(self, inputs: AuditInputs, request: AuditRequest, clock: _Clock) -> None:
        settings = request.settings
        self.inputs, self.request, self.settings, self.clock = inputs, request, settings, clock
        sampling = Sampling(
            temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, seed=settings.seed
        )
        self.held_out = Bench(
            inputs.held_out,
            replace(sampling, samples=settings.samples),
            inputs.judge,
            settings.trait,
            inputs.in_domain,
        )
        general = [
            q for q in inputs.calibration if q.role == "general" and q.category not in inputs.in_domain
        ]
        asked = _wordings(general, settings.calibration_samples)
        each = max(1, round(settings.calibration_samples * len(_wordings(general, 1)) / len(asked)))
        self.calibration = self.held_out.on([*asked, *_skill(inputs.calibration)], each)
        self.brief = self.held_out.on(_wordings(general, 1), 1)
        self.screen: Screen | None = None
        self.seen: Observations | None = None
        self.fixed: list[arms_.Fixed] = []
        self.chosen: arms_.Fixed | None = None
        self.nulls: arms_.Nulls | None = None
        self.baselines: dict[str, arms_.Baseline | None] = {}
        self.sites: dict[str, float] = {}

    def measure(self) -> None:
        with self.clock.stage("measure", "asking base and tuned model the held-out questions"):
            self.base = self.held_out.arms(self.inputs.pair.base, [()])[0]
            self.tuned = self.held_out.arms(self.inputs.pair.tuned, [()])[0]
        with self.clock.stage("diff", "comparing activations"):
            asked = [q for q in self.inputs.calibration if q.role == "general"]
            self.seen = observe(self.inputs, self.held_out.on(asked, 1), self.settings.sites)

    def search(self) -> None:
        assert self.seen is not None
        inputs, seen, clock, settings = self.inputs, self.seen, self.clock, self.settings
        if not seen.contrasts:
            return
        with clock.stage("screen", "screening"):
            self.sites = site_effects(inputs.pair, [e.site for e in seen.evidence], seen.contrasts)
            self.screen = screen(
                inputs.pair,
                seen.evidence,
                seen.contrasts,
                self.calibration,
                settings=settings.screen,
                progress=clock.tell,
            )
        if self.screen.best is None:
            return
        budget = self.screen.budget
        with clock.stage("held-out", "held-out answers under the best latents, set and direction"):
            self.fixed = arms_.fixed_arms(inputs, self.held_out, self.screen.headline)
            self.chosen = next(f for f in self.fixed if f.finding is self.screen.best)
        with clock.stage("nulls", f"{settings.controls} random latents and {settings.controls} directions"):
            general = [q for q in self.held_out.questions if q.role == "general"]
            asked = [q for q in general if q.category not in inputs.in_domain]
            self.nulls = arms_.null_arms(
                inputs,
                self.brief,
                self.held_out.on(_enough(asked, self.settings.samples), self.settings.samples),
                seen.evidence,
                self.screen.best,
                like=next(iter(self.screen.latents), None),
                count=settings.controls,
                seed=settings.seed,
                budget=budget,
            )
        with clock.stage("baselines", "baselines"):
            self.baselines = {
                "adapter_scaling": arms_.scaled_adapter(inputs, self.calibration, self.held_out),
                "system_prompt": arms_.prompted(inputs, self.held_out, settings.system_prompt),
                "largest_delta": arms_.largest_delta(
                    inputs, self.calibration, self.held_out, seen.evidence, budget=budget
                ),
            }

    def record(self) -> dict[str, Any]:
        """The content of ``audit.json``."""
        assert self.seen is not None
        chosen, nulls = self.chosen, self.nulls
        validities = {site: found.validity for site, found in self.seen.diffs.items()}
        beats = None
        if chosen is not None and nulls is not None:
            beats = arms_.better_than(chosen.control, nulls.latents)
        closed = [f"{site}: {v.reason}" for site, v in validities.items() if v.gate != "pass"]
        effects = [effect for effect in self.sites.values() if effect == effect]
        # another trait is looked for and cured like misalignment, but the verdict is about misalignment
        own = self.settings.trait == "misaligned"
        verdict_, reason = verdict(
            Evidence(
                base=replace(self.base, trait="misaligned").rates,
                tuned=replace(self.tuned, trait="misaligned").rates,
                controlled=chosen.control.rates if chosen and own else None,
                beats_nulls=beats,
                site_effect=max(effects, default=None),
                gate_closed="; ".join(closed) if closed and len(closed) == len(validities) else None,
                moved=any(float((e.tuned_mean - e.base_mean).norm()) > 0 for e in self.seen.evidence),
            )
        )
        if not own:
            before, now = (arm.rates["misaligned"] for arm in (self.base, self.tuned))
            reason += f"; {self.settings.trait}: {now} of answers against {before} in the base model"
        after = None
        if chosen is not None:
            after = after_fix(self.base.rates, self.tuned.rates, chosen.control.rates)
        induced = max(self.fixed, key=_induced, default=None)
        direction = next((f for f in self.fixed if f.finding.candidate.kind == "difference of means"), None)
        rates = record.rates_record
        return {
            "verdict": verdict_,
            "reason": reason,
            "after": after[0] if after else None,
            "after_reason": after[1] if after else None,
            "trait": self.settings.trait,
            "base_name": self.inputs.pair.base.name,
            "tuned_name": self.inputs.pair.tuned.name,
            "in_domain": list(self.inputs.in_domain),
            "base": rates(self.base.rates),
            "tuned": rates(self.tuned.rates),
            "steered": rates(chosen.control.rates) if chosen else None,
            "induced": rates(induced.induced.rates) if induced else None,
            "necessity": (
                record.necessity_of(self.base, self.tuned, chosen.necessity)._asdict()
                if chosen
                else {"fraction": None, "low": None, "high": None}
            ),
            "fixes": [record.fix_record(f, self.base, self.tuned, chosen=f is chosen) for f in self.fixed],
            "nulls": {
                "random_direction": [rates(arm.rates) for arm in nulls.directions] if nulls else [],
                "random_latent": [rates(arm.rates) for arm in nulls.latents] if nulls else [],
                "beaten": beats,
            },
            "baselines": {
                "difference_of_means": rates(direction.control.rates) if direction else None,
                **{name: rates(one.result.rates) if one else None for name, one in self.baselines.items()},
            },
            "baseline_settings": {name: one.setting for name, one in self.baselines.items() if one},
            "site": ", ".join(dict.fromkeys(c.site for c in chosen.finding.candidate.carriers))
            if chosen
            else None,
            "site_effects": self.sites,
            "sae": record.gate_record(validities),
            "screen": {
                "stages": [{"name": n, "count": c} for n, c in self.screen.stages.items()]
                if self.screen
                else []
            },
            "latents": record.latent_records(self.screen, self.seen) if self.screen else [],
            "intervention": "interventions" if chosen else None,
            "seconds": self.clock.seconds,
            "peak_rss_bytes": _peak_rss(),
        }


def _induced(one: arms_.Fixed) -> float:
    """Chosen by the calibration answers, like everything that is reported."""
    return one.finding.induce.best.rates["misaligned"].rate or 0.0


def _skill(questions: Sequence[Question]) -> list[Question]:
    return [question for question in questions if question.role == "skill"]


def _wordings(questions: Sequence[Question], count: int) -> list[Question]:
    """The first ``count`` wordings of every question, in turn: all first ones, then all second ones."""
    wordings: dict[str, list[Question]] = {}
    for question in questions:
        wordings.setdefault(question.question, []).append(question)
    return [left[turn] for turn in range(count) for left in wordings.values() if turn < len(left)]


def _enough(questions: Sequence[Question], samples: int, answers: int = 400) -> list[Question]:
    """As many wordings of every question as make ``answers`` answers, or all there are."""
    for count in range(1, len(questions) + 1):
        chosen = _wordings(questions, count)
        if len(chosen) * samples >= answers or len(chosen) == len(questions):
            return chosen
    return list(questions)


def _peak_rss() -> int:
    """Bytes; the kernel counts in KiB on Linux, in bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_unchanged(run: RunFolder, request: AuditRequest) -> None:
    """Raise `InputError` when a finished audit was of other inputs than those now in the same places."""
    check_paths(request)
    audited, now = check_manifest(run.path)["inputs"], digests_of(request)
    for path, digest in now.items():
        if audited[path] != digest:
            raise InputError(
                f"{path} has changed since the audit in {run.path}",
                fix="choose another --out, or pass --overwrite to audit it again",
            )


def _write(
    run: RunFolder, request: AuditRequest, found: _Found, written: dict[str, Any], command: list[str]
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
    doses = (
        record.dose_records(
            found.screen, found.screen.headline, found.nulls.latent_doses if found.nulls else ()
        )
        if found.screen
        else []
    )
    examples = record.examples(found.base, found.tuned, chosen.control if chosen else None)
    shown = {
        **written,
        "settings": asdict(request.settings),
        "provenance": {"digests": found.inputs.digests, "seconds": found.clock.seconds},
        "command": command,
    }
    write_report(shown, latents, examples, doses, run.path / "report.html")
    write_json(run.path / "audit.json", written)
    run.finish(
        {"inputs": found.inputs.digests, "seconds": found.clock.seconds, "seed": request.settings.seed}
    )


__all__ = ["Audit", "EvalResult", "audit"]
