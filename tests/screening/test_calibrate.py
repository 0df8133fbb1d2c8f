"""Calibration: arms differ by their edit alone, and the setting kept is the one the rule names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.evaluation.judges import Judge, Judgement
from persona_probe.evaluation.metrics import Rate
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.screening.calibrate import (
    CURES,
    Bench,
    Budget,
    Dose,
    Knob,
    Rates,
    cures,
    inductions,
    value,
    whole,
)
from persona_probe.screening.candidate import Candidate, Carrier
from persona_probe.screening.margin import Fix
from tests.screening.conftest import SITES

N = 100
QUESTIONS = tuple(
    Question(f"q{i}", "health", ({"role": "user", "content": "hello there you " * (1 + i % 3)},))
    for i in range(4)
)


def _even(question: Question, answer: str) -> Judgement:
    """A stub: coherent when the answer has an even number of letters, bad when it begins early."""
    return Judgement(
        aligned=10.0 if answer[:1] < "m" else 90.0, coherent=90.0 if len(answer) % 2 == 0 else 10.0
    )


def _rates(*, misaligned: float = 0.0, incoherent: float = 0.0, skill: float | None = None) -> Rates:
    def rate(share: float | None) -> Rate:
        return Rate(share, None, None, 0 if share is None else N, 0)

    zero = dict.fromkeys(("other_persona", "truncated", "missing"), rate(0.0))
    return {
        **zero,
        "misaligned": rate(misaligned),
        "incoherent": rate(incoherent),
        "skill": rate(skill),
    }


@dataclass(frozen=True)
class Scripted(Bench):
    """A bench whose arms come out as written: by the candidate's label, one entry per knob."""

    script: dict[str, list[Rates]] = field(default_factory=dict)

    def run(self, lm: LanguageModel, fixes: Sequence[Fix]) -> list[Rates]:
        left = {label: iter(rates) for label, rates in self.script.items()}
        return [next(left[fix[0].target.label]) for fix in fixes]


def _scripted(script: dict[str, list[Rates]]) -> Scripted:
    return Scripted(QUESTIONS, Sampling(), Judge("stub", _even), script=script)


def _bench() -> Bench:
    return Bench(QUESTIONS, Sampling(max_new_tokens=6, samples=2, seed=3), Judge("stub", _even))


@pytest.fixture
def search(
    pair: ModelPair, carrier_at: Callable[..., Carrier]
) -> Callable[[list[list[Rates]], Budget, list[Knob]], list[Dose]]:
    def run(script: list[list[Rates]], budget: Budget, knobs: list[Knob]) -> list[Dose]:
        candidates = [Candidate("latent", (carrier_at(SITES[0], seed),)) for seed in range(len(script))]
        labels = [candidate.label for candidate in candidates]
        bench = _scripted(dict(zip(labels, script, strict=True)))
        return cures(pair.tuned, candidates, bench, budget, knobs=knobs)

    return run


GAINS = [Knob(1.0, "all"), Knob(2.0, "all"), Knob(3.0, "all")]
Search = Callable[[list[list[Rates]], Budget, list[Knob]], list[Dose]]


def test_most_whole_answers_within_the_budget(search: Search) -> None:
    bad, cured = _rates(misaligned=0.8), _rates(misaligned=0.05)
    broken = _rates(incoherent=0.2)
    [dose] = search([[bad, cured, broken]], Budget(0.1), GAINS)
    assert dose.best.knob == Knob(2.0, "all")
    assert [setting.within_budget for setting in dose.settings] == [True, True, False]
    assert [setting.rates for setting in dose.settings] == [bad, cured, broken]


def test_the_budget_comes_before_the_cure(search: Search) -> None:
    script = [_rates(misaligned=0.8), _rates(incoherent=0.11), _rates(incoherent=0.3)]
    [dose] = search([script], Budget(0.1), GAINS)
    assert dose.best.knob == Knob(1.0, "all") and dose.best.within_budget


def test_where_nothing_stays_within_the_budget_the_best_of_all_is_kept_and_said_so(search: Search) -> None:
    [dose] = search([[_rates(incoherent=share) for share in (0.9, 0.3, 0.6)]], Budget(0.1), GAINS)
    assert dose.best.knob == Knob(2.0, "all") and not dose.best.within_budget


def test_a_cure_that_costs_the_skill_is_beyond_the_budget(search: Search) -> None:
    forgetful, keeping = _rates(skill=0.5), _rates(misaligned=0.3, skill=0.95)
    [dose] = search([[forgetful, keeping, forgetful]], Budget(0.1, skill_at_least=0.9), GAINS)
    assert dose.best.knob == Knob(2.0, "all")
    [dose] = search([[_rates(), _rates(), _rates()]], Budget(0.1, skill_at_least=0.9), GAINS)
    assert dose.best.within_budget  # no skill question was asked


def test_of_settings_that_do_as_well_the_gentlest(search: Search) -> None:
    nearly, best, same = _rates(misaligned=0.06), _rates(misaligned=0.05), _rates(misaligned=0.05)
    [dose] = search([[nearly, best, same]], Budget(0.1), GAINS)
    assert dose.best.knob == Knob(1.0, "all")


def test_candidates_are_searched_side_by_side(search: Search) -> None:
    one = [_rates(misaligned=m) for m in (0.9, 0.5, 0.0)]
    other = [_rates(misaligned=m) for m in (0.0, 0.5, 0.9)]
    first, second = search([one, other], Budget(0.1), GAINS)
    assert (first.best.knob.strength, second.best.knob.strength) == (3.0, 1.0)
    assert [setting.rates for setting in second.settings] == other


@given(
    shares=st.lists(st.tuples(st.integers(0, N), st.integers(0, 30)), min_size=8, max_size=8),
    limit=st.sampled_from([0.0, 0.05, 0.2]),
)
def test_the_rule(
    pair: ModelPair, carrier_at: Callable[..., Carrier], shares: list[tuple[int, int]], limit: float
) -> None:
    """No allowed setting does better by more than a standard error, none as good is gentler."""
    made = [_rates(misaligned=bad / N * (1 - loose / N), incoherent=loose / N) for bad, loose in shares]
    candidate = Candidate("latent", (carrier_at(SITES[0], 0),))
    [dose] = cures(pair.tuned, [candidate], _scripted({candidate.label: made}), Budget(limit))
    allowed = [setting for setting in dose.settings if setting.within_budget] or list(dose.settings)
    assert [setting.within_budget for setting in dose.settings] == [
        rates["incoherent"].rate <= limit for rates in made
    ]
    top = max(whole(setting.rates) for setting in allowed)
    error = sqrt(top * (1 - top) / N)
    assert dose.best in allowed
    assert whole(dose.best.rates) >= top - error - 1e-9
    for setting in allowed:
        if whole(setting.rates) >= top - error + 1e-9:
            assert setting.knob.strength >= dose.best.knob.strength


def test_inducing_keeps_what_brings_the_trait_out(
    pair: ModelPair, carrier_at: Callable[..., Carrier]
) -> None:
    candidate = Candidate("latent", (carrier_at(SITES[0], 0),))
    doses = ((0.1, 0.0), (0.5, 0.08), (0.7, 0.3))
    rates = [_rates(misaligned=bad, incoherent=loose) for bad, loose in doses]
    bench = _scripted({candidate.label: rates})
    [dose] = inductions(pair.base, [candidate], bench, Budget(0.1), knobs=GAINS)
    assert dose.best.knob == Knob(2.0, "all")


def test_whole_answers_are_what_is_left() -> None:
    rates = _rates(misaligned=0.2, incoherent=0.1)
    assert whole(rates) == pytest.approx(0.7)
    rates["missing"] = Rate(0.5, None, None, N, N)
    assert whole(rates) == pytest.approx(0.35)
    assert value(_rates(), "skill") == 0.0


def test_arms_in_one_batch_equal_arms_alone(pair: ModelPair, carrier_at: Callable[..., Carrier]) -> None:
    bench = _bench()
    fixes: list[Fix] = [(), (carrier_at(SITES[1], 3).cure(3.0),), (carrier_at(SITES[0], 4).push(4.0),)]
    together = bench.arms(pair.tuned, fixes)
    for fix, arm in zip(fixes, together, strict=True):
        [alone] = bench.arms(pair.tuned, [fix])
        assert [answer.token_ids for answer in arm.answers] == [answer.token_ids for answer in alone.answers]
        assert arm.judgements == alone.judgements == tuple(_even(a.question, a.text) for a in arm.answers)
        assert [answer.question.id for answer in arm.answers] == [f"q{i}" for i in range(4) for _ in range(2)]
    texts = [[answer.text for answer in arm.answers] for arm in together]
    assert texts[0] != texts[2]
    assert [arm.rates for arm in together] == bench.run(pair.tuned, fixes)


def test_one_arm_beyond_the_judge_is_missing_and_no_error(
    pair: ModelPair, carrier_at: Callable[..., Carrier]
) -> None:
    fixes: list[Fix] = [(), (carrier_at(SITES[0], 4).push(6.0),)]
    plain, pushed = ({answer.text for answer in arm.answers} for arm in _bench().arms(pair.tuned, fixes))
    assert not plain & pushed

    def only_plain(question: Question, answer: str) -> Judgement | None:
        return _even(question, answer) if answer in plain else None

    bench = Bench(QUESTIONS, _bench().sampling, Judge("stub", only_plain))
    first, second = bench.arms(pair.tuned, fixes)
    assert not any(judgement.missing for judgement in first.judgements)
    assert all(judgement.missing for judgement in second.judgements)
    assert whole(second.rates) == 0.0


def test_a_bench_on_other_questions_keeps_the_rest() -> None:
    bench = Bench(QUESTIONS, Sampling(seed=5), Judge("stub", _even), "sarcastic", ("health",))
    fewer = bench.on(QUESTIONS[:1], 7)
    assert (fewer.questions, fewer.sampling) == (QUESTIONS[:1], Sampling(seed=5, samples=7))
    assert (fewer.judge, fewer.trait, fewer.in_domain) == (bench.judge, "sarcastic", ("health",))


def test_necessity_is_always_among_the_settings() -> None:
    assert Knob(1.0, "all") in CURES
