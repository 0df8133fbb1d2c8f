"""Directions in and out: probes, layers, thresholds, published files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.errors import InputError, MismatchError, MissingPathError, NonFiniteError
from persona_probe.model import LanguageModel, Rendered
from persona_probe.steering import Intervention, latents, steer
from persona_probe.steering.layers import directions_by_layer
from persona_probe.steering.persona_vectors import load_persona_vectors, load_trait
from persona_probe.steering.probe import logistic_direction, mean_shift, separation
from persona_probe.steering.target import direction
from persona_probe.steering.threshold import amounts_on, threshold_at, threshold_of
from tests.steering.conftest import D_MODEL, SITES, make_dictionary

VECTORS, TRAIT = "qwen3-32b_evil_response_avg_diff.pt", "evil_trait_extract.json"


def two_clouds(n: int, gap: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """n rows in 6 dimensions, half of them shifted by `gap` along the second."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    x[:, 0] *= 9
    has = torch.arange(n) % 2 == 0
    x[has, 1] += gap
    return x, has


def test_the_probe_is_where_the_gradient_vanishes() -> None:
    """Of scikit-learn's objective with C = 1 / penalty, on standardised activations."""
    x, has = two_clouds(80, 1.0)
    weight = logistic_direction(x, has, penalty=0.5)
    scaled = (x.double() - x.double().mean(0)) / x.double().std(0)
    w = (weight * x.double().std(0)).clone().requires_grad_()
    sign = torch.where(has, 1.0, -1.0).double()
    # the intercept has its own optimum, found here by bisection of its monotone derivative
    low, high = -50.0, 50.0
    for _ in range(200):
        b = (low + high) / 2
        slope = float((-sign * torch.sigmoid(-sign * (scaled @ w.detach() + b))).sum())
        low, high = (b, high) if slope < 0 else (low, b)
    loss = torch.log1p(torch.exp(-sign * (scaled @ w + b))).sum() + 0.25 * (w**2).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    assert float(gradient.abs().max()) < 1e-5


def test_a_probe_ignores_a_loud_dimension_that_says_nothing() -> None:
    x, has = two_clouds(400, 2.0)
    weight = logistic_direction(x, has)
    assert int(weight.abs().argmax()) == 1
    x[:, 0] *= 50
    assert torch.allclose(logistic_direction(x, has)[1:], weight[1:], rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), gap=st.sampled_from([0.0, 1.0, 3.0]))
def test_separation_is_counted_pair_by_pair(seed: int, gap: float) -> None:
    x, has = two_clouds(36, gap, seed)
    groups = [f"g{i // 6}" for i in range(36)]
    got = separation(x, has, groups, folds=3)
    wins = pairs = 0.0
    for fold in range(3):
        out = [i for i in range(36) if (i // 6) % 3 == fold]
        rest = [i for i in range(36) if i not in out]
        d = mean_shift(x[rest], has[rest])
        for i in out:
            for j in out:
                if has[i] and not has[j]:
                    a, b = float(x[i].double() @ d), float(x[j].double() @ d)
                    wins, pairs = wins + (a > b) + 0.5 * (a == b), pairs + 1
    assert got.auc == pytest.approx(wins / pairs) and got.groups == 6


def test_whole_groups_are_held_out() -> None:
    """Labels that only tell the groups apart are learnt row by row, and worth nothing on new groups."""
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(20, 64, generator=generator)
    x = centres.repeat_interleave(10, 0) + torch.randn(200, 64, generator=generator)
    has = torch.rand(20, generator=generator).repeat_interleave(10) > 0.5
    has[::10] ^= True  # every group has rows of both kinds
    groups = [f"g{i // 10}" for i in range(200)]
    by_row = separation(x, has, [f"g{i % 10}" for i in range(200)], logistic_direction)
    by_group = separation(x, has, groups, logistic_direction)
    assert by_row.auc > 0.85 and by_group.auc < 0.7


def test_separation_needs_something_to_hold_out() -> None:
    x, has = two_clouds(8, 1.0)
    with pytest.raises(InputError, match="two are needed"):
        separation(x, has, ["same"] * 8)
    with pytest.raises(InputError, match="0 of 8 groups"):
        separation(x, has, [str(i) for i in range(8)])
    with pytest.raises(MismatchError, match="7 groups"):
        separation(x, has, ["a"] * 7)
    x[0] = torch.nan
    with pytest.raises(NonFiniteError):
        separation(x, has, ["a", "a", "b", "b"] * 2)


def answered(prompt: list[int], answer: list[int]) -> Rendered:
    return Rendered(tuple(prompt), (False,) * len(prompt), len(prompt)).answered(answer)


def test_directions_layer_by_layer(llama: LanguageModel) -> None:
    """From means over response tokens, read off the model's own hidden states."""
    prompts = [[4, 5 + q, 6] for q in range(6)]
    having = [answered(p, [20, 21 + i % 2, 22]) for i, p in enumerate(prompts)]
    lacking = [answered(p, [30, 31]) for p in prompts]
    names = [f"q{i}" for i in range(6)]
    found = directions_by_layer(llama, having, lacking, (names, names), methods=("means", "probe"))
    assert len(found.directions) == 6 and found.table["best"].sum() == 1
    states: list[list[torch.Tensor]] = []
    for row in (*having, *lacking):
        with torch.no_grad():
            out = llama.hf(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        states.append([state[0, 3:].mean(0) for state in out])
    for block in range(2):  # the last hidden state is behind the final norm
        with_it = torch.stack([s[block + 1] for s in states[:6]]).mean(0)
        without = torch.stack([s[block + 1] for s in states[6:]]).mean(0)
        one = found.at(SITES[block], "means")
        assert torch.allclose(one.vector, with_it - without, atol=1e-5)
        assert one.separation.auc == 1.0 and one.residual_rms > 0
    assert found.best.separation.gap == max(
        one.separation.gap for one in found.directions if one.separation.auc == found.best.separation.auc
    )
    assert found.plot().data and "auc" in found._repr_html_()
    with steer(llama, Intervention("project_out", found.best.target, found.best.site)), torch.no_grad():
        llama.hf(torch.tensor([[4, 5]]))
    with pytest.raises(InputError, match="no direction at"):
        found.at("blocks.9.hook_resid_post")
    with pytest.raises(MismatchError, match="as many groups"):
        directions_by_layer(llama, having, lacking, (names, names[1:]))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), rate=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_a_threshold_is_an_order_statistic(n: int, rate: float, seed: int) -> None:
    amounts = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if 1 / (n + 1) > rate + 1e-9:
        with pytest.raises(InputError, match=r"cannot show a false-positive rate"):
            threshold_of(amounts, rate)
        return
    found = threshold_of(amounts, rate)
    # a new amount is equally likely to fall in each of the n + 1 gaps
    gaps_above = int((amounts.double() >= found.value).sum())
    assert gaps_above / (n + 1) <= rate + 1e-9
    assert (gaps_above + 1) / (n + 1) > rate - 1e-9
    assert found.seen == pytest.approx((gaps_above - 1) / n)


def test_a_threshold_holds_on_new_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    exceeded: list[float] = []
    for _ in range(400):
        value = threshold_of(torch.randn(39, generator=generator), 0.05).value
        exceeded.append(float((torch.randn(200, generator=generator) > value).float().mean()))
    assert sum(exceeded) / 400 == pytest.approx(0.05, abs=0.006)


def test_a_threshold_from_prompts_gates_an_edit(llama: LanguageModel) -> None:
    harmless = [Rendered((4 + i, 9, 5 + i, 6), (False,) * 4, 4) for i in range(19)]
    target = latents(make_dictionary(), [7])
    found = threshold_at(0.1, llama, harmless, target, SITES[1])
    assert found.n == 19 and found.seen <= 0.1 and "19 prompts" in str(found)
    fix = Intervention(
        "ablate", direction(torch.ones(D_MODEL)), SITES[1], "response", condition=found.condition(target)
    )
    touched = 0
    for row in harmless:
        with steer(llama, fix) as receipt, torch.no_grad():
            llama.hf(torch.tensor([row.ids]))
        touched += receipt.tokens_edited > 0
    assert touched == round(found.seen * 19)
    per_token = threshold_at(0.1, llama, harmless, direction(torch.ones(D_MODEL)), SITES[1], decided="token")
    assert per_token.n == 19 * 4 and per_token.condition().decided == "token"
    with pytest.raises(InputError, match="at least 99"):
        threshold_at(0.01, llama, harmless, target, SITES[1])
    with pytest.raises(InputError, match="one latent"):
        threshold_at(0.1, llama, harmless, latents(make_dictionary(), [7, 8]), SITES[1])


def test_scales_as_measured(llama: LanguageModel) -> None:
    rows = [Rendered((4, 9, 5), (False,) * 3, 3), Rendered((7, 8), (False,) * 2, 2)]
    target = latents(make_dictionary(), [7, 3])
    found = amounts_on(llama, rows, target, SITES[1], sink_factor=None)
    with torch.no_grad():
        states = [
            llama.hf(torch.tensor([r.ids]), output_hidden_states=True).hidden_states[2][0] for r in rows
        ]
    x = torch.cat(states)
    z = target.amounts(x, "encoder")
    assert found.scale("max_activation") == pytest.approx(tuple(z.amax(0).tolist()), abs=1e-5)
    assert found.scale("residual_rms") == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    level = found.level(2.0, unit="residual_rms")
    assert level.absolute()[0] == pytest.approx(2 * found.residual_rms)


def test_a_published_file_of_vectors(published: Callable[[str], Path]) -> None:
    vectors = load_persona_vectors(published(VECTORS))
    assert vectors.rows.shape == (65, 5120) and vectors.n_layers == 64
    assert torch.equal(vectors.at("blocks.31.hook_resid_post"), vectors.rows[32])
    assert torch.equal(vectors.at("blocks.32.hook_resid_pre"), vectors.rows[32])
    assert vectors.sites[0] == "blocks.0.hook_resid_pre" and len(vectors.sites) == 64
    assert vectors.target(vectors.sites[-1]).d_model == 5120
    with pytest.raises(InputError, match="after the final norm"):
        vectors.at("blocks.63.hook_resid_post")
    with pytest.raises(InputError, match="no vector for"):
        vectors.at("blocks.3.hook_mlp_out")


def test_vectors_of_another_model_are_refused(llama: LanguageModel, published: Callable[[str], Path]) -> None:
    path = published(VECTORS)
    with pytest.raises(MismatchError, match="64 layers of width 5120"):
        load_persona_vectors(path, llama)


def test_vectors_are_rows_of_hidden_states(llama: LanguageModel, tmp_path: Path) -> None:
    with torch.no_grad():
        out = llama.hf(torch.tensor([[4, 5, 6]]), output_hidden_states=True).hidden_states
    torch.save(torch.stack([state[0, -1] for state in out]), tmp_path / "v.pt")
    vectors = load_persona_vectors(tmp_path / "v.pt", llama)
    for site in vectors.sites:
        edit = Intervention("project_out", vectors.target(site), site, (2,))
        with steer(llama, edit) as receipt, torch.no_grad():
            llama.hf(torch.tensor([[4, 5, 6]]))
        # the activation itself is what is projected out, all of it
        assert receipt.mean_norm[site][0] == pytest.approx(float(vectors.at(site).norm()), rel=1e-4)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Evil(), "weights alone"),
        ({"a": torch.ones(3)}, r"got dict"),
        (torch.ones(3), r"got \(3,\)"),
        (torch.full((4, D_MODEL), torch.nan), "NaN"),
    ],
)
def test_a_file_that_is_no_vectors(content: Any, says: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError, match=says):
        load_persona_vectors(tmp_path / "v.pt")
    with pytest.raises(MissingPathError):
        load_persona_vectors(tmp_path / "none.pt")


def test_a_published_trait(published: Callable[[str], Path]) -> None:
    trait = load_trait(published(TRAIT))
    assert len(trait.instructions) == 5 and len(trait.questions) == 20 and trait.eval_prompt
    asked_for = ("evil", "harm", "suffer", "cruel")
    assert all(any(word in asks for word in asked_for) for asks, _ in trait.instructions)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"questions": ["a"]}, '"instruction" must be'),
        ({"instruction": [{"pos": "a"}], "questions": ["a"]}, '"instruction" must be'),
        ({"instruction": [{"pos": "a", "neg": "b"}], "questions": "a"}, '"questions" must be'),
        ({"instruction": [], "questions": []}, "needs instruction pairs"),
        ([], '"instruction" must be'),
    ],
)
def test_a_file_that_is_no_trait(content: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        load_trait(tmp_path / "t.json")
