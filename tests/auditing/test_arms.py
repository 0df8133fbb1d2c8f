"""The arms beside the winner: what each is an answer of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import persona_probe.evaluation.arms as evaluation_arms
from persona_probe.auditing import arms
from persona_probe.auditing.arms import SCALES, scaled_adapter
from persona_probe.auditing.inputs import AuditInputs, load_inputs
from persona_probe.evaluation.result import EvalResult
from persona_probe.evaluation.sampling import Sampling
from persona_probe.screening.calibrate import Bench, Budget, Dose, Knob, Setting, whole
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.screening.screen import Finding
from tests.auditing.planted import Planted, request_of
from tests.model.tiny_models import save_adapter
from tests.screening.conftest import SITES, make_evidence


def bench_of(inputs: AuditInputs) -> Bench:
    """Held-out questions, and the answers of both models at hand, as they are in an audit."""
    sampling = Sampling(temperature=1.0, max_new_tokens=6, samples=1)
    bench = Bench(inputs.held_out, sampling, inputs.judge, in_domain=inputs.in_domain)
    return bench.knowing(*((lm, bench.unsteered(lm)) for lm in (inputs.pair.base, inputs.pair.tuned)))


@pytest.mark.parametrize("merge_below", [evaluation_arms.MERGE_BELOW, 0])
def test_an_adapter_is_turned_down_whether_it_is_merged_or_not(
    organism: Planted, merge_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_arms, "MERGE_BELOW", merge_below)
    inputs = load_inputs(request_of(organism))
    assert (inputs.pair.tuned is inputs.adapter) == (merge_below == 0)
    assert inputs.adapter is not None
    bench = bench_of(inputs)
    merits: dict[float, float] = {}
    for scale in SCALES:
        with inputs.adapter.adapter_scaled(scale):
            plain = replace(bench, known=())
            merits[scale] = whole(plain.arms(replace(inputs.adapter), [()])[0].rates)
    assert merits[0.75] < merits[0.0]
    found = scaled_adapter(inputs, bench, bench)
    assert found is not None
    chosen = float(found.setting.removeprefix("adapter x "))
    assert whole(found.result.rates) == merits[chosen] >= max(merits.values()) - 0.03


def test_an_adapter_that_is_not_linear_is_not_turned_down(organism: Planted, tmp_path: Path) -> None:
    tuned = save_adapter(tmp_path / "dora", organism.base, use_dora=True)
    inputs = load_inputs(replace(request_of(organism), tuned=tuned))
    assert inputs.adapter is None
    assert scaled_adapter(inputs, bench_of(inputs), bench_of(inputs)) is None


def test_controls_are_shaped_like_the_winner_and_hold_nothing_that_was_found(
    organism: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Candidate, set[tuple[str, int | None]]]] = []

    def drawn(_evidence: object, like: Candidate, _count: int, *, seed: int, exclude: Any) -> list[Candidate]:
        asked.append((like, set(exclude)))
        return []

    monkeypatch.setattr(arms, "random_latents", drawn)
    monkeypatch.setattr(arms, "random_directions", lambda *_, **__: [])
    evidence = make_evidence(SITES[0])
    inputs = load_inputs(request_of(organism))
    bench = bench_of(inputs)

    def finding(*carriers: Carrier) -> Finding:
        candidate = Candidate("set" if len(carriers) > 1 else "latent", carriers)
        result = EvalResult((), ())
        setting = Setting(Knob(1.0, "all"), result, True)
        dose = Dose(candidate, (setting,), setting)
        return Finding(candidate, dose, dose, None, None)

    one, pair = finding(evidence.latent(3)), finding(evidence.latent(5), evidence.latent(8))
    direction = finding(replace(evidence.latent(1), index=None))
    for winner, like in ((pair, pair), (direction, one)):
        arms.null_arms(
            inputs, bench, bench.on(bench.questions[:1], 1), [evidence], winner,
            latents=[one], count=2, seed=0, budget=Budget(0.1),
        )  # fmt: skip
        assert asked[-1][0] is like.candidate
        assert {(SITES[0], 3)} <= asked[-1][1]
