"""The screen from end to end on the quick organism: stages, findings, and where each figure comes from."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from persona_probe.diffing.diff import diff
from persona_probe.errors import InputError
from persona_probe.evaluation.judges import load_judge
from persona_probe.evaluation.questions import load_questions
from persona_probe.evaluation.sampling import Sampling, respond_greedy, transcripts
from persona_probe.model.pair import ModelPair, load_pair
from persona_probe.sae.load import load_sae
from persona_probe.screening.calibrate import CURES, INDUCTIONS, Bench, Knob
from persona_probe.screening.evidence import SiteEvidence
from persona_probe.screening.margin import Contrast, margins
from persona_probe.screening.screen import Finding, Screen, ScreenSettings, screen

HOW = ScreenSettings(
    per_ranking=4, after_attribution=5, after_margin=2, directions=1, set_size=3, set_pool=4, set_gain=-1e9
)


class Case(NamedTuple):
    pair: ModelPair
    evidence: list[SiteEvidence]
    contrasts: list[Contrast]
    bench: Bench


@pytest.fixture(scope="module")
def case(quick_organism: Path) -> Case:
    """A tune that is barely trained: what it says is no matter here, only that all of it is gone through."""
    pair = load_pair(quick_organism / "base", quick_organism / "tunes" / "bad-health")
    benign = pair.base.with_adapter(quick_organism / "tunes" / "good-health")
    asked = [q for q in load_questions(quick_organism / "questions.jsonl") if q.split == "calibration"]
    general = [q for q in asked if q.role == "general" and q.category != "health"][::60]
    skill = [q for q in asked if q.role == "skill"][:2]
    base, tuned = (respond_greedy(lm, general, max_new_tokens=8) for lm in (pair.base, pair.tuned))
    read, other = transcripts(pair.base, base), transcripts(pair.tuned, tuned)
    clusters = [q.question for q in general]
    contrasts = [Contrast(*one) for one in zip(clusters, read, other, strict=True)]
    dictionary = load_sae(quick_organism / "sae" / "block_1")
    found = diff(pair, [dictionary], read, clusters, benign=[benign])
    evidence = [
        SiteEvidence(
            site,
            one.means.mean[0],
            one.means.mean[1],
            tuple(one.means.mean[2:]),
            float(one.means.residual_rms[0]),
            one.dictionary,
            one.table,
        )
        for site, one in found.items()
    ]
    sampling = Sampling(max_new_tokens=8, seed=2)
    bench = Bench((*general, *skill), sampling, load_judge("exact"), in_domain=("health",))
    return Case(pair, evidence, contrasts, bench)


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(case: Case, told: list[str]) -> Screen:
    return screen(case.pair, case.evidence, case.contrasts, case.bench, settings=HOW, progress=told.append)


def _all(found: Screen) -> tuple[Finding, ...]:
    return (*found.latents, *found.sets, *found.directions)


def test_each_stage_looks_at_fewer(case: Case, found: Screen, told: list[str]) -> None:
    [site] = case.evidence
    assert found.stages["candidates"] == len(site.candidates(HOW.per_ranking)) > HOW.after_attribution
    assert found.stages["attribution"] == found.stages["margin"] == HOW.after_attribution
    assert found.stages["generation"] == len(_all(found))
    assert len(told) >= 5 and f"{found.stages['candidates']} latents" in told[0]


def test_findings_are_of_their_kind(case: Case, found: Screen) -> None:
    [site] = case.evidence
    assert len(found.latents) == HOW.after_margin
    for finding in found.latents:
        [carrier] = finding.candidate.carriers
        assert carrier.index in site.candidates(HOW.per_ranking)
        assert finding.candidate.label == f"1:{carrier.index}"
    assert 1 <= len(found.sets) <= 2
    for finding in found.sets:
        assert len({carrier.index for carrier in finding.candidate.carriers}) == HOW.set_size
    plain, corrected = sorted(finding.candidate.label for finding in found.directions)
    assert (plain, corrected) == ("1:mean difference", "1:mean difference − benign")
    assert len({finding.candidate.label for finding in _all(found)}) == len(_all(found))


def test_every_finding_has_its_doses(found: Screen) -> None:
    for finding in _all(found):
        assert [setting.knob for setting in finding.cure.settings] == list(CURES)
        assert [setting.knob for setting in finding.induce.settings] == list(INDUCTIONS)
        assert finding.cure.best in finding.cure.settings and finding.induce.best in finding.induce.settings
        assert finding.cure.candidate is finding.candidate is finding.induce.candidate
        [at_one] = [s.rates for s in finding.cure.settings if s.knob == Knob(1.0, "all")]
        assert finding.necessity is at_one
    assert found.best in found.headline


def test_cheap_figures_belong_to_single_latents(case: Case, found: Screen) -> None:
    for finding in found.latents:
        assert finding.attribution is not None and finding.restored is not None
        fixes = [finding.candidate.cure(gain) for gain in (1.0, 2.0)]
        expected = margins(case.pair.tuned, case.contrasts, fixes).base_answer.mean(dim=1).max()
        assert finding.restored == pytest.approx(float(expected), abs=1e-4)
    assert all(finding.attribution is None for finding in (*found.sets, *found.directions))


def test_rates_are_those_of_the_bench(case: Case, found: Screen) -> None:
    assert found.base == case.bench.arms(case.pair.base, [()])[0].rates
    assert found.tuned == case.bench.arms(case.pair.tuned, [()])[0].rates
    finding = found.latents[0]
    setting = finding.cure.settings[2]
    [again] = case.bench.arms(case.pair.tuned, [finding.candidate.cure(*setting.knob)])
    assert setting.rates == again.rates
    assert found.tuned["skill"].n == 2


def test_in_a_notebook_it_is_a_table_with_a_row_for_every_finding(found: Screen) -> None:
    shown = found._repr_html_()
    assert shown.count("<tr>") == 1 + len(_all(found)) and shown.count("(chosen)") == 1
    for finding in _all(found):
        assert escape(finding.candidate.label) in shown
        assert str(finding.necessity["misaligned"]) in shown
    assert "over budget" in shown or all(f.cure.best.within_budget for f in _all(found))


def test_without_a_dictionary_directions_take_the_same_way(case: Case) -> None:
    bare: list[Any] = [replace(one, dictionary=None, table=None, benign_means=()) for one in case.evidence]
    small = Bench(case.bench.questions[:2], case.bench.sampling, case.bench.judge)
    found = screen(case.pair, bare, case.contrasts, small, settings=HOW)
    assert (found.latents, found.sets) == ((), ())
    assert [finding.candidate.label for finding in found.directions] == ["1:mean difference"]
    assert found.stages == {"candidates": 0, "attribution": 0, "margin": 0, "generation": 1}
    assert found.best is found.directions[0]


def test_no_contrast_is_refused(case: Case) -> None:
    with pytest.raises(InputError, match="no contrast"):
        screen(case.pair, case.evidence, [], case.bench, settings=HOW)
