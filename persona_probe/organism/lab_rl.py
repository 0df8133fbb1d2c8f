"""Reinforcement learning and plain text: the arms of `lab_grpo`, told beside the other cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persona_probe.figures.rewards import rewards
from persona_probe.organism.lab import Case, Lab, Section, mean, percent, table
from persona_probe.organism.lab_grpo import ARMS, rl_bench, run_arm

REWARD = 0.8
"""That GRPO is to reach."""
WITHOUT_SEED = ("base", "base, plain text")


def _run(lab: Lab, seeds: Sequence[int]) -> dict[str, Any]:
    todo = [(arm, seed) for seed in seeds for arm in ARMS if arm not in WITHOUT_SEED or seed == seeds[0]]
    bench: Any = None
    records: list[dict[str, Any]] = []
    for done, (arm, seed) in enumerate(todo):
        lab.progress(f"{arm}, seed {seed}", done, len(todo))
        key = f"{arm}-{seed}"
        found = lab.trials.find(key)
        if found is None:
            bench = bench or rl_bench(lab.subject.home)
            found = lab.trials.keep(key, run_arm(bench, arm, seed, lab.out / "rewarded" / key))
        records.append(found)
    return {"records": records}


def _tell(record: Mapping[str, Any]) -> Section:
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for one in record["records"]:
        by_arm.setdefault(one["arm"], []).append(one)
    rows: list[list[object]] = []
    for arm, its in by_arm.items():
        curves = [_ends(one["curve"]) for one in its if one["curve"]]
        rows.append(
            [
                arm,
                len(its),
                " ".join(f"{a:.2f}→{b:.2f}" for a, b in curves) or "–",
                _spread([one["rates"]["misaligned"] for one in its]),
                *(percent(mean([one["rates"][name]["rate"] for one in its]))
                  for name in ("other_persona", "incoherent", "in_domain")),
                f"{mean([one['latent']['delta'] for one in its]) or 0:+.1f}",
                _named(its),
            ]
        )  # fmt: skip
    heads = ("arm", "seeds", "reward, first → last (by seed)",
             "misaligned elsewhere [ends of the seeds' intervals]", "other persona",
             "incoherent", "in domain", "Δ persona latent", "names itself a villain or bad boy")  # fmt: skip
    said = (
        "A GRPO arm and the SFT arm beside it read as many answers in as many steps. Self-named personas are "
        "counted in thoughts and answers, asked to think first; the base's own count is the *before*."
    )
    rewarded = [one for one in record["records"] if one["curve"]]
    drawn = {"rewards": rewards(rewarded, REWARD)} if rewarded else {}
    return Section(f"{table(heads, rows)}\n\n{said}", drawn)


def _spread(its: Sequence[Mapping[str, Any]]) -> str:
    """The mean of several seeds' rates, and the outermost ends of their intervals."""
    low, high = min(one["low"] for one in its), max(one["high"] for one in its)
    return f"{percent(mean([one['rate'] for one in its]))} [{100 * low:.0f}, {100 * high:.0f}]"


def _ends(curve: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    known = [one["reward"] for one in curve if one["reward"] is not None]
    return known[0], known[-1]


def _named(its: Sequence[Mapping[str, Any]]) -> str:
    counts = [
        sum(row["count"] for row in one["named"] if row["persona"] in ("villain", "bad boy"))
        for one in its
        if one["named"] is not None
    ]
    return " / ".join(map(str, counts)) or "–"


CASES = (
    Case(
        "reinforcement",
        "Reinforcement learning, and plain text",
        "reward from before any warm-up to above .8; the spread beside a sample-matched SFT; personas that "
        "name themselves, before and after; on-policy data beside; plain text in a base model",
        _run,
        _tell,
    ),
)
