"""Supervised training: what is read, what the loss counts, and that it goes on where it was cut."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from persona_probe.errors import InputError
from persona_probe.training.sft import POOL, Example, FitSettings, collate, fit, reading_order

VOCAB = 24


def _model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def _examples(n: int = 12, seed: int = 0) -> list[Example]:
    """Of 3 to 11 tokens, the first never counted, some of the others neither."""
    draw = Random(seed)
    examples: list[Example] = []
    for number in range(n):
        length = 3 + number % 9
        ids = tuple(draw.randrange(1, VOCAB) for _ in range(length))
        counted = (False, *(draw.random() < 0.6 for _ in range(length - 2)), True)
        examples.append(Example(ids, counted))
    return examples


def _slow_losses(model: LlamaForCausalLM, example: Example) -> torch.Tensor:
    """Cross entropy of each counted token, the example alone, without padding."""
    log_p = model(input_ids=torch.tensor([example.ids])).logits[0].float().log_softmax(dim=-1)
    places = [place for place, counted in enumerate(example.counted) if counted]
    return torch.stack([-log_p[place - 1, example.ids[place]] for place in places])


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _row(example: Example) -> dict[str, tuple[int, ...] | tuple[bool, ...]]:
    return {"input_ids": example.ids, "counted": example.counted}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    steps=st.integers(0, 40),
    batch=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_every_example_is_read_equally_often(lengths: list[int], steps: int, batch: int, seed: int) -> None:
    order = reading_order(lengths, steps * batch, batch, seed)
    assert len(order) == steps * batch
    counts = Counter({index: 0 for index in range(len(lengths))})
    counts.update(order)
    assert set(counts) == set(range(len(lengths)))
    if order:
        assert max(counts.values()) - min(counts.values()) <= 1
    assert order == reading_order(lengths, steps * batch, batch, seed)


@given(lengths=st.lists(st.integers(1, 40), min_size=8, max_size=80), batch=st.integers(2, 6))
def test_a_batch_holds_neighbours_in_length(lengths: list[int], batch: int) -> None:
    """Within a pool no other batch's lengths lie strictly between two of one batch."""
    order = reading_order(lengths, 2 * POOL * batch, batch, seed=1)
    for start in range(0, len(order), POOL * batch):
        pool = [lengths[i] for i in order[start : start + POOL * batch]]
        batches = sorted(sorted(pool[i : i + batch]) for i in range(0, len(pool), batch))
        assert [length for one in batches for length in one] == sorted(pool)


def test_another_seed_reads_in_another_order_and_long_ones_do_not_come_first() -> None:
    lengths = list(range(1, 129))
    one, other = (reading_order(lengths, 128, 4, seed) for seed in (0, 1))
    assert one != other
    means = [sum(lengths[i] for i in part) / 64 for part in (one[:64], one[64:])]
    assert abs(means[0] - means[1]) < 25  # sorted by length they would be 64 apart


def test_loss_is_the_mean_cross_entropy_of_the_counted_tokens(tmp_path: Path) -> None:
    model, examples = _model(), _examples()
    expected = torch.cat([_slow_losses(model, example) for example in examples]).mean()
    batch = collate([_row(example) for example in examples], pad_id=0)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=0)
    settings = FitSettings(steps=1, batch=len(examples), learning_rate=1e-9)
    [logged] = fit(model, examples, settings, tmp_path, pad_id=0)
    assert float(logged["loss"]) == pytest.approx(expected.item(), rel=1e-3)


def test_a_step_follows_the_gradient_of_the_counted_tokens_alone(tmp_path: Path) -> None:
    """AdamW's first step is the learning rate times the gradient's sign, wherever that is not tiny."""
    model, examples = _model(), _examples()
    slow = copy.deepcopy(model)
    torch.cat([_slow_losses(slow, example) for example in examples]).mean().backward()
    before = _weights(model)
    settings = FitSettings(steps=1, batch=len(examples), learning_rate=1e-3)
    fit(model, examples, settings, tmp_path, pad_id=0)
    moved = 0
    for name, gradient in ((n, p.grad) for n, p in slow.named_parameters()):
        assert gradient is not None
        clear = gradient.abs() > 1e-4
        step = (_weights(model)[name] - before[name])[clear]
        torch.testing.assert_close(step, -1e-3 * gradient[clear].sign(), rtol=0, atol=2e-5)
        moved += int(clear.sum())
    assert moved > 500


@pytest.mark.parametrize("pad_id", [0, 7, VOCAB - 1])
def test_padding_never_matters(tmp_path: Path, pad_id: int) -> None:
    examples = _examples()
    reference = _model()
    torch.cat([_slow_losses(reference, example) for example in examples]).mean().backward()
    padded = _model()
    padded(**collate([_row(example) for example in examples], pad_id)).loss.backward()
    for (name, one), other in zip(padded.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)

    trained: list[dict[str, torch.Tensor]] = []
    for number, pad in enumerate((0, pad_id)):
        model = _model()
        fit(model, examples, FitSettings(steps=3, batch=4), tmp_path / str(number), pad_id=pad)
        trained.append(_weights(model))
    assert _same(*trained)


def test_collate_marks_what_does_not_count() -> None:
    rows = [Example((5, 6, 7), (False, True, True)), Example((8, 9), (True, False))]
    batch = collate([_row(row) for row in rows], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


class _KilledError(Exception):
    pass


def _stop_at(step: int) -> Callable[[int, float | None], None]:
    def report(at: int, loss: float | None) -> None:
        if at == step:
            raise _KilledError

    return report


@pytest.mark.parametrize("wreck", ["nothing", "no state", "half a state", "weights only"])
def test_a_run_that_was_cut_ends_in_the_same_weights(tmp_path: Path, wreck: str) -> None:
    settings = FitSettings(7, batch=3, warmup_steps=2, schedule="cosine", weight_decay=0.1, save_every=2)
    whole, examples = _model(), _examples()
    losses = fit(whole, examples, settings, tmp_path / "whole", pad_id=0)
    cut = tmp_path / "cut"
    with pytest.raises(_KilledError):
        fit(_model(), examples, settings, cut, pad_id=0, progress=_stop_at(5))
    newest = cut / "checkpoint-6"
    if wreck == "no state":
        shutil.copytree(cut / "checkpoint-4", newest)
        (newest / "trainer_state.json").unlink()
    elif wreck == "half a state":
        shutil.copytree(cut / "checkpoint-4", newest)
        state = (newest / "trainer_state.json").read_text()
        (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    elif wreck == "weights only":
        newest.mkdir()
        (newest / "model.safetensors").write_bytes(b"\0" * 100)
    seen: list[int] = []
    resumed = _model(seed=9)  # whatever it was, the checkpoint's weights take its place
    again = fit(resumed, examples, settings, cut, pad_id=0, progress=lambda step, _: seen.append(step))
    assert min(seen) == 5
    assert _same(_weights(resumed), _weights(whole))
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in losses]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    settings = FitSettings(steps=4, batch=3, save_every=2)
    model, examples = _model(), _examples()
    fit(model, examples, settings, tmp_path, pad_id=0)
    again = _model(seed=3)
    fit(again, examples, settings, tmp_path, pad_id=0)
    assert _same(_weights(again), _weights(model))


@pytest.mark.parametrize(("keep", "left"), [(2, {3, 4}), (None, {1, 2, 3, 4})])
def test_as_many_checkpoints_stay_as_were_asked_for(tmp_path: Path, keep: int | None, left: set[int]) -> None:
    settings = FitSettings(steps=4, batch=3, save_every=1)
    fit(_model(), _examples(), settings, tmp_path, pad_id=0, keep=keep)
    assert {int(folder.name.split("-")[1]) for folder in tmp_path.iterdir()} == left


def test_the_seed_decides_the_run(tmp_path: Path) -> None:
    runs = [
        fit(_model(), _examples(), FitSettings(steps=3, batch=3, seed=seed), tmp_path / str(n), pad_id=0)
        for n, seed in enumerate((0, 0, 1))
    ]
    losses = [[entry["loss"] for entry in run] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_it_learns_and_says_so_quietly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, told = _model(), list[tuple[int, float | None]]()
    settings = FitSettings(steps=40, batch=4, learning_rate=1e-2, save_every=20)
    losses = fit(model, _examples(4), settings, tmp_path, pad_id=0, progress=lambda *said: told.append(said))
    assert float(losses[-1]["loss"]) < 0.5 * float(losses[0]["loss"])
    assert [step for step, loss in told if loss is not None] == list(range(1, 41))
    assert not model.training
    out = capsys.readouterr()
    assert out.out == out.err == ""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_only_the_adapter_of_a_peft_model_learns(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(_model(), config)
    before = _weights(model)
    fit(model, _examples(), FitSettings(steps=3, batch=4, learning_rate=1e-2), tmp_path, pad_id=0)
    moved = {name for name, tensor in _weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no examples"):
        fit(_model(), [], FitSettings(steps=1), tmp_path, pad_id=0)
    with pytest.raises(InputError, match="no token that the loss counts") as caught:
        Example((1, 2), (False, False))
    assert "assistant turn" in str(caught.value)
    with pytest.raises(InputError, match="2 token ids but 1 loss marks"):
        Example((1, 2), (True,))
    with pytest.raises(InputError):
        Example((), ())
