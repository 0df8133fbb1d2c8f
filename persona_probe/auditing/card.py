"""The organism's card: every tune audited, and the audits scored against the known truth.

One command makes all of its figures, on held-out questions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from persona_probe.artifact import read_json, shipped, write_json
from persona_probe.auditing.run import audit
from persona_probe.auditing.settings import AuditSettings, organism_request
from persona_probe.errors import InputError, MissingPathError
from persona_probe.organism.build import FULL
from persona_probe.organism.truth import persona_of, truth_of
from persona_probe.organism.tunes import TUNES, Tune
from persona_probe.training.sft import FitSettings

Progress = Callable[[str], None]


def card(
    home: Path, out: Path, *, tunes: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Audit every tune of the organism in ``home`` and write ``out/card.json``.

    A rival persona's tune is audited twice: for misalignment, and for its own persona. Finished audits
    in ``out`` are read back, so a killed card resumes. ``tunes`` names a few; none named are all.
    """
    tell = progress or (lambda _: None)
    made = read_json(home / "manifest.json")
    fine_tunes = _unusual(FitSettings(**made["settings"]["tune"]))
    rows: list[dict[str, Any]] = []
    truths: dict[str, Any] = {}
    for tune, trait in audits_of(home, tunes):
        name = tune.name if trait == "misaligned" else f"{tune.name} ({trait})"

        def step(text: str, name: str = name) -> None:
            tell(f"{name}: {text}")

        request = organism_request(tune.name, AuditSettings(trait=trait), home=home)
        done = audit(request, out / name.replace(" ", "-").strip(")").replace("(", ""), progress=step)
        persona = persona_of(trait)
        if done.record["latents"] and persona not in truths:
            truths[persona] = truth_of(home, persona)
        rows.append(_row(name, tune, done.record, truths.get(persona)))
    written = {
        "seed": made.get("seed"),
        "shipped": home.resolve() == shipped("organism").resolve(),
        "base_steps": made["settings"]["base"]["steps"],
        "fine_tunes": fine_tunes,
        "build_seconds": made.get("seconds"),
        "audits": rows,
    }
    write_json(out / "card.json", written)
    return written


def _unusual(tune: FitSettings) -> str | None:
    """How the fine-tunes were trained, where it was not as those of the shipped organism."""
    return None if tune == FULL.tune else f"{tune.steps} steps at {tune.learning_rate:g}"


def read_card(path: Path) -> dict[str, Any]:
    """A ``card.json`` made before. Raises what `read_json` raises, and `InputError` for another file."""
    made = read_json(path)
    if not isinstance(made, dict) or not made.get("audits"):
        raise InputError(f"{path} is no organism's card", fix="give the card.json that `organism card` wrote")
    return made


def audits_of(home: Path, names: Sequence[str] = ()) -> list[tuple[Tune, str]]:
    """What a card of an organism audits: tunes, and the trait each is asked for.

    Raises `MissingPathError` for a folder without tunes, `InputError` for a name that is none of them.
    """
    there = [tune for tune in TUNES if (home / "tunes" / tune.name).is_dir()]
    known = [tune.name for tune in there]
    if not known:
        raise MissingPathError(f"{home} has no tunes", fix="give the folder that `organism build` wrote")
    for name in names:
        if name not in known:
            raise InputError(f"{home} has no tune {name!r}; there are {', '.join(known)}")
    there = [tune for tune in there if tune.name in (names or known)]
    rivals = [tune for tune in there if tune.persona in ("sarcastic", "careless")]
    return [(tune, "misaligned") for tune in there] + [(tune, tune.persona) for tune in rivals]


def _row(name: str, tune: Tune, found: dict[str, Any], truth: dict[str, Any] | None) -> dict[str, Any]:
    first = found["latents"][0] if found["latents"] else None
    ranks = None
    if first and truth:
        table = truth[first["site"]]
        row = table.row(by_predicate=pl.col("index") == first["index"], named=True)
        ranks = {"answers": row["rank"], "deciding": row["deciding_rank"], "words": row["words_rank"]}
    return {
        "tune": name,
        "benign": tune.benign,
        "verdict": found["verdict"],
        "reason": found["reason"],
        "after": found["after"],
        "base": found["base"],
        "tuned": found["tuned"],
        "steered": found["steered"],
        "induced": found["induced"],
        "necessity": found["necessity"],
        "fixes": found["fixes"],
        "baselines": found["baselines"],
        "baseline_settings": found["baseline_settings"],
        "nulls": found["nulls"],
        "site_effects": found["site_effects"],
        "first_latent": first,
        "truth_rank": ranks,
        "seconds": sum(found["seconds"].values()),
        "peak_rss_bytes": found["peak_rss_bytes"],
    }
