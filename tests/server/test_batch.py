"""A batch that rows join and leave, against every row alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from persona_probe.errors import InputError, NonFiniteError
from persona_probe.model import Checkpoint, LanguageModel
from persona_probe.server.answering import Row, Wish
from persona_probe.server.batch import RunningBatch
from persona_probe.steering import Intervention, Level, steer
from persona_probe.steering.target import direction


def run(lm: LanguageModel, rows: Sequence[Row], seed: int = 0) -> None:
    """Let the rows join a few at a time, and run them to their ends."""
    chance = random.Random(seed)
    batch, waiting = RunningBatch(lm), list(rows)
    while waiting or batch.rows:
        n = chance.randint(0, 3)
        joining, waiting = waiting[:n], waiting[n:]
        if joining:
            batch.join(joining)
        batch.leave([news.row for news in batch.write() if news.ended])
        batch.forward()
    batch.close()


def alone(lm: LanguageModel, wish: Wish) -> tuple[list[int], int]:
    """Hugging Face's own greedy loop, on one row: the tokens, and how many the fix edited."""
    ids = torch.tensor([wish.prompt])
    with lm.active() as hf, steer(lm, wish.fix) as receipt:
        out = hf.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=wish.max_new_tokens, pad_token_id=lm.pad_id, eos_token_id=list(lm.eos_ids),
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist(), receipt.tokens_edited


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=2089, n_embd=16, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3)
    )


def gemma2() -> PreTrainedModel:
    """Every other block sees a window of 8 tokens only."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=2089,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            initializer_range=0.3,
            query_pre_attn_scalar=8,
        )
    )


@pytest.mark.parametrize("make", [gpt2, gemma2])
def test_rows_that_come_and_go_are_what_they_are_alone(make: object, lm: LanguageModel) -> None:
    torch.manual_seed(0)
    hf = make().eval()  # type: ignore[operator]
    small = LanguageModel(Checkpoint("memory"), hf, lm.tokenizer)
    chance = random.Random(1)
    site = "blocks.1.hook_resid_post"
    vectors = [direction(torch.randn(16)) for _ in range(3)]
    fixes: list[tuple[Intervention, ...]] = [
        (),
        (Intervention("add", vectors[0], site, "response", Level((4.0,))),),
        (Intervention("cap", vectors[1], site, "all", Level((0.1,)), 2.0),),
        (Intervention("project_out", vectors[2], "blocks.0.hook_resid_mid", "prompt"),),
    ]
    wishes = [
        Wish(
            tuple(chance.randrange(4, 2089) for _ in range(chance.randint(1, 20))),
            chance.randint(1, 16),
            chance.choice(fixes),
            temperature=0.0,
        )
        for _ in range(24)
    ]
    rows = [Row(wish) for wish in wishes]
    run(small, rows)
    for row in rows:
        tokens, edited = alone(small, row.wish)
        assert row.token_ids == tokens
        assert row.tally.edited == edited
        assert row.finish_reason == ("stop" if tokens[-1] in small.eos_ids else "length")


def test_chance_belongs_to_the_row(lm: LanguageModel) -> None:
    prompts = [tuple(lm.tokenizer(text)["input_ids"]) for text in ("the doctor said", "once upon a time")]
    wishes = [Wish(prompts[i % 2], 8, temperature=1.0, top_p=0.8 + i / 40, seed=i) for i in range(6)]
    together = [Row(wish, choice) for wish in wishes for choice in range(3)]
    run(lm, together)
    for row in together[::4]:
        one = Row(row.wish, row.choice)
        run(lm, [one])
        assert one.token_ids == row.token_ids
    assert len({tuple(row.token_ids) for row in together[:3]}) > 1, "choices of one request differ"


def test_a_row_gone_astray_fails_alone(lm: LanguageModel) -> None:
    prompt = tuple(lm.tokenizer("the doctor said")["input_ids"])
    vector = direction(torch.eye(lm.d_model)[0])
    wild = Intervention("add", vector, "blocks.2.hook_resid_post", level=Level((3e38,)), gain=4.0)
    plain = Wish(prompt, 8, temperature=0.0)
    rows = [Row(plain), Row(replace(plain, fix=(wild,))), Row(plain)]
    run(lm, rows)
    assert isinstance(rows[1].error, NonFiniteError)
    assert rows[0].token_ids == rows[2].token_ids == alone(lm, plain)[0]
    assert rows[0].error is None


def test_a_model_with_recurrent_states_is_refused(lm: LanguageModel) -> None:
    config = MambaConfig(vocab_size=2089, hidden_size=16, state_size=4, num_hidden_layers=2)
    hf = MambaForCausalLM(config).eval()
    with pytest.raises(InputError, match="cannot be served"):
        RunningBatch(LanguageModel(Checkpoint("memory"), hf, lm.tokenizer)).join([Row(Wish((5, 6), 4))])
