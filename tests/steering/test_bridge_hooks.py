"""`fwd_hooks()` under a real `TransformerBridge` against `steer()`."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from persona_probe.errors import MismatchError
from persona_probe.model import LanguageModel
from persona_probe.steering import Intervention, Level, SteeringPlan, latents, matched_random, steer
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, make_dictionary, random_intervention


@pytest.fixture(scope="module")
def bridge(llama: LanguageModel) -> Any:
    return llama.bridge()


IDS = torch.tensor([[4, 5, 6, 7, 8, 9], [9, 3, 2, 11, 12, 6]])


def under_bridge(bridge: Any, hooks: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return bridge.run_with_hooks(ids, fwd_hooks=hooks)


def steered(lm: LanguageModel, fix: Any, **options: Any) -> torch.Tensor:
    with steer(lm, fix, **options), torch.no_grad():
        return lm.hf(input_ids=IDS).logits


@pytest.mark.parametrize("positions", ["all", "prompt", "response", "last_prompt", (0, 4)])
def test_the_same_logits_as_steer(llama: LanguageModel, bridge: Any, positions: Any) -> None:
    edit = Intervention(
        "clamp",
        latents(make_dictionary(), [3, 8]),
        SITES[1],
        positions,
        Level((2.0, -1.0)),
        gain=1.5,
    )
    got = under_bridge(bridge, edit.fwd_hooks(prompt_lengths=[4, 2]))
    want = steered(llama, edit, prompt_lengths=[4, 2])
    assert torch.allclose(got, want, atol=1e-4)
    assert not torch.allclose(got, under_bridge(bridge, []), atol=1e-2)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_every_kind_of_site(llama: LanguageModel, bridge: Any, kind: str) -> None:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))
    edit = Intervention("add", direction(vector), f"blocks.1.hook_{kind}", level=Level((2.0,)))
    got = under_bridge(bridge, edit.fwd_hooks())
    assert torch.allclose(got, steered(llama, edit), atol=1e-4)
    assert not torch.allclose(got, under_bridge(bridge, []), atol=1e-2)


def test_a_plan_of_different_rows_and_its_null(llama: LanguageModel, bridge: Any) -> None:
    draw, dictionary = random.Random(1), make_dictionary()
    fix = [random_intervention(draw, dictionary, op="clamp", positions="all", site=s) for s in SITES]
    null = matched_random(fix, torch.Generator().manual_seed(0))
    for plan in (SteeringPlan((tuple(fix), ())), SteeringPlan(((), null))):
        got = under_bridge(bridge, plan.fwd_hooks())
        assert torch.allclose(got, steered(llama, plan), atol=1e-4)


def test_left_padding_is_not_edited(llama: LanguageModel, bridge: Any) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    edit = Intervention("add", direction(torch.ones(D_MODEL)), SITES[1], (0,), Level((5.0,)))
    name, hook = edit.fwd_hooks(attention_mask=mask)[0]
    x = torch.zeros(2, 6, D_MODEL)
    moved = hook(x, hook=None).abs().sum(-1) > 0
    assert name == SITES[1]
    assert moved.nonzero().tolist() == [[0, 2], [1, 0]]


def test_later_passes_without_cache_are_the_response(llama: LanguageModel, bridge: Any) -> None:
    edit = Intervention("add", direction(torch.ones(D_MODEL)), SITES[1], "prompt", Level((5.0,)))
    hook = edit.fwd_hooks(attention_mask=torch.ones(2, 3))[0][1]
    moved = hook(torch.zeros(2, 5, D_MODEL), hook=None).abs().sum(-1) > 0
    assert moved.sum(-1).tolist() == [3, 3]
    with pytest.raises(MismatchError, match="KV cache"):
        hook(torch.zeros(2, 1, D_MODEL), hook=None)
    with pytest.raises(MismatchError, match="2 prompt lengths"):
        edit.fwd_hooks(prompt_lengths=[1, 1])[0][1](torch.zeros(3, 2, D_MODEL), hook=None)


def test_generation_by_the_bridge(llama: LanguageModel, bridge: Any) -> None:
    edit = Intervention("add", direction(torch.arange(16.0)), SITES[1], "response", Level((4.0,)))
    prompt = torch.tensor([[4, 5, 6]])
    with bridge.hooks(fwd_hooks=edit.fwd_hooks(prompt_lengths=[3])):
        got = bridge.generate(
            prompt, max_new_tokens=5, do_sample=False, use_past_kv_cache=False, return_type="tokens",
            stop_at_eos=False, verbose=False,
        )  # fmt: skip
    with steer(llama, edit):
        want: Any = llama.hf.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)  # type: ignore[operator]
    assert got.tolist() == want.tolist()


def test_gain_zero_gives_no_hook() -> None:
    edit = Intervention("ablate", direction(torch.ones(D_MODEL)), SITES[1], gain=0.0)
    assert edit.fwd_hooks() == [] and SteeringPlan.of(edit).fwd_hooks() == []
