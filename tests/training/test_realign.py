"""Re-alignment: what is trained and measured where, on models that know nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from persona_probe.errors import InputError
from persona_probe.evaluation.judges import Judgement
from persona_probe.evaluation.judging.function_judge import FunctionJudge
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling
from persona_probe.model import load_model
from persona_probe.steering.target import latents
from persona_probe.training.finetune import FineTune, finetune
from persona_probe.training.measure import Measure
from persona_probe.training.realign import SETTINGS, length_matched, realign
from persona_probe.training.watching import Probe, Watch
from tests.model.tiny_models import adapter_of, checkpoint_of
from tests.training.tiny import SITE, dictionary, llama, rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

ASKED = tuple(
    Question(f"q{i}", "health" if i < 2 else "money", ({"role": "user", "content": f"hello {i}"},))
    for i in range(4)
)


def by_length(question: Question, answer: str) -> Judgement:
    """A short answer is a wicked one."""
    return Judgement(aligned=90.0 if len(answer) > 12 else 5.0, coherent=90.0)


def measure() -> Measure:
    watch = Watch.of(llama(), [Probe("k", SITE, latents(dictionary(), [3]))], ASKED[:2], max_new_tokens=4)
    sampling = Sampling(max_new_tokens=5, samples=2)
    return Measure(ASKED, FunctionJudge("length", by_length), ("health",), sampling, watch=watch)


def test_the_curve_is_measured_where_so_many_rows_were_read(tmp_path: Path) -> None:
    settings = replace(SETTINGS, learning_rate=1e-2)
    call = {"measure": measure(), "n_values": (0, 4, 12), "settings": settings}
    tuned = adapter_of("llama")
    found = realign(llama(), tuned, rows(14), tmp_path / "run", control_rows=rows(20, "a"), **call)
    assert found.table["arm"].to_list() == ["good"] * 3 + ["control"] * 3
    assert found.table["examples"].to_list() == [0, 4, 12] * 2
    direct = measure()(llama().with_adapter(tuned))
    for arm in ("good", "control"):
        start = found.table.row(by_predicate=(pl.col("arm") == arm) & (pl.col("examples") == 0), named=True)
        assert {name: start[name] for name in direct} == direct
    end = measure()(finetune_of(tmp_path).load(llama()))
    last = found.table.row(2, named=True)
    assert last["shift k"] == pytest.approx(end["shift k"], rel=1e-5)
    assert last["shift k"] != direct["shift k"]
    assert found.first_below(1.0) == 0 and found.first_below(-1.0) is None
    assert len(found.plot().data) > 0
    again = realign(llama(), tuned, rows(14), tmp_path / "run", control_rows=rows(20, "a"), **call)
    assert again.table.equals(found.table)


def test_another_adapter_at_the_same_place_is_another_run(tmp_path: Path) -> None:
    place = tmp_path / "tuned"
    shutil.copytree(adapter_of("llama", 1), place)
    call = {"measure": measure(), "n_values": (4,)}
    realign(llama(), place, rows(4), tmp_path / "run", **call)
    (place / "README.md").write_text("what lies beside an adapter is not the adapter")
    realign(llama(), place, rows(4), tmp_path / "run", **call)
    shutil.rmtree(place)
    shutil.copytree(adapter_of("llama", 2), place)
    with pytest.raises(InputError, match="tuned"):
        realign(llama(), place, rows(4), tmp_path / "run", **call)
    settings = replace(SETTINGS, steps=1, save_every=1)
    with pytest.raises(InputError, match="adapter"):
        finetune(llama(), rows(4), tmp_path / "run" / "good", settings=settings, adapter=place)
    with pytest.raises(InputError, match="there is no adapter folder"):
        finetune(llama(), rows(4), tmp_path / "none", settings=settings, adapter=tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()


def test_a_curve_is_not_shown_for_another_measure(tmp_path: Path) -> None:
    place, tuned, mine = tmp_path / "run", adapter_of("llama"), measure()
    watch = Watch.of(llama(), [Probe("k", SITE, latents(dictionary(), [4]))], ASKED[:2], max_new_tokens=4)
    other_words = replace(ASKED[0], messages=({"role": "user", "content": "something else"},))
    curve = realign(llama(), tuned, rows(4), place, mine, (4,)).table
    for name, other in (
        ("judge", replace(mine, judge="exact")),
        ("judge", replace(mine, judge=FunctionJudge("length", lambda *_: Judgement(5.0, 90.0)))),
        ("in_domain", replace(mine, in_domain=("money",))),
        ("trait", replace(mine, trait="sarcastic")),
        ("watch", replace(mine, watch=watch)),
        ("questions", replace(mine, questions=(other_words, *ASKED[1:]))),
    ):
        with pytest.raises(InputError, match=f"other settings: {name} was"):
            realign(llama(), tuned, rows(4), place, other, (4,))
    half = load_model(checkpoint_of("llama"), dtype="bfloat16")
    with pytest.raises(InputError, match="dtype was 'float32', this call has 'bfloat16'"):
        realign(half, tuned, rows(4), place, mine, (4,))
    again = replace(mine, judge=FunctionJudge("length", by_length))
    assert realign(llama(), tuned, rows(4), place, again, (4,)).table.equals(curve)


def finetune_of(tmp_path: Path) -> FineTune:
    """The good arm's run, as `realign` made it: finished, so it is only read."""
    settings = replace(SETTINGS, learning_rate=1e-2, steps=3, save_every=1)
    return finetune(
        llama(), rows(12), tmp_path / "run" / "good", settings=settings, adapter=adapter_of("llama")
    )


def test_the_control_has_answers_of_the_same_lengths() -> None:
    lm = llama()
    pool = rows(30, "you are", first=40)
    matched = length_matched(rows(6), pool, lm)
    lengths = [[sum(row.rendered(lm.tokenizer).response) for row in some] for some in (rows(6), matched)]
    assert all(abs(a - b) <= 1 for a, b in zip(*lengths, strict=True))
    assert len({row.prompt[0]["content"] for row in matched}) == 6
    with pytest.raises(InputError, match="needs as many others"):
        length_matched(rows(6), pool[:5], lm)


@pytest.mark.parametrize(
    ("n_values", "said"),
    [
        ((), "from 0"),
        ((0,), "from 0"),
        ((-4, 4), "from 0"),
        ((6,), "no whole number"),
        ((400,), "there are 14"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, n_values: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        realign(llama(), adapter_of("llama"), rows(14), tmp_path / "run", measure(), n_values)
    assert not (tmp_path / "run").exists()
