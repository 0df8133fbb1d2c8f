"""What is seen before behaviour is: a monitor's readings and thresholds, and rows flagged beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from persona_probe.artifact import read_jsonl
from persona_probe.errors import InputError, UnknownSiteError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import respond_greedy, transcripts
from persona_probe.hooks import capture_at
from persona_probe.steering.target import direction, latents
from persona_probe.training.finetune import finetune
from persona_probe.training.flag import flag
from persona_probe.training.monitor import Monitor, alarm_levels
from persona_probe.training.watching import Probe, Watch
from tests.model.tiny_models import adapter_of
from tests.training.tiny import QUICK, SITE, dictionary, llama, rows, same, tuned_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

VECTOR = torch.linspace(-1, 1, 32)
PROBES = (Probe("v", SITE, direction(VECTOR)), Probe.latent(dictionary(), 3))


def questions(n: int = 4) -> list[Question]:
    return [
        Question(f"q{i}", "c", ({"role": "user", "content": "hello " * (1 + i) + "you"},)) for i in range(n)
    ]


def watch() -> Watch:
    return Watch.of(llama(), PROBES, questions(), max_new_tokens=6)


def slow_amounts(hf: Any) -> dict[str, float]:
    """One text at a time, token by token."""
    lm, sae = llama(), dictionary()
    texts = transcripts(lm, respond_greedy(lm, questions(), max_new_tokens=6))
    found: dict[str, list[float]] = {"v": [], "latent 3": []}
    for text in texts:
        with torch.no_grad(), capture_at(hf, [SITE]) as captured:
            hf(input_ids=torch.tensor([text.ids]))
            x = captured[SITE][0]
        counted = [
            i
            for i in range(len(text))
            if i == text.prompt_length - 1
            or (i >= text.prompt_length and text.ids[i] not in lm.tokenizer.all_special_ids)
        ]
        found["v"].append(float((x[counted] @ (VECTOR / VECTOR.norm())).mean()))
        z = ((x[counted] - sae.b_dec) @ sae.W_enc[:, 3] + sae.b_enc[3]).relu()
        found["latent 3"].append(float(z.mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_amounts_are_means_over_tokens_then_texts() -> None:
    followed = watch()
    adapted = llama().with_adapter(adapter_of("llama")).hf
    for hf in (llama().hf, adapted):
        assert followed.amounts(hf) == pytest.approx(slow_amounts(hf), rel=1e-4)
    assert followed.shifts(llama().hf) == {"v": 0.0, "latent 3": 0.0}
    expected = slow_amounts(adapted)["v"] - slow_amounts(llama().hf)["v"]
    assert followed.shifts(adapted)["v"] == pytest.approx(expected, rel=1e-3)


class _Logger(TrainerCallback):
    """Stands for TensorBoard and its like: it comes behind the monitor and sees what it is handed."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen[state.global_step] = dict(logs)


def test_a_monitored_run_is_the_run_without_it_and_its_readings_are_in_the_logs(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=7)
    plain = finetune(llama(), rows(), tmp_path / "plain", settings=settings)
    monitor, logger = Monitor(watch(), every=3), _Logger()
    tune = finetune(llama(), rows(), tmp_path / "run", settings=settings, callbacks=[monitor, logger])
    assert same(tuned_weights(tune), tuned_weights(plain))
    assert [reading["step"] for reading in monitor.history] == [3, 6, 7]
    last = {name: shift for name, shift in monitor.history[-1].items() if name != "step"}
    assert last == pytest.approx(watch().shifts(tune.load().hf), rel=1e-4, abs=1e-6)
    assert any(abs(shift) > 1e-3 for shift in last.values())
    assert logger.seen[3]["persona/v"] == monitor.history[0]["v"] and "persona/v" not in logger.seen[2]
    logged = tune.table.filter(tune.table["persona/latent 3"].is_not_null())
    assert logged["step"].to_list() == [3, 6, 7]
    assert 0 < monitor.seconds and 0 < monitor.cost < 10
    assert monitor.alarm is None and monitor.table.height == 3


def test_it_stops_the_run_at_the_threshold(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=8)
    free = Monitor(watch(), every=2)
    finetune(llama(), rows(), tmp_path / "free", settings=settings, callbacks=[free])
    shifts = [reading["v"] for reading in free.history]
    level = (shifts[0] + shifts[1]) / 2
    sign = 1.0 if shifts[1] > shifts[0] else -1.0
    turned = Watch.of(llama(), [Probe("v", SITE, direction(sign * VECTOR))], questions(), max_new_tokens=6)
    monitor = Monitor(turned, every=2, thresholds={"v": sign * level}, stop=True)
    tune = finetune(llama(), rows(), tmp_path / "run", settings=settings, callbacks=[monitor])
    assert monitor.alarm is not None
    expected = next(r["step"] for r in free.history if sign * r["v"] > sign * level)
    assert monitor.alarm.step == expected == 4 or monitor.alarm.step == expected == 2
    assert tune.record["stopped"] == str(monitor.alarm)
    assert tune.table["step"].max() == monitor.alarm.step
    on = Monitor(turned, every=2, thresholds={"v": sign * level})
    whole = finetune(llama(), rows(), tmp_path / "on", settings=settings, callbacks=[on])
    assert on.alarm == monitor.alarm and whole.record["stopped"] is None


@given(st.integers(1, 40), st.floats(0.02, 0.9), st.integers(0, 1000))
def test_thresholds_keep_their_false_alarm_rate(n: int, rate: float, seed: int) -> None:
    """Exactly: of n + 1 exchangeable runs, at most that share lies above the threshold of the others."""
    draw = np.random.default_rng(seed)
    highest = draw.normal(size=n + 1)
    runs = [[{"step": 1, "v": float(x) - 1.0}, {"step": 2, "v": float(x)}] for x in highest]
    if rate < 1 / (n + 1):
        with pytest.raises(InputError, match="support a false-alarm rate"):
            alarm_levels(runs[:n], rate)
        return
    if rate < 1 / (n + 1) + 1e-9:
        return
    alarms = [highest[i] > alarm_levels(runs[:i] + runs[i + 1 :], rate)["v"] for i in range(n + 1)]
    assert sum(alarms) <= rate * (n + 1) + 1e-9


def test_bad_monitors_are_refused() -> None:
    followed = watch()
    for options in ({"every": 0}, {"thresholds": {"other": 1.0}}, {"stop": True}):
        with pytest.raises(InputError):
            Monitor(followed, **options)
    with pytest.raises(InputError):
        Watch.of(llama(), [], questions())
    with pytest.raises(InputError, match="same name"):
        Watch.of(llama(), [PROBES[0], PROBES[0]], questions())
    with pytest.raises(InputError, match="one latent"):
        Probe("two", SITE, latents(dictionary(), [1, 2]))
    with pytest.raises(UnknownSiteError):
        Watch.of(llama(), [Probe("v", "blocks.9.hook_resid_post", direction(VECTOR))], questions())
    with pytest.raises(InputError, match="different probes"):
        alarm_levels([[{"step": 1, "a": 0.0}], [{"step": 1, "b": 0.0}]], 0.5)
    with pytest.raises(InputError, match="at least one reading"):
        alarm_levels([[]], 0.5)


def test_scores_are_the_projection_difference_and_the_likelihood() -> None:
    lm, sae = llama(), dictionary()
    flags = flag(rows(5), lm, PROBES, max_new_tokens=6)
    asked = [Question(f"row-{i}", "row", row.prompt) for i, row in enumerate(rows(5))]
    own = transcripts(lm, respond_greedy(lm, asked, max_new_tokens=6))
    for i, row in enumerate(rows(5)):
        means: list[tuple[float, float]] = []
        for text in (row.rendered(lm.tokenizer), own[i]):
            with torch.no_grad(), capture_at(lm.hf, [SITE]) as captured:
                lm.hf(input_ids=torch.tensor([text.ids]))
                special = lm.tokenizer.all_special_ids
                counted = [k for k in range(len(text)) if text.response[k] and text.ids[k] not in special]
                x = captured[SITE][0][counted]
            z = ((x - sae.b_dec) @ sae.W_enc[:, 3] + sae.b_enc[3]).relu()
            means.append((float((x @ (VECTOR / VECTOR.norm())).mean()), float(z.mean())))
        here, there = means
        scores = flags.table.row(i, named=True)
        assert scores["v"] == pytest.approx(here[0], rel=1e-4, abs=1e-5)
        assert scores["latent 3"] == pytest.approx(here[1], rel=1e-4, abs=1e-5)
        if counted:
            assert scores["v difference"] == pytest.approx(here[0] - there[0], rel=1e-3, abs=1e-4)
    assert flags.scores == ["nll", "v", "v difference", "latent 3", "latent 3 difference"]


def test_two_scores_of_one_name_are_refused() -> None:
    one = Probe("v", SITE, direction(VECTOR))
    for probes in ([one, one], [replace(one, name="nll")], [one, replace(one, name="v difference")]):
        with pytest.raises(InputError, match="two scores would be called"):
            flag(rows(2), llama(), probes, max_new_tokens=2)


def test_the_most_suspect_rows_are_written_apart(tmp_path: Path) -> None:
    lm = llama()
    given = [*rows(6), *rows(2, "how are the system", first=20)]
    flags = flag(given, lm)
    bad = [False] * 6 + [True] * 2
    assert set(flags.auc(bad)) == {"nll"}
    order = flags.ranked("nll")
    values = flags.table["nll"].to_list()
    assert [values[i] for i in order] == sorted(values, reverse=True)
    kept, removed = flags.write(tmp_path / "sorted", by="nll", remove=0.25)
    out = set(order[:2])
    assert read_jsonl(removed) == [row.record() for i, row in enumerate(given) if i in out]
    assert read_jsonl(kept) == [row.record() for i, row in enumerate(given) if i not in out]
    assert flags.kept("nll", 0.0) == given
    for call in (
        lambda: flags.ranked("v"),
        lambda: flags.removed("nll", 2.0),
        lambda: flags.auc([True]),
        lambda: flag([], lm),
    ):
        with pytest.raises(InputError):
            call()
