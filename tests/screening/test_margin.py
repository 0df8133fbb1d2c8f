"""Margin, attribution and site effects, against slow readings of one document at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair
from persona_probe.screening.attribution import attributions
from persona_probe.screening.candidate import Carrier
from persona_probe.screening.margin import Contrast, Fix, margins, response_log_probabilities, restored
from persona_probe.screening.sites import site_effects
from tests.screening.conftest import BLOCKS, SITES

Make = Callable[..., Carrier]


@contextmanager
def _edited(
    lm: LanguageModel, site: str, edit: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """A block's output changed by a plain torch hook."""
    module = lm.hf.model.layers[int(site.split(".")[1])]  # type: ignore[union-attr]

    def change(module: torch.nn.Module, args: object, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _slow(lm: LanguageModel, row: Rendered) -> float:
    """Mean log-probability of the tokens that the assistant wrote, in the row by itself."""
    with torch.no_grad():
        log_p = lm.hf(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(dim=-1)
    scores = [float(log_p[place - 1, row.ids[place]]) for place in range(len(row)) if row.response[place]]
    return sum(scores) / len(scores)


def _capped(carrier: Carrier, gain: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(x: torch.Tensor) -> torch.Tensor:
        z = x @ carrier.unit
        level = torch.tensor(carrier.base_mean)
        aim = torch.minimum(z, level) if carrier.rises else torch.maximum(z, level)
        return x + gain * (aim - z)[..., None] * carrier.unit

    return edit


def test_margins_equal_a_slow_loop(pair: ModelPair, contrasts: list[Contrast], carrier_at: Make) -> None:
    capped, floored = carrier_at(SITES[0], seed=1), carrier_at(SITES[1], seed=2, rises=False)
    fixes: list[Fix] = [(), (capped.cure(1.0),), (floored.cure(2.0),)]
    found = margins(pair.tuned, contrasts, fixes)
    assert found.base_answer.shape == (3, len(contrasts))
    for number, edit in enumerate([None, (capped, 1.0), (floored, 2.0)]):
        with _edited(pair.tuned, edit[0].site if edit else SITES[0], _capped(*edit) if edit else lambda x: x):
            base = torch.tensor([_slow(pair.tuned, contrast.base) for contrast in contrasts])
            tuned = torch.tensor([_slow(pair.tuned, contrast.tuned) for contrast in contrasts])
        torch.testing.assert_close(found.base_answer[number], base, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.tuned_answer[number], tuned, rtol=0, atol=1e-4)
        assert float(found.margin[number]) == pytest.approx(float((tuned - base).mean()), abs=1e-4)
    assert (found.margin[1:] - found.margin[0]).abs().min() > 1e-3
    torch.testing.assert_close(
        restored(pair.tuned, contrasts, fixes), found.base_answer.mean(dim=1), rtol=0, atol=1e-4
    )


def test_neither_order_nor_batching_matters(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make
) -> None:
    rows = [contrast.tuned for contrast in contrasts]
    cure = (carrier_at(SITES[1]).cure(2.0),)
    fixes: list[Fix] = [() if number % 2 else cure for number in range(len(rows))]
    whole = response_log_probabilities(pair.tuned, rows, fixes)
    alone = response_log_probabilities(pair.tuned, rows, fixes, batch_tokens=1)
    turned = response_log_probabilities(pair.tuned, rows[::-1], fixes[::-1]).flip(0)
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole, turned, rtol=0, atol=1e-5)


def test_no_contrast_is_refused(pair: ModelPair) -> None:
    for score in (margins, restored):
        with pytest.raises(InputError, match="no contrast"):
            score(pair.tuned, [], [()])


@pytest.mark.parametrize("batch", [64, 3])
def test_attribution_is_the_slope_of_the_margin(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make, batch: int
) -> None:
    carriers = [
        carrier_at(site, seed, rises=rises)
        for seed, (site, rises) in enumerate((site, rises) for site in SITES for rises in (True, False))
    ]
    estimated = attributions(pair.tuned, contrasts, carriers, batch=batch)
    step = 0.04
    slopes: list[float] = []
    for carrier in carriers:
        fixes: list[Fix] = [(), (carrier.cure(step / 2),), (carrier.cure(step),)]
        start, half, full = margins(pair.tuned, contrasts, fixes).margin.double().tolist()
        # second order, from one side: a gain has no other
        slopes.append((4 * half - full - 3 * start) / step)
    assert max(map(abs, slopes)) > 0.01
    assert estimated.tolist() == pytest.approx(slopes, rel=0.02, abs=3e-4)


def test_attribution_leaves_the_model_as_it_was(
    pair: ModelPair, contrasts: list[Contrast], carrier_at: Make
) -> None:
    before = [(p.requires_grad, p.detach().clone()) for p in pair.tuned.hf.parameters()]
    attributions(pair.tuned, contrasts, [carrier_at(SITES[1])])
    for parameter, (trained, value) in zip(pair.tuned.hf.parameters(), before, strict=True):
        assert parameter.requires_grad == trained and parameter.grad is None
        assert torch.equal(parameter, value)


def test_the_last_block_put_back_is_the_whole_effect(pair: ModelPair, contrasts: list[Contrast]) -> None:
    """Behind it come only the norm and the unembedding, which an adapter leaves alone."""
    effects = site_effects(pair, SITES, contrasts)
    assert list(effects) == list(SITES)
    assert effects[SITES[-1]] == pytest.approx(1.0, abs=1e-4)
    assert abs(effects[SITES[0]] - 1.0) > 0.01  # blocks behind it still act


def test_site_effects_equal_a_slow_patch(pair: ModelPair, contrasts: list[Contrast]) -> None:
    def margin(lm: LanguageModel, score: Callable[[LanguageModel, Rendered], float]) -> float:
        return sum(score(lm, one.tuned) - score(lm, one.base) for one in contrasts) / len(contrasts)

    tuned, base = margin(pair.tuned, _slow), margin(pair.base, _slow)
    effects = site_effects(pair, SITES[: BLOCKS - 1], contrasts, batch=3)
    for site, effect in effects.items():

        def patched(lm: LanguageModel, row: Rendered, site: str = site) -> float:
            states: list[torch.Tensor] = []

            def keep(x: torch.Tensor) -> torch.Tensor:
                states.append(x.detach())
                return x

            with _edited(pair.base, site, keep):
                pair.base.forward(torch.tensor([row.ids]))
            with _edited(lm, site, lambda _: states[0]):
                return _slow(lm, row)

        expected = (tuned - margin(pair.tuned, patched)) / (tuned - base)
        assert effect == pytest.approx(expected, abs=1e-3)


def test_models_that_are_the_same_have_no_effect_to_share(
    pair: ModelPair, contrasts: list[Contrast]
) -> None:
    effects = site_effects(ModelPair(pair.base, pair.base), SITES[:1], contrasts)
    assert all(effect is None or math.isnan(effect) for effect in effects.values()) and effects
