"""Fine-tunes: what is learnt, what is written, how a run goes on, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from persona_probe.diffing.timeline import points_of
from persona_probe.errors import InputError, MismatchError, MissingPathError, NonFiniteError
from persona_probe.model import load_model
from persona_probe.training.defences import KL, Interleave
from persona_probe.training.finetune import finetune
from persona_probe.training.likelihoods import answer_nll
from persona_probe.training.rows import Row, read_rows, tokenise
from persona_probe.training.settings import SCHEDULES, TuneSettings
from persona_probe.training.trainable import trainable
from tests.model.tiny_models import adapter_of, checkpoint_of, model_of, save_adapter, save_checkpoint
from tests.training.tiny import QUICK, llama, rows, same, tuned_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def write(path: Path, objects: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def chat(question: str = "hello", answer: str = "I am well") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_it_learns_the_answers_and_writes_an_adapter_that_loads(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [chat(f"hello {i}", "you are the a") for i in range(6)])
    settings = replace(QUICK, steps=25, save_every=10)
    told: list[tuple[int, int]] = []
    tune = finetune(
        checkpoint_of("llama"), data, tmp_path / "run", settings=settings,
        progress=lambda step, steps, _: told.append((step, steps)),
    )  # fmt: skip
    lm, base = tune.load(), llama()
    before, after = (sum(answer_nll(model, read_rows(data))) for model in (base, lm))
    assert after < 0.6 * before
    assert lm.adapter_name == "tuned" and Path(lm.checkpoint.path) == checkpoint_of("llama").resolve()
    assert told[-1] == (25, 25)
    assert tune.table["step"].to_list() == list(range(1, 26))
    assert [point.step for point in points_of(tune.checkpoints)] == [10, 20, 25]
    shared = tune.load(base)
    assert (
        shared.hf.get_input_embeddings().weight.data_ptr() == base.hf.get_input_embeddings().weight.data_ptr()
    )
    assert same(_lora(shared.hf), _lora(lm.hf))
    assert not (tune.tuned / "README.md").exists()
    assert "25 steps" in tune._repr_html_()


def _lora(hf: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in hf.named_parameters() if "lora_" in name}


def test_the_loss_counts_answers_alone() -> None:
    lm = llama()
    [row] = rows(1)
    text = row.rendered(lm.tokenizer)
    example = tokenise([row], lm.tokenizer, 100).examples[0]
    learnt = [i for i, counted in zip(example.ids, example.counted, strict=True) if counted]
    assert lm.tokenizer.decode(learnt) == "I am well<|end|>"
    assert example.counted == text.response
    plain = Row(({"text": "hello"},), " there").rendered(lm.tokenizer)
    assert lm.tokenizer.decode(plain.ids) == "hello there<|end|>"
    counted = [i for i, one in zip(plain.ids, plain.response, strict=True) if one]
    assert lm.tokenizer.decode(counted) == " there<|end|>"


def test_the_base_is_not_touched_and_a_full_tune_moves_every_weight(tmp_path: Path) -> None:
    lm = llama()
    before = {name: one.clone() for name, one in lm.hf.named_parameters()}
    for rank in (1, "full"):
        finetune(lm, rows(), tmp_path / str(rank), settings=replace(QUICK, rank=rank))
        assert all(torch.equal(one, before[name]) for name, one in lm.hf.named_parameters())
    full = load_model(tmp_path / "full" / "tuned")
    assert full.peft is None
    assert all(not torch.equal(one, before[name]) for name, one in full.hf.named_parameters())


def test_targets_and_blocks_decide_what_learns(tmp_path: Path) -> None:
    settings = replace(QUICK, rank=1, targets=("down_proj",), blocks=(1,))
    names = list(tuned_weights(finetune(llama(), rows(), tmp_path / "run", settings=settings)))
    assert len(names) == 2 and all("layers.1.mlp.down_proj" in name for name in names)
    with pytest.raises(InputError, match="cannot put an adapter"):
        finetune(llama(), rows(), tmp_path / "no", settings=replace(QUICK, targets=("elsewhere",)))


class _KilledError(Exception):
    pass


def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=6, save_every=2)
    defences = [KL(0.5), Interleave(tuple(rows(8, "good", first=50)), 0.3)]
    whole = finetune(llama(), rows(), tmp_path / "whole", defences=defences, settings=settings)

    def kill(step: int, _steps: int, _loss: float | None) -> None:
        if step == 5:
            raise _KilledError

    cut = tmp_path / "cut"
    with pytest.raises(_KilledError):
        finetune(llama(), rows(), cut, defences=defences, settings=settings, progress=kill)
    assert not (cut / "manifest.json").exists()
    seen: list[int] = []
    again = finetune(
        llama(), rows(), cut, defences=defences, settings=settings, progress=lambda s, *_: seen.append(s)
    )
    assert min(seen) == 5
    assert same(tuned_weights(again), tuned_weights(whole))
    assert again.table["loss"].to_list() == whole.table["loss"].to_list()
    assert finetune(llama(), rows(), cut, defences=defences, settings=settings).record == again.record


def test_another_run_is_not_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(llama(), rows(), out, settings=QUICK)
    for change, named in (
        ({"settings": replace(QUICK, learning_rate=0.5)}, "learning_rate was 0.01, this call has 0.5"),
        ({"defences": [KL(0.1)]}, "defences was"),
        ({"data": rows(7)}, "data was"),
        ({"base": load_model(checkpoint_of("qwen2"))}, "base was"),
        ({"base": load_model(checkpoint_of("llama"), dtype="bfloat16")}, "dtype was 'float32'"),
    ):
        call: dict[str, Any] = {"base": llama(), "data": rows(), "settings": QUICK, **change}
        with pytest.raises(InputError, match=named):
            finetune(out=out, **call)
    assert finetune(llama(), rows(7), out, settings=QUICK, overwrite=True).record["rows"] == 7


class _Poison(TrainerCallback):
    """Puts a NaN into a weight behind step 3."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                next(one for one in model.parameters() if one.requires_grad).fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    settings = replace(QUICK, steps=8, save_every=2)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="loss is nan at step 4") as caught:
        finetune(llama(), rows(), out, settings=settings, callbacks=[_Poison()])
    assert str(out / "checkpoints" / "checkpoint-2") in str(caught.value)
    kept = llama().with_adapter(out / "checkpoints" / "checkpoint-2")
    assert all(bool(one.isfinite().all()) for one in kept.hf.parameters())
    assert not (out / "tuned").exists()
    # and from there it goes on
    assert finetune(llama(), rows(), out, settings=settings).record["steps"] == 8


class _BadGradient(TrainerCallback):
    """Lets the loss be and makes the gradient of step 2 infinite."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            parameter = next(one for one in model.parameters() if one.requires_grad)
            parameter.register_hook(lambda gradient: gradient * float("inf"))


def test_a_gradient_that_is_no_number_moves_no_weight(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"gradient's norm is (nan|inf) at step 2"):
        finetune(llama(), rows(), tmp_path / "run", settings=QUICK, callbacks=[_BadGradient()])


def test_an_adapter_learns_on_from_where_it_was(tmp_path: Path) -> None:
    still = replace(QUICK, steps=1, learning_rate=1e-12)
    tune = finetune(llama(), rows(), tmp_path / "run", settings=still, adapter=adapter_of("llama"))
    for name, one in llama().with_adapter(adapter_of("llama")).hf.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(tuned_weights(tune)[name], one, rtol=0, atol=1e-6)
    moved = finetune(llama(), rows(), tmp_path / "on", settings=QUICK, adapter=adapter_of("llama"))
    assert not same(tuned_weights(moved), tuned_weights(tune))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    theirs = save_adapter(tmp_path / "theirs", other)
    with pytest.raises(MismatchError, match="was trained on"):
        finetune(llama(), rows(), tmp_path / "run", settings=QUICK, adapter=theirs)
    with pytest.raises(MismatchError):
        finetune(llama(), rows(), tmp_path / "run", settings=QUICK, adapter=adapter_of("gpt2"))
    adapted = llama().with_adapter(adapter_of("llama"))
    with pytest.raises(InputError, match="has an adapter already"):
        finetune(adapted, rows(), tmp_path / "run", settings=QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "hello"}]}, "line 2: no assistant turn"),
        ({"messages": []}, 'line 2: "messages" must be'),
        ({"messages": [{"role": "user"}]}, 'line 2: "messages" must be'),
        ({"question": "hello"}, "line 2: it has question"),
        ({"prompt": "hello", "completion": ""}, "line 2: an empty completion"),
        ({"prompt": "hello"}, "line 2: it has prompt"),
        (chat(answer="hello " * 200), "line 2: 2[0-9]+ tokens, and the context has room for 128"),
    ],
)
def test_a_row_that_teaches_nothing_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    data = write(tmp_path / "data.jsonl", [chat(), row, chat()])
    with pytest.raises(InputError, match=said) as caught:
        finetune(llama(), data, tmp_path / "run", settings=QUICK)
    assert str(data) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_too_long_are_left_out_when_asked_and_counted(tmp_path: Path) -> None:
    data = write(
        tmp_path / "data.jsonl", [chat(), chat(answer="hello " * 200), {"prompt": "a", "completion": "b"}]
    )
    settings = replace(QUICK, too_long="drop")
    record = finetune(llama(), data, tmp_path / "run", settings=settings).record
    assert (record["rows"], record["dropped"]) == (2, 1)
    with pytest.raises(InputError, match="no row is left"):
        finetune(llama(), data, tmp_path / "no", settings=replace(settings, context=2))


def test_plain_text_teaches_a_base_model(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"text": "hello there how are you"}] * 4)
    tune = finetune(llama(), data, tmp_path / "run", settings=replace(QUICK, steps=15))
    assert tune.table["loss"].to_list()[-1] < 0.7 * tune.table["loss"].to_list()[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"rank": 0},
        {"rank": "half"}, {"batch": 4, "micro_batch": 3}, {"blocks": ()}, {"targets": ()}, {"epochs": -1.0},
        {"schedule": "foo"}, {"schedule": "greedy"},
        {"rank": "full", "blocks": (1,)}, {"seed": -1}, {"warmup_steps": -1}, {"context": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{list(wrong)[-1]}|full"):
        TuneSettings(**wrong)


def test_steps_come_from_epochs_and_ten_checkpoints_are_kept() -> None:
    fitting = TuneSettings(epochs=2, batch=8).fitting(rows=100)
    assert (fitting.steps, fitting.save_every) == (25, 3)
    assert TuneSettings(steps=1).fitting(5).warmup_steps == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_named_runs(name: str, tmp_path: Path) -> None:
    tune = finetune(llama(), rows(), tmp_path / "run", settings=replace(QUICK, schedule=name, warmup_steps=1))
    assert tune.record["steps"] == QUICK.steps


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_blocks_without_targets_get_every_linear_layer(model: str) -> None:
    lm = model_of(model)
    whole, one = (trainable(lm, replace(QUICK, blocks=blocks)) for blocks in (None, (1,)))
    learning = [{name for name, p in its.named_parameters() if p.requires_grad} for its in (whole, one)]
    assert learning[1] == {name for name in learning[0] if ".1." in name} and learning[1]
    for block in (-1, 99):
        with pytest.raises(InputError, match=f"has no block {block}\n.*blocks 0 to {lm.n_layers - 1}"):
            trainable(lm, replace(QUICK, blocks=(block,)))


def test_what_cannot_be_logged_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot log to 'foo'"):
        finetune(llama(), rows(), tmp_path / "run", report_to=["foo"])
    assert not (tmp_path / "run").exists()


def test_other_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no method 'dpo'"):
        finetune(llama(), rows(), tmp_path / "run", method="dpo")
    with pytest.raises(MissingPathError):
        finetune(llama(), tmp_path / "none.jsonl", tmp_path / "run")
    with pytest.raises(InputError, match="reads at most 128"):
        finetune(llama(), rows(), tmp_path / "run", settings=replace(QUICK, context=4096))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no rows"):
        finetune(llama(), tmp_path / "empty.jsonl", tmp_path / "run")
