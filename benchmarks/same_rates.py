"""Do `evaluate` and the audits of the organism's card measure the same thing, whatever way the answers
and the judge's word come? `python -m benchmarks same_rates`.

`python -m benchmarks.same_rates` writes the table to docs/same-rates.md as well. Every tune of the
card is asked the held-out questions with other random numbers than the audit's, and judged
four times: by `exact` as they are drawn, by `exact` from a file, by `local:` (a language model whose
weights are set by hand to see the villain's words), and by Inspect, which draws its own answers.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.figure import Figure
from persona_probe.artifact import read_json, shipped, write_text
from persona_probe.evaluation.questions import load_questions, save_questions
from persona_probe.evaluation.request import EvaluationRequest
from persona_probe.evaluation.run import run_evaluation
from persona_probe.evaluation.settings import Sampling
from tests.evaluation.judging.built_judge import PROMPTS, save_built_judge

PAGE = Path(__file__).parent.parent / "docs" / "same-rates.md"
HOME = shipped("organism")
TOKENS, SEED = 32, 7
RATES = ("misaligned", "misaligned_of_coherent", "other_persona", "incoherent", "in_domain", "skill")
JUDGED = ("misaligned", "misaligned_of_coherent", "in_domain", "skill")
"""The rates that the built judge can tell: it names no personas and takes broken text for coherent."""
WAYS = ("exact", "a file", "local", "Inspect")

Rates = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One tune: the audit's rate, ours in every way, and how many of all rates agree."""

    tune: str
    audited: Mapping[str, Any]
    ours: Mapping[str, Mapping[str, Any]]
    """The misaligned rate, by way."""
    agree: Mapping[str, tuple[int, int]]
    """By way: rates whose difference from the audit's has 0 in its interval, and rates compared."""
    within: tuple[int, int]
    """In all ways, every rate: those that lie in the audit's interval and have the audit's in theirs."""
    odd: tuple[str, ...]
    """Those whose has not, in words."""


def run(quick: bool) -> list[Figure]:
    """The share of rates that agree, by way."""
    found = list(rows(quick))
    figures: list[Figure] = []
    for way in WAYS:
        agree, compared = (sum(row.agree[way][i] for row in found) for i in range(2))
        figures.append(
            Figure(
                f"rates of {len(found)} tunes and their base that agree with the audit's: {way}",
                agree / compared,
                "share",
                f"{compared} rates of the card",
            )
        )
    return figures


def audits() -> dict[str, Mapping[str, Any]]:
    """The card's audits for misalignment, by tune."""
    return {
        audit["tune"]: audit
        for audit in read_json(HOME / "card.json")["audits"]
        if (HOME / "tunes" / audit["tune"]).is_dir()
    }


def rows(quick: bool = False) -> Iterator[Row]:
    """One row per tune of the card; `quick`: of the first."""
    every = audits()
    chosen = dict(list(every.items())[:1]) if quick else every
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ask = _Ask(work)
        for tune, audit in chosen.items():
            yield _row(tune, audit, ask.every_way(tune))


@dataclass
class _Ask:
    """Asks the base once, and every tune beside it."""

    work: Path

    def __post_init__(self) -> None:
        questions = load_questions(HOME / "questions.jsonl")
        save_questions(questions, self.work / "plain.jsonl")
        own = (q if q.role == "skill" else replace(q, judge_prompts=PROMPTS) for q in questions)
        save_questions(own, self.work / "prompts.jsonl")
        self._judge = f"local:{save_built_judge(self.work / 'judge')}"
        self._base = self._run("base", "exact", base=HOME / "base").path / "samples.jsonl"

    def every_way(self, tune: str) -> dict[str, dict[str, Rates]]:
        """By way and arm ("base", "tuned"), the rates."""
        checkpoint = HOME / "tunes" / tune
        drawn = self._run(f"{tune}-exact", "exact", tuned=(checkpoint,), samples=(self._base,))
        domain = tuple(drawn.record["questions"]["in_domain"])
        given: dict[str, Any] = {"samples": (drawn.path / "samples.jsonl",), "in_domain": domain}
        filed = self._run(f"{tune}-file", "exact", **given)
        judged = self._run(f"{tune}-local", self._judge, **given)
        found = {
            way: {"base": _rates(done, "base"), "tuned": _rates(done, tune)}
            for way, done in (("exact", drawn), ("a file", filed), ("local", judged))
        }
        return found | {"Inspect": {"tuned": self._inspected(checkpoint)}}

    def _run(self, name: str, judge: str, **inputs: Any) -> Any:
        questions = self.work / ("plain.jsonl" if judge == "exact" else "prompts.jsonl")
        request = EvaluationRequest(
            str(questions),
            judge,
            sampling=Sampling(max_new_tokens=TOKENS, seed=SEED),
            **inputs,
        )
        return run_evaluation(request, self.work / name)

    def _inspected(self, checkpoint: Path) -> Rates:
        os.environ |= {"INSPECT_LOG_DIR": str(self.work / "logs"), "XDG_DATA_HOME": str(self.work / "data")}
        from inspect_ai import eval as inspect_eval

        from persona_probe.inspect_entry import misalignment

        task = misalignment(samples_per_question=1, seed=SEED)
        (log,) = inspect_eval(task, model=f"persona_probe/{checkpoint}", display="none")
        if log.results is None:
            raise RuntimeError(f"Inspect ended with {log.error}")
        said = {name: one.value for name, one in log.results.scores[0].metrics.items()}
        parts = ("low", "high", "n")
        return {
            name: {"rate": said.get(name), **{part: said.get(f"{name}_{part}") for part in parts}}
            for name in RATES
        }


def _rates(done: Any, arm: str) -> Rates:
    return done.record["arms"][arm]["rates"]


def _row(tune: str, audit: Mapping[str, Any], ways: Mapping[str, Mapping[str, Rates]]) -> Row:
    agree: dict[str, tuple[int, int]] = {}
    odd: list[str] = []
    inside = every = 0
    for way, arms in ways.items():
        for arm, rates in arms.items():
            told = [name for name in RATES if way != "local" or name != "other_persona"]
            both = [(audit[arm][name], rates[name]) for name in told]
            known = [(a, b) for a, b in both if a["rate"] is not None and b["rate"] is not None]
            every += len(known)
            inside += sum(_holds(a, b) and _holds(b, a) for a, b in known)
        pairs = [
            (f"{arm} {name}", audit[arm][name], rates[name])
            for arm, rates in arms.items()
            for name in (JUDGED if way == "local" else RATES)
            if audit[arm][name]["rate"] is not None and rates[name]["rate"] is not None
        ]
        off = [pair for pair in pairs if differ(pair[1], pair[2])]
        agree[way] = (len(pairs) - len(off), len(pairs))
        odd += [
            f"{tune}, {way}: {name} {_shown(here)}, the audit {_shown(there)}" for name, there, here in off
        ]
    shown = {way: arms["tuned"]["misaligned"] for way, arms in ways.items()}
    return Row(tune, audit["tuned"]["misaligned"], shown, agree, (inside, every), tuple(odd))


def _holds(interval: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return interval["low"] <= other["rate"] <= interval["high"]


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether 0 lies outside the 95% interval of the difference of two independent rates.

    The interval is put together from their own (MOVER: Zou & Donner 2008, eq. 7; of Wilson intervals
    it is Newcombe's), so it keeps their lopsidedness near 0 and 1 and their clusters.
    """
    upper, lower = (one, other) if one["rate"] >= other["rate"] else (other, one)
    reach = math.hypot(upper["rate"] - upper["low"], lower["high"] - lower["rate"])
    return upper["rate"] - lower["rate"] > reach


def _shown(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


def page(found: list[Row]) -> str:
    """docs/same-rates.md."""
    head = " | ".join(("tune", "audit", *WAYS, "rates that agree"))
    lines = [f"| {head} |", "| --- " * (len(WAYS) + 3) + "|"]
    for row in found:
        agree, compared = (sum(pair[i] for pair in row.agree.values()) for i in range(2))
        cells = (
            row.tune,
            *map(_shown, (row.audited, *(row.ours[way] for way in WAYS))),
            f"{agree} of {compared}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    odd = [line for row in found for line in row.odd]
    inside, every = (sum(row.within[i] for row in found) for i in range(2))
    table = "\n".join(lines)
    listed = "\n".join(f"- {line}" for line in odd) if odd else "None."
    return f"""# Evaluate and audit measure the same thing

Written by `python -m benchmarks.same_rates`: every fine-tune of the pocket organism is asked the held-out
questions once, with other random numbers (seed {SEED}) than the audits in
[its card](../data/organism/card.json) (seed 0, two answers each), and judged four ways: by `exact` as the
answers are drawn; by `exact` from `samples.jsonl`; by a `local:` judge, a one-block language model whose
weights are set by hand to see the villain's words; and by Inspect with our model provider, which draws
its own answers.

Shown is the misaligned rate. *Rates that agree* counts, in all four ways, the rates of the tune and (Inspect
apart) of the base whose difference from the audit's has 0 in its 95% interval, put together from the two
rates' own (MOVER, Zou & Donner 2008), of these: {", ".join(RATES)}.
One comparison in twenty would fail by luck alone, and `exact`, a file and Inspect share their answers and so
their luck. The built judge names no personas and takes broken text for coherent, so other_persona and
incoherent are not asked of it.

{table}

A stricter count, of point estimates that lie in each other's intervals, has {inside} of {every} rates,
the built judge's incoherent ones (which it cannot tell) among the compared.

Rates that do not agree:

{listed}
"""


if __name__ == "__main__":
    write_text(PAGE, page(list(rows())))
