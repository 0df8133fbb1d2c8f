"""What a plan refuses, and what the receipt says was done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from persona_probe.errors import (
    InputError,
    MismatchError,
    NotFiredError,
    NothingSelectedError,
    UnknownSiteError,
)
from persona_probe.model import LanguageModel
from persona_probe.steering import Condition, Intervention, Level, SteeringPlan, latents, steer
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, logits, loud, make_dictionary, padded

Prompts = Callable[[int], list[list[int]]]


def test_the_receipt_adds_up_over_sites_rows_and_passes(llama: LanguageModel) -> None:
    ids = padded([[4, 5, 6], [7, 8]])
    first = loud(positions="last_prompt")
    second = Intervention("add", direction(torch.ones(D_MODEL)), SITES[2], (0, 1, 2), Level((2.0,)))
    plan = SteeringPlan(((first, second), (second,)))
    with steer(llama, plan) as receipt:
        logits(llama, ids)
        logits(llama, ids)
    assert receipt.firings == {SITES[1]: 2, SITES[2]: 2}
    assert receipt.edits == {SITES[1]: (2, 0), SITES[2]: (6, 4)}
    assert receipt.tokens_edited == receipt.tokens_changed == 12
    assert receipt.mean_norm[SITES[1]] == (pytest.approx(3.0, rel=1e-5), None)
    assert receipt.max_norm[SITES[2]] == (pytest.approx(2.0, rel=1e-5),) * 2
    assert "12" not in str(receipt) and "2 of 2 tokens edited" in str(receipt)


def test_a_larger_batch_under_one_fix_gets_more_rows_in_the_receipt(llama: LanguageModel) -> None:
    with steer(llama, loud()) as receipt:
        logits(llama, padded([[4, 5]]))
        logits(llama, padded([[4, 5], [6], [7, 8]]))
    assert receipt.edits == {SITES[1]: (4, 1, 2)}


def test_nothing_fired_is_an_error(llama: LanguageModel) -> None:
    with pytest.raises(NotFiredError, match="no forward pass"), steer(llama, loud()):
        pass
    with (
        pytest.raises(NothingSelectedError, match="no token at the positions"),
        steer(llama, loud(positions=(50,))),
    ):
        logits(llama, {"input_ids": torch.tensor([[4, 5]])})
    # a condition that does not hold is no such error: that is what conditions are for
    never = Intervention(
        "ablate", latents(make_dictionary(), [3]), SITES[1], condition=Condition("above", 1e9)
    )
    with steer(llama, never) as receipt:
        logits(llama, {"input_ids": torch.tensor([[4, 5]])})
    assert receipt.tokens_edited == 0 and receipt.zero_effect
    assert receipt.mean_norm == {SITES[1]: (None,)}


def test_batches_that_do_not_fit_the_plan_are_refused(llama: LanguageModel) -> None:
    plan = SteeringPlan(((loud(),), ()))
    with steer(llama, plan):
        logits(llama, padded([[4], [5]]))
        with pytest.raises(MismatchError, match="2 rows and the batch 3"):
            logits(llama, padded([[4], [5], [6]]))
        # four different prompts are not two prompts twice
        with pytest.raises(MismatchError, match="2 rows and the batch 4"):
            logits(llama, padded([[4], [5], [6], [7]]))
    with steer(llama, loud(), prompt_lengths=[1, 1]):
        logits(llama, padded([[4], [5]]))
        with pytest.raises(MismatchError, match="2 prompt lengths"):
            logits(llama, padded([[4], [5], [6]]))
        # nor are the lengths of two prompts those of four
        with pytest.raises(MismatchError, match="2 prompt lengths were given for a batch of 4"):
            logits(llama, padded([[4], [5], [6], [7]]))
        logits(llama, padded([[4], [4], [6], [6]]))


def test_a_fix_for_another_model_is_refused(llama: LanguageModel) -> None:
    wide = Intervention("ablate", direction(torch.ones(D_MODEL + 1)), SITES[1])
    with pytest.raises(MismatchError, match="width 17"), steer(llama, wide):
        pass
    deep = Intervention("ablate", direction(torch.ones(D_MODEL)), "blocks.9.hook_resid_post")
    with pytest.raises(UnknownSiteError, match=r"blocks\.2\.hook_resid_post"), steer(llama, deep):
        pass
    with pytest.raises(InputError, match="at least 1"), steer(llama, loud(), prompt_lengths=[0]):
        pass


def test_a_bare_model_is_refused_with_the_way_in(llama: LanguageModel, unchecked: None) -> None:
    with pytest.raises(InputError, match="load_model"), steer(llama.hf, loud()):  # type: ignore[arg-type]
        pass


def test_a_mask_that_steering_cannot_read_is_refused(llama: LanguageModel) -> None:
    mask = torch.zeros(1, 1, 2, 2)
    with steer(llama, loud()):
        logits(llama, {"input_ids": torch.tensor([[4, 5]])})
        with pytest.raises(InputError, match="plain attention mask"):
            logits(llama, {"input_ids": torch.tensor([[4, 5]]), "attention_mask": mask})


def test_plans_can_be_cut_and_repeated() -> None:
    a, b = loud(), loud(gain=2.0)
    plan = SteeringPlan(((a,), (), (b,)))
    assert plan.take([2, 0]).rows == ((b,), (a,))
    assert plan.repeat(2).rows == ((a,), (a,), (), (), (b,), (b,))
    assert SteeringPlan.of(a).take([0, 0]).rows == ((a,),)
    assert SteeringPlan.of(plan) is plan and plan.interventions == (a, b)


def test_edits_that_fight_over_one_direction_are_refused() -> None:
    dictionary = make_dictionary()
    add = Intervention("add", latents(dictionary, [3]), SITES[1], level=Level((1.0,)))
    cap = Intervention("cap", direction(-dictionary.W_dec[3]), SITES[1], level=Level((1.0,)))
    with pytest.raises(InputError, match="same direction"):
        SteeringPlan(((), (add, cap)))
    apart = [
        Intervention("add", add.target, SITES[1], positions, Level((1.0,))) for positions in ((0, 1), (2, 3))
    ]
    elsewhere = Intervention("add", add.target, SITES[2], level=Level((1.0,)))
    assert len(SteeringPlan.of([*apart, elsewhere]).interventions) == 3
