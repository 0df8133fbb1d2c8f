"""`steer` on a whole model: every row as if it were alone, whatever the batch, the padding and the cache."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig

from persona_probe.errors import InputError, NotFiredError
from persona_probe.model import LanguageModel, load_model
from persona_probe.sae.load import Dictionary
from persona_probe.steering import Intervention, Level, SteeringPlan, latents, steer
from persona_probe.steering.plan import PlannedEdit
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, logits, loud, make_dictionary, padded, random_intervention
from tests.steering.reference import slow_greedy, slow_logits

Prompts = Callable[[int], list[list[int]]]
CLOSE = 3e-5  # logits of up to about 6, through three blocks in fp32


def mixed_rows(draw: random.Random, dictionary: Dictionary, n: int) -> list[tuple[PlannedEdit, ...]]:
    """n rows of 0 to 3 interventions each, at several sites, that agree with one another."""
    rows: list[tuple[PlannedEdit, ...]] = []
    while len(rows) < n:
        row = tuple(
            random_intervention(draw, dictionary, thoughts=True) for _ in range(draw.choice([0, 1, 1, 2, 3]))
        )
        try:
            SteeringPlan((row,))
        except InputError:
            continue
        rows.append(row)
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_32_rows_with_32_different_fixes_equal_each_alone(
    llama: LanguageModel, dictionary: Dictionary, draw: random.Random, prompts: Prompts, side: str
) -> None:
    rows, ids = mixed_rows(draw, dictionary, 32), prompts(32)
    lengths = [max(1, len(row) - i % 3) for i, row in enumerate(ids)]
    batch = padded(ids, side)
    with steer(llama, SteeringPlan(tuple(rows)), prompt_lengths=lengths) as receipt:
        got = logits(llama, batch)
    for i, row in enumerate(ids):
        want = slow_logits(llama.hf, row, rows[i], lengths[i])
        mine = got[i][batch["attention_mask"][i].bool()]
        assert torch.allclose(mine, want, atol=CLOSE), i
    assert receipt.tokens_changed > 30
    unedited = [i for i, row in enumerate(rows) if not row]
    assert unedited
    assert torch.equal(got[unedited], logits(llama, batch)[unedited])


def test_one_fix_for_all_rows_equals_each_alone(
    llama: LanguageModel, dictionary: Dictionary, draw: random.Random, prompts: Prompts
) -> None:
    ids = prompts(8)
    for row in mixed_rows(draw, dictionary, 12):
        if not row:
            continue
        try:
            with steer(llama, row):
                got = logits(llama, padded(ids))
        except NotFiredError:
            continue  # an index that no row reaches
        for i, prompt in enumerate(ids):
            want = slow_logits(llama.hf, prompt, row, len(prompt))
            assert torch.allclose(got[i, -len(prompt) :], want, atol=CLOSE)


@pytest.mark.parametrize("positions", ["all", "prompt", "response", "last_prompt", (0, 3), (2,), (1, 6, 9)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_with_a_cache_equals_recomputation(
    llama: LanguageModel, prompts: Prompts, positions: Any, use_cache: bool
) -> None:
    """Prompts of 1 to 7 tokens, left-padded, six new tokens; the logits of every step are compared."""
    ids = prompts(7)
    fix = loud(positions=positions, read="projection")
    batch = padded(ids)
    with steer(llama, fix) as receipt:
        out: Any = llama.hf.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=6,
            do_sample=False, eos_token_id=None, suppress_tokens=[0], use_cache=use_cache, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    for i, prompt in enumerate(ids):
        assert new[i].tolist() == slow_greedy(llama.hf, prompt, [fix], 6)
        want = slow_logits(llama.hf, prompt + new[i].tolist(), [fix], len(prompt))
        got = torch.stack([step[i] for step in out.logits])
        assert torch.allclose(got, want[len(prompt) - 1 : -1], atol=CLOSE)
    if use_cache:
        # the last new token is never read
        spans = {"all": len, "prompt": len, "response": lambda _: 1, "last_prompt": lambda _: 1}
        for i, prompt in enumerate(ids):
            fed = len(prompt) + 5
            expected = (
                sum(p < fed for p in positions)
                if isinstance(positions, tuple)
                else spans[positions](prompt) + (5 if positions in ("all", "response") else 0)
            )
            assert receipt.edits[SITES[1]][i] == expected


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_response_starts_at_the_last_prompt_token(model: str, request: pytest.FixtureRequest) -> None:
    """That token's activation produces the first response token; without it the first token is unsteered."""
    lm: LanguageModel = request.getfixturevalue(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = logits(lm, {"input_ids": ids})
    with steer(lm, loud(positions="response")):
        got = logits(lm, {"input_ids": ids})
    assert torch.equal(got[:, :3], plain[:, :3])
    assert not torch.allclose(got[:, 3], plain[:, 3], atol=0.1)


def test_gpt2_left_padded_and_cached_equals_each_alone(gpt2: LanguageModel, prompts: Prompts) -> None:
    ids = prompts(6)
    fix = Intervention("cap", direction(torch.ones(D_MODEL)), SITES[1], "response", Level((-0.5,)), gain=2.0)
    batch = padded(ids)
    settings: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "suppress_tokens": [0],
    }
    with steer(gpt2, fix):
        together: Any = gpt2.hf.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings
        )
    for i, prompt in enumerate(ids):
        with steer(gpt2, fix):
            alone: Any = gpt2.hf.generate(input_ids=torch.tensor([prompt]), **settings)  # type: ignore[operator]
        assert together[i, -5:].tolist() == alone[0, -5:].tolist()


@pytest.mark.parametrize("samples", [1, 3])
def test_num_return_sequences_keeps_each_prompt_with_its_fix(
    llama: LanguageModel, prompts: Prompts, samples: int
) -> None:
    ids = prompts(4)
    rows = [(loud(positions="response"),), (), (loud(gain=0.3),), (loud(positions="prompt"),)]
    batch = padded(ids)
    torch.manual_seed(0)
    with steer(llama, SteeringPlan(tuple(rows))) as receipt:
        out: Any = llama.hf.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=4, do_sample=True, top_k=0, eos_token_id=None, suppress_tokens=[0],
            num_return_sequences=samples, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    for n, answer in enumerate(new):
        prompt, row = ids[n // samples], rows[n // samples]
        want = slow_logits(llama.hf, prompt + answer, row, len(prompt))[len(prompt) - 1 : -1]
        assert torch.allclose(torch.stack([s[n] for s in out.logits]), want, atol=CLOSE)
    edits = receipt.edits[SITES[1]]
    assert edits == tuple(samples * k for k in (4, 0, len(ids[2]) + 3, len(ids[3])))


@pytest.mark.parametrize(
    "fix",
    [(), SteeringPlan(()), SteeringPlan(((), ())), loud(gain=0.0), [loud(gain=0.0)]],
    ids=["nothing", "no rows", "empty rows", "gain 0", "two of gain 0"],
)
def test_no_edit_is_no_edit_bit_for_bit(llama: LanguageModel, prompts: Prompts, fix: Any) -> None:
    batch = padded(prompts(2))
    plain = logits(llama, batch)
    if isinstance(fix, list):
        fix = [fix[0], Intervention("ablate", direction(torch.ones(D_MODEL)), SITES[1], gain=0.0)]
    with steer(llama, fix) as receipt:
        assert torch.equal(logits(llama, batch), plain)
    assert receipt.sites == () and receipt.tokens_edited == 0 and not receipt.zero_effect
    assert "no edit" in str(receipt)


def test_a_cap_that_nothing_reaches_changes_no_bit_and_is_reported(llama: LanguageModel) -> None:
    batch = {"input_ids": torch.tensor([[4, 5, 6]])}
    fix = Intervention("cap", latents(make_dictionary(), [1]), SITES[1], level=Level((1e6,)))
    with steer(llama, fix) as receipt:
        got = logits(llama, batch)
    assert torch.equal(got, logits(llama, batch))
    assert receipt.zero_effect and receipt.edits == {SITES[1]: (3,)}
    assert receipt.mean_norm == {SITES[1]: (0.0,)} and "no token moved" in str(receipt)


def test_the_hooks_are_gone_afterwards_even_after_an_error(llama: LanguageModel) -> None:
    batch = {"input_ids": torch.tensor([[4, 5, 6]])}
    plain = logits(llama, batch)

    def hooks() -> int:  # transformers may have some of its own
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llama.hf.modules())

    before = hooks()
    with pytest.raises(KeyError, match="stop"), steer(llama, loud(), kl=True):
        assert hooks() > before
        logits(llama, batch)
        raise KeyError("stop")
    assert torch.equal(logits(llama, batch), plain)
    assert hooks() == before


def test_several_forward_passes_in_one_block_are_apart(llama: LanguageModel) -> None:
    """A prompt that follows another is read from its start, though nothing says so."""
    fix = loud(positions="prompt")
    settings: dict[str, Any] = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "suppress_tokens": [0],
    }
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8], [3, 2]])
    with steer(llama, fix):
        together = [
            llama.hf.generate(p, attention_mask=torch.ones_like(p), **settings) for p in (first, second)
        ]  # type: ignore[operator]
    for prompt, got in zip((first, second), together, strict=True):
        for i, row in enumerate(prompt.tolist()):
            assert got[i, len(row) :].tolist() == slow_greedy(llama.hf, row, [fix], 3)


def test_what_was_cached_before_steering_is_prompt(llama: LanguageModel) -> None:
    prompt = [4, 9, 11, 3]
    cache = DynamicCache(config=llama.hf.config)
    logits(llama, {"input_ids": torch.tensor([prompt])}, past_key_values=cache, use_cache=True)
    with steer(llama, loud(positions="response")) as receipt:
        logits(llama, {"input_ids": torch.tensor([[7]])}, past_key_values=cache, use_cache=True)
    assert receipt.edits == {SITES[1]: (1,)}
    with pytest.raises(NotFiredError), steer(llama, loud(positions="prompt")):
        logits(llama, {"input_ids": torch.tensor([[7]])}, past_key_values=cache, use_cache=True)


def test_a_second_turn_on_the_same_cache_is_prompt_again(llama: LanguageModel) -> None:
    cache = DynamicCache(config=llama.hf.config)
    with steer(llama, loud(positions="prompt")) as receipt:
        for turn in ([4, 9, 11], [7], [8, 5], [6]):
            logits(llama, {"input_ids": torch.tensor([turn])}, past_key_values=cache, use_cache=True)
    assert receipt.edits == {SITES[1]: (5,)}


def test_padding_and_finished_rows_are_neither_edited_nor_counted(llama: LanguageModel) -> None:
    """Row 1 ends at its first token; generate then feeds it unmasked padding while row 0 goes on."""
    ids = [[5, 6, 7], [9, 4]]
    ends = [slow_greedy(llama.hf, row, [loud()], 4) for row in ids]
    end = next(token for token in ends[1] if token not in ends[0])
    at = ends[1].index(end)
    batch = padded(ids)
    with steer(llama, loud()) as receipt:
        out: Any = llama.hf.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            generation_config=GenerationConfig(
                max_new_tokens=4, do_sample=False, eos_token_id=end, pad_token_id=0, suppress_tokens=[0]
            ),
        )  # fmt: skip
    assert out[0, 3:].tolist() == ends[0]
    # fed: the prompt, the new tokens up to the end itself, but nothing after it and not the very last token
    assert receipt.edits[SITES[1]] == (3 + 3, 2 + min(at + 1, 3))


def test_several_sites_and_nested_blocks_act_in_order(llama: LanguageModel) -> None:
    ids = [4, 5, 6, 7]
    batch = {"input_ids": torch.tensor([ids])}
    dictionary = make_dictionary()
    one = Intervention("ablate", latents(dictionary, [3, 4]), SITES[0])
    two = Intervention("cap", latents(dictionary, [3, 5]), SITES[2], level=Level((0.1,)), gain=2.0)
    with steer(llama, [two, one]) as receipt:
        both = logits(llama, batch)[0]
    assert set(receipt.sites) == {SITES[0], SITES[2]}
    assert torch.allclose(both, slow_logits(llama.hf, ids, [one, two], 4), atol=CLOSE)
    clamp = Intervention("clamp", direction(torch.ones(D_MODEL)), SITES[1], level=Level((1.0,)))
    add = Intervention("add", direction(torch.ones(D_MODEL)), SITES[1], level=Level((1.0,)))
    with steer(llama, clamp), steer(llama, add):
        nested = logits(llama, batch)
    with steer(llama, Intervention("clamp", clamp.target, SITES[1], level=Level((2.0,)))):
        assert torch.allclose(nested, logits(llama, batch), atol=CLOSE)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_every_kind_of_site_is_edited(llama: LanguageModel, kind: str) -> None:
    batch = {"input_ids": torch.tensor([[4, 5, 6]])}
    site = f"blocks.1.hook_{kind}"
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    add = Intervention("add", direction(vector), site, level=Level((3.0,)))
    with steer(llama, add) as receipt:
        got = logits(llama, batch)
    assert receipt.edits == {site: (3,)}
    assert receipt.mean_norm[site][0] == pytest.approx(3.0, rel=1e-5)
    # whatever is added to attn_out is in resid_mid; to mlp_out, in resid_post
    same = {"attn_out": "blocks.1.hook_resid_mid", "mlp_out": SITES[1], "resid_pre": SITES[0]}
    other = same.get(kind, "blocks.1.hook_attn_out")
    with steer(llama, Intervention("add", direction(vector), other, level=Level((3.0,)))):
        assert torch.allclose(got, logits(llama, batch), atol=CLOSE)


def test_it_works_on_the_body_alone_and_by_positional_arguments(llama: LanguageModel) -> None:
    ids = torch.tensor([[4, 5, 6]])
    body: Any = llama.hf.base_model
    with steer(llama, loud(positions=(1,))) as receipt, torch.no_grad():
        by_body = body(ids, torch.ones_like(ids)).last_hidden_state
        by_model = llama.hf(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(by_body, by_model) and receipt.tokens_edited == 2


def test_gradients_flow_through_the_edit(llama: LanguageModel) -> None:
    """Training with an edit on: the gradient of an earlier weight is that of the slow edit."""
    ids = [4, 5, 6, 7]
    dictionary = make_dictionary()
    edits = [
        Intervention("cap", latents(dictionary, [3, 9]), SITES[1], level=Level((0.2,)), gain=1.5),
        Intervention("ablate", latents(dictionary, [5]), SITES[2], "response"),
    ]
    weight: Any = llama.hf.model.layers[0].mlp.down_proj.weight  # type: ignore[union-attr, index]

    def gradient(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        llama.hf.zero_grad()
        run().log_softmax(-1)[..., :3].sum().backward()
        found = weight.grad.clone()
        llama.hf.zero_grad()
        return found

    def steered() -> torch.Tensor:
        with steer(llama, edits, prompt_lengths=[2]):
            return llama.hf(input_ids=torch.tensor([ids, ids])).logits[0]

    got = gradient(steered)
    want = gradient(lambda: _slow_with_gradient(llama.hf, ids, edits, 2))
    plain = gradient(lambda: llama.hf(input_ids=torch.tensor([ids])).logits[0])
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))
    assert not torch.allclose(got, plain, atol=1e-2 * float(want.abs().max()))


def _slow_with_gradient(hf: Any, ids: list[int], edits: list[Intervention], length: int) -> torch.Tensor:
    from tests.steering.reference import _hook

    handles = [
        hf.model.layers[i].register_forward_hook(_hook([e for e in edits if e.site == site], length))
        for i, site in enumerate(SITES)
    ]
    try:
        return hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_steering_the_tuned_model_leaves_the_base_that_shares_its_weights(
    llama: LanguageModel, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(llama.hf), config).save_pretrained(str(tmp_path / "tune"))  # type: ignore[arg-type]
    tuned = llama.with_adapter(tmp_path / "tune")
    ids = [4, 5, 6]
    batch = {"input_ids": torch.tensor([ids])}
    fix = [
        Intervention(
            "cap", latents(make_dictionary(), [3, 4]), SITES[1], level=Level((-1.0,)), read="projection"
        )
    ]
    base, plain = logits(llama, batch), logits(tuned, batch)
    with steer(tuned, fix) as receipt:
        assert torch.equal(logits(llama, batch), base)
        got = logits(tuned, batch)
        with tuned.adapter_scaled(0.0):
            unscaled = logits(tuned, batch)
    assert receipt.firings == {SITES[1]: 2}
    assert torch.allclose(got[0], slow_logits(tuned.hf, ids, fix, 3), atol=CLOSE)
    assert torch.allclose(unscaled[0], slow_logits(llama.hf, ids, fix, 3), atol=CLOSE)
    assert not torch.allclose(got, plain, atol=1e-2)
    # steering PEFT's own wrapper is steering the model in it
    with steer(tuned, fix), torch.no_grad():
        assert tuned.peft is not None and torch.equal(tuned.peft(**batch).logits, got)


def test_a_model_made_while_another_is_steered_is_not_steered(llama: LanguageModel) -> None:
    ids = torch.tensor([[4, 5, 6]])
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False,
    }  # fmt: skip
    plain, answer = llama.forward(ids), llama.hf.generate(ids, **settings)  # type: ignore[operator]
    with steer(llama, loud(), kl=True):
        copied = load_model(llama.hf, tokenizer=llama.tokenizer)
        bridge = llama.bridge()
        assert torch.equal(copied.forward(ids), plain)
        assert torch.equal(copied.hf.generate(ids, **settings), answer)  # type: ignore[operator]
        assert not torch.allclose(llama.forward(ids), plain, atol=0.1)
    assert torch.equal(copied.forward(ids), plain)
    with torch.no_grad():
        assert torch.allclose(bridge(ids), plain, atol=CLOSE)
    # and it can be steered by itself
    with steer(copied, loud()) as receipt:
        copied.hf.generate(ids, **settings)  # type: ignore[operator]
    assert receipt.tokens_changed == 3 + 3
