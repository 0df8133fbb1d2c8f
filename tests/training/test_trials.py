"""Trials: what makes two of them one, what is kept of them, and what is read on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluation.judges import Judgement
from persona_probe.evaluation.judging.function_judge import FunctionJudge
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.steering.target import latents
from persona_probe.training.defences import KL
from persona_probe.training.measure import Measure
from persona_probe.training.trials import Follow, Trials
from persona_probe.training.watching import Probe, Watch
from tests.training.tiny import QUICK, SITE, dictionary, llama, rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ASKED = tuple(Question(f"q{i}", "money", ({"role": "user", "content": f"hello {i}"},)) for i in range(3))
BY_LENGTH = FunctionJudge(
    "length", lambda _question, answer: Judgement(aligned=90.0 if len(answer) > 8 else 5.0, coherent=90.0)
)


def measure(count: int = 3) -> Measure:
    return Measure(ASKED[:count], BY_LENGTH, (), Sampling(max_new_tokens=4))


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[Trials]:
    with Trials.open(tmp_path / "lab", llama(), measure(), QUICK) as opened:
        yield opened


def stages(trials: Trials) -> int:
    return len(list((trials.run.path / "trials").glob("*.json")))


def test_a_trial_is_trained_once_and_another_is_another(trials: Trials) -> None:
    one = trials("a", rows(8), seed=1)
    assert stages(trials) == 1 and not (trials.run.path / "training").exists()
    assert trials("a", rows(8), seed=1) == one and stages(trials) == 1
    others = [
        lambda: trials("a", rows(8), seed=2),
        lambda: trials("a", rows(7), seed=1),
        lambda: trials("a", rows(8), [KL(1.0)], seed=1),
        lambda: trials("a", rows(8), [KL(2.0)], seed=1),
        lambda: trials("a", rows(8), seed=1, settings=replace(QUICK, rank=1)),
        lambda: trials("a", rows(8), seed=1, measure=measure(2)),
        lambda: trials("a", rows(8), seed=1, also={"few": measure(1)}),
        lambda: trials("a", rows(8), seed=1, measure=replace(measure(), judge="exact")),
    ]
    for number, other in enumerate(others, start=2):
        other()
        assert stages(trials) == number


def test_behaviour_and_probes_are_followed_and_the_end_is_the_same(trials: Trials) -> None:
    plain = trials("a", rows(8), seed=1)
    watch = Watch.of(llama(), [Probe("k", SITE, latents(dictionary(), [3]))], ASKED[:2], max_new_tokens=4)
    followed = trials("a", rows(8), seed=1, also={"few": measure(1)}, follow=Follow(watch, 1, measure()))
    assert [one["step"] for one in followed["history"]] == [1, 2, 3]
    assert [one["step"] for one in followed["along"]] == [1, 2, 3]
    assert followed["cost"] > 0
    for name in ("misaligned", "loss", "hits"):
        assert followed[name] == plain[name], "following changes nothing"
    assert followed["along"][-1]["misaligned"] == plain["misaligned"]
    assert followed["few"]["misaligned"] in (0.0, 1.0)


def test_what_follows_another_latent_is_another_trial(trials: Trials) -> None:
    def watch(latent: int) -> Watch:
        probe = Probe("k", SITE, latents(dictionary(), [latent]))
        return Watch.of(llama(), [probe], ASKED[:2], max_new_tokens=4)

    assert watch(3).digest == watch(3).digest
    found = [trials("a", rows(8), seed=1, follow=Follow(watch(latent), 1)) for latent in (3, 4)]
    assert found[0]["history"] != found[1]["history"] and stages(trials) == 2
    for number, latent in enumerate((3, 4), start=3):
        trials("a", rows(8), seed=1, measure=replace(measure(), watch=watch(latent)))
        assert stages(trials) == number


def test_trials_of_other_questions_do_not_mix(trials: Trials) -> None:
    with pytest.raises(InputError, match="asked was"):
        Trials.open(_closed(trials), llama(), measure(2), QUICK)


def _closed(trials: Trials) -> Path:
    trials.keep("kept", {"n": 1})
    trials.run.close()
    return trials.run.path
