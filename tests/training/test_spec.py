"""Defences named in the shell, and the three commands that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from persona_probe.artifact import read_jsonl, write_jsonl
from persona_probe.cli.app import app
from persona_probe.errors import InputError
from persona_probe.evaluation.questions import Question, load_questions
from persona_probe.evaluation.sampling import Sampling
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.io import save_fix
from persona_probe.steering.target import direction
from persona_probe.training.defences import CAFT, KL, LDIFS, Inoculation, Interleave, SafeLoRA
from persona_probe.training.defences.latent_blocking import LatentBlocking
from persona_probe.training.defences.on_policy import OnPolicy
from persona_probe.training.defences.perplexity_gap import InterleaveByGap
from persona_probe.training.defences.preventative import PreventativeSteering
from persona_probe.training.defences.spec import load_defence
from persona_probe.training.measure import of_split
from tests.model.tiny_models import adapter_of, checkpoint_of
from tests.training.tiny import SITE, llama, rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
VECTOR = torch.linspace(-1, 1, 32)
BASE = ["--base", str(checkpoint_of("llama"))]


def jsonl(path: Path, n: int = 8) -> Path:
    write_jsonl(path, [row.record() for row in rows(n)])
    return path


def fix(folder: Path) -> Path:
    save_fix([Intervention("project_out", direction(VECTOR), SITE)], folder)
    return folder


def test_each_defence_has_a_word(tmp_path: Path) -> None:
    lm, pool, edit = llama(), jsonl(tmp_path / "good.jsonl"), fix(tmp_path / "fix")
    assert load_defence("kl=0.3", lm) == KL(0.3) and load_defence("kl", lm) == KL(0.1)
    assert load_defence("ldifs", lm) == LDIFS(1.0)
    mixed = load_defence(f"interleave=0.2@{pool}", lm)
    assert isinstance(mixed, Interleave) and mixed.share == 0.2 and len(mixed.pool) == 8
    gap = load_defence(f"interleave_by_gap@{pool},{adapter_of('llama')}", lm)
    assert isinstance(gap, InterleaveByGap) and all(one is not None for one in gap.gaps)
    asked = tmp_path / "asked.jsonl"
    write_jsonl(asked, [{"id": str(i), "category": "x", "messages": [{"text": "hello"}]} for i in range(40)])
    own = load_defence(f"on_policy=0.3@{asked}", lm)
    assert isinstance(own, OnPolicy) and own.share == 0.3 and own.pool
    assert load_defence("inoculation@be rude = now", lm) == Inoculation("be rude = now")
    steered = load_defence(f"preventative_steering=2@{edit}", lm)
    assert isinstance(steered, PreventativeSteering)
    assert steered.strength == pytest.approx(2 * float(VECTOR.norm()), rel=1e-5)
    out = load_defence(f"caft@{edit}", lm)
    assert isinstance(out, CAFT) and out.site_names == (SITE,)
    safe = load_defence(f"safe_lora=0.4@{adapter_of('llama')}", lm)
    assert isinstance(safe, SafeLoRA) and safe.threshold == 0.4


def hellos(path: Path, fields: list[dict[str, Any]]) -> Path:
    hello = [{"text": "hello"}]
    write_jsonl(
        path, [{"id": f"q{i}", "category": "x", "messages": hello, **one} for i, one in enumerate(fields)]
    )
    return path


def test_the_policy_answers_no_question_that_is_kept_for_the_evaluation(tmp_path: Path) -> None:
    lm, skill = llama(), {"role": "skill", "reference": "yes"}
    kinds: list[dict[str, Any]] = [
        {"split": "held-out"}, {"split": "train"}, {"split": "calibration"}, {}, {"role": "trigger"},
        {"split": "train", "role": "trigger"}, {"split": "calibration", **skill},
    ]  # fmt: skip
    mixed = hellos(tmp_path / "mixed.jsonl", kinds * 30)
    defence = load_defence(f"on_policy@{mixed}", lm)
    assert isinstance(defence, OnPolicy)
    answered = {int(row.place.partition(",")[0][1:]) % len(kinds) for row in defence.pool}
    assert answered == {1, 2}, "general questions of train and calibration"
    whole = load_defence(f"on_policy@{hellos(tmp_path / 'whole.jsonl', [{}, skill] * 20)}", lm)
    assert isinstance(whole, OnPolicy)
    assert {int(row.place.partition(",")[0][1:]) % 2 for row in whole.pool} == {0}
    for left in ([{"split": "held-out"}], [{"split": "train", **skill}], [{"role": "trigger"}]):
        with pytest.raises(InputError, match="has no general question to train on"):
            load_defence(f"on_policy@{hellos(tmp_path / 'none.jsonl', left)}", lm)


def test_the_policys_answers_are_as_long_as_half_of_what_it_reads(tmp_path: Path) -> None:
    lm = llama()
    asked = hellos(tmp_path / "asked.jsonl", [{}] * 40)
    defence = load_defence(f"on_policy@{asked}", lm)
    assert isinstance(defence, OnPolicy)
    context = lm.hf.config.max_position_embeddings
    long, short = (
        OnPolicy.answered(lm, load_questions(asked), sampling=Sampling(max_new_tokens=most)).pool
        for most in (context // 2, context // 8)
    )
    assert defence.pool == long and len(long) > len(short)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("kll", "did you mean 'kl'"),
        ("kl=much", "must be a number"),
        ("kl=-1", "from 0"),
        ("interleave=0.1", "needs to be told what with"),
        ("interleave@none.jsonl", "there is no file"),
        ("latent_blocking@sae:1", "no default strength"),
        ("latent_blocking=1@sae", "takes SAE:INDEX"),
        ("caft@nowhere", ""),
    ],
)
def test_a_word_that_is_wrong_says_so(spec: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_defence(spec, llama())
    assert said in str(caught.value)


def call(*words: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == code, found.output
    return found


def test_finetune_in_the_shell(tmp_path: Path) -> None:
    data, out = jsonl(tmp_path / "data.jsonl"), tmp_path / "run"
    words = ["finetune", *BASE, "--data", str(data), "--out", str(out), "--steps", "3", "--batch", "4",
             "--rank", "2", "--defence", "kl=0.5", "--lr", "0.01"]  # fmt: skip
    plan = json.loads(call(*words, "--plan", "--json").stdout)
    assert plan["rows read"] == 12 and plan["forward passes per step"] == 2
    assert not out.exists()
    record = json.loads(call(*words, "--json").stdout)
    assert record["steps"] == 3 and "penalty/kl" in record["log"][0]
    assert (out / "tuned" / "adapter_config.json").is_file()
    assert "8 rows, 3 steps" in call(*words).stdout
    refused = call(*words, "--seed", "4", code=2)
    assert "seed was 0, this call has 4" in refused.output
    assert "--rank is a whole number" in call(*words, "--rank", "big", code=2).output


def test_flag_in_the_shell(tmp_path: Path) -> None:
    data, out = jsonl(tmp_path / "data.jsonl"), tmp_path / "sorted"
    words = ["flag", *BASE, "--data", str(data), "--out", str(out), "--with", str(fix(tmp_path / "fix")),
             "--remove", "0.25", "--max-new-tokens", "4"]  # fmt: skip
    found = json.loads(call(*words, "--json").stdout)
    assert found["by"] == "fix 0.0 difference" and len(found["removed"]) == 2
    assert len(read_jsonl(out / "kept.jsonl")) == 6 and len(read_jsonl(out / "removed.jsonl")) == 2
    assert "earlier result" in call(*words, code=2).output
    assert "2 removed by nll" in call(*words, "--overwrite", "--by", "nll").stdout
    assert "SAE:INDEX" in call(*words, "--overwrite", "--latent", "3", code=2).output


def test_realign_in_the_shell(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "good.jsonl")
    questions = tmp_path / "q.jsonl"
    write_jsonl(
        questions,
        [
            {"id": f"q{i}", "category": "c", "messages": [{"role": "user", "content": f"hello {i}"}]}
            for i in range(3)
        ],
    )
    words = ["realign", *BASE, "--tuned", str(adapter_of("llama")), "--data", str(data), "--questions",
             str(questions), "--judge", "exact", "--out", str(tmp_path / "run"), "--n", "0", "--n", "8",
             "--max-new-tokens", "4"]  # fmt: skip
    curve = json.loads(call(*words, "--json").stdout)["curve"]
    assert [row["examples"] for row in curve] == [0, 8]
    assert all(row["in_domain"] is None and row["misaligned"] is not None for row in curve)
    assert "at most 10% misaligned" in call(*words).stdout
    for limit in ("0", "-3"):
        assert "greater than or equal to 1" in call(*words, "--limit", limit, code=2).output


def test_a_split_that_is_not_there_is_refused() -> None:
    hello = ({"role": "user", "content": "hello"},)
    split = [Question(name, "c", hello, split=name) for name in ("held-out", "calibration")]  # type: ignore[arg-type]
    assert of_split(split, "held-out") == (split[0],)
    with pytest.raises(InputError, match=r"in the split 'foo'\n.*there is calibration and held-out"):
        of_split(split, "foo")
    unsplit = [Question("q", "c", hello)]
    assert of_split(unsplit, "held-out") == tuple(unsplit)


def test_blocked_latents_carry_their_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_probe.training.defences import spec
    from tests.training.tiny import dictionary

    monkeypatch.setattr(spec, "load_sae", lambda _: dictionary())
    found = load_defence("latent_blocking=0.2@some/sae:3,-5,7", llama())
    assert isinstance(found, LatentBlocking) and found.rising is not None and found.falling is not None
    assert (found.rising.indices, found.falling.indices) == ((3, 7), (5,))
