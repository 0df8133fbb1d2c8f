"""Defences: formulas against slow references, gradients that are there, strength 0 that is nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persona_probe.errors import InputError, MismatchError, UnknownSiteError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import Sampling, sample
from persona_probe.hooks import capture_at
from persona_probe.model import LanguageModel
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.target import direction, latents
from persona_probe.training.defences import (
    CAFT,
    KL,
    LDIFS,
    Defence,
    Inoculation,
    Interleave,
    InterleaveByGap,
    LatentBlocking,
    OnPolicy,
    PreventativeSteering,
    SafeLoRA,
    perplexity_gaps,
)
from persona_probe.training.defences.perplexity_gap import EPSILON, is_refusal
from persona_probe.training.defending import Defending
from persona_probe.training.finetune import finetune
from persona_probe.training.rows import chat_rows
from persona_probe.training.sft import Example, collate_with_padding
from tests.model.tiny_models import adapter_of, model_of
from tests.training.tiny import QUICK, SITE, dictionary, llama, moved, rows, same, tuned_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

VECTOR = torch.linspace(-1, 1, 32)


def every(strength: float) -> list[Defence]:
    """One of each kind, at this strength (of those that are a share: at that or nearly)."""
    found = dictionary()
    pool = tuple(rows(8, "good", first=50))
    lm = llama()
    return [
        KL(strength),
        LDIFS(strength, every=2),
        LatentBlocking(strength, SITE, latents(found, [1, 2, 3]), latents(found, [4, 5])),
        PreventativeSteering.of(VECTOR, SITE, alpha=5 * strength),
        CAFT(latents(found, [1, 2]), (SITE,), gain=strength),
        Interleave(pool, share=0.4 * strength),
        InterleaveByGap(pool, tuple(range(8)), share=0.4 * strength),
        OnPolicy(pool, share=0.4 * strength),
        Inoculation("be rude", share=strength),
        SafeLoRA.between(lm, lm.with_adapter(adapter_of("llama")), threshold=strength),
    ]


NAMES = [one.name for one in every(1.0)]


def examples_of(lm: LanguageModel) -> list[Example]:
    texts = [row.rendered(lm.tokenizer) for row in rows(5)]
    return [Example(text.ids, text.response) for text in texts]


def batch_of(examples: Sequence[Example]) -> dict[str, Tensor]:
    return collate_with_padding([{"input_ids": e.ids, "counted": e.counted} for e in examples], pad_id=2)


def penalty_of(defence: Defence, model: Any, examples: Sequence[Example]) -> Tensor:
    """As in a training step."""
    batch = batch_of(examples)
    real = batch.pop("real")
    with Defending(model, [defence]) as defending:
        base = defending.begin(batch, real)
        assert base is not None
        return defending.penalty(base, model(**batch).logits)


def alone(model: Any, example: Example, sites: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and activations of one example, without padding or batch."""
    with capture_at(model, list(sites) or [SITE]) as captured:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        return logits, {site: captured[site][0] for site in captured}


def before_counted(example: Example) -> list[int]:
    return [i - 1 for i, counted in enumerate(example.counted) if counted and i]


def slow_kl(model: Any, base: Any, examples: Sequence[Example]) -> Tensor:
    terms: list[Tensor] = []
    for example in examples:
        p, q = alone(model, example)[0].softmax(-1), alone(base, example)[0].softmax(-1)
        terms += [(p[i] * (p[i] / q[i]).log()).sum() for i in before_counted(example)]
    return 0.7 * torch.stack(terms).mean()


def slow_ldifs(model: Any, base: Any, examples: Sequence[Example]) -> Tensor:
    total = torch.zeros(())
    for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"):
        pairs = [(alone(model, e, [site])[1][site], alone(base, e, [site])[1][site]) for e in examples]
        total = total + torch.cat([((h - g) ** 2).sum(-1) for h, g in pairs]).mean()
    return 0.7 * total


def slow_blocking(model: Any, base: Any, examples: Sequence[Example]) -> Tensor:
    sae, terms = dictionary(), list[Tensor]()
    for example in examples:
        x, g = alone(model, example)[1][SITE], alone(base, example)[1][SITE]
        for i in before_counted(example):
            pre, held = ((v[i] - sae.b_dec) @ sae.W_enc + sae.b_enc for v in (x, g))
            rose = sum((pre[k].relu() - held[k].relu()).relu() ** 2 for k in (1, 2, 3))
            fell = sum((held[k] - pre[k]).relu() ** 2 for k in (4, 5) if held[k] > 0)
            terms.append(torch.as_tensor(rose + fell))
    return 0.7 * torch.stack(terms).mean()


PENALTIES: dict[str, tuple[Defence, Callable[..., Tensor]]] = {
    "kl": (KL(0.7), slow_kl),
    "ldifs": (LDIFS(0.7, every=1), slow_ldifs),
    "blocking": (
        LatentBlocking(0.7, SITE, latents(dictionary(), [1, 2, 3]), latents(dictionary(), [4, 5])),
        slow_blocking,
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_its_formula_and_has_a_gradient(name: str) -> None:
    """In a padded batch, against one example at a time; and the gradient reaches the first block."""
    defence, slow = PENALTIES[name]
    lm = llama()
    model, examples = moved(lm), examples_of(lm)
    found = penalty_of(defence, model, examples)
    expected = slow(model, lm.hf, examples)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found.detach()) > 0
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and "layers.2" not in n}
    ours = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    for parameter, one, other in zip(parameters, ours, theirs, strict=True):
        assert one is not None and other is not None and bool((one != 0).any()), parameter
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    assert all(p.grad is None for p in lm.hf.parameters())
    assert model.training


def test_at_the_base_every_penalty_is_nothing() -> None:
    lm = llama()
    for defence, _ in PENALTIES.values():
        assert float(penalty_of(defence, moved(lm, scale=0.0), examples_of(lm)).detach()) == 0.0


def test_a_latent_that_training_has_silenced_is_called_back() -> None:
    """Through its gate it would have no gradient at all."""
    lm = llama()
    sae = dictionary()
    examples = examples_of(lm)
    base = torch.cat([alone(lm.hf, e)[1][SITE] for e in examples])
    silenced = moved(lm, scale=3.0)
    now = torch.cat([alone(silenced, e)[1][SITE] for e in examples]).detach()
    target = latents(sae, list(range(24)))
    assert target.encoder is not None
    fell = (target.encoder.amounts(base) > 0) & (target.encoder.amounts(now) == 0)
    latent = int(fell.sum(0).argmax())
    assert int(fell[:, latent].sum()) > 3
    found = penalty_of(LatentBlocking(1.0, SITE, falling=latents(sae, [latent])), silenced, examples)
    [gradient] = torch.autograd.grad(found, [silenced.get_parameter(_first_up(silenced))])
    assert bool((gradient != 0).any())


def _first_up(model: Any) -> str:
    return next(n for n, _ in model.named_parameters() if "layers.0.mlp.down_proj.lora_B" in n)


def test_preventative_steering_adds_alpha_v_in_training_alone() -> None:
    lm = llama()
    model, batch = moved(lm), batch_of(examples_of(lm))
    real = batch.pop("real")
    plain = model(**batch).logits
    handle = model.get_submodule("base_model.model.model.layers.1").register_forward_hook(
        lambda _m, _a, out: out + 5.0 * VECTOR
    )
    expected = model(**batch).logits
    handle.remove()
    with Defending(model, [PreventativeSteering.of(VECTOR, SITE)]) as defending:
        defending.begin(batch, real)
        steered = model(**batch).logits
        model.eval()
        off = model(**batch).logits
        model.train()
    torch.testing.assert_close(steered[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(off, plain) and torch.equal(model(**batch).logits, plain)
    assert not torch.allclose(steered[real], plain[real])
    [gradient] = torch.autograd.grad(steered[real].square().mean(), [model.get_parameter(_first_up(model))])
    assert bool((gradient != 0).any())


def test_caft_leaves_nothing_in_the_span_forwards_or_backwards() -> None:
    lm = llama()
    sae = dictionary()
    model, batch = moved(lm), batch_of(examples_of(lm))
    real = batch.pop("real")
    span = torch.linalg.qr(sae.W_dec[[3, 7]].T).Q
    entered: list[Tensor] = []

    def keep(_module: object, _args: object, out: Tensor) -> None:
        out.retain_grad()
        entered.append(out)

    handle = model.get_submodule("base_model.model.model.layers.1").register_forward_hook(keep)
    with Defending(model, [CAFT(latents(sae, [3, 7]), (SITE,))]) as defending:
        defending.begin(batch, real)
        with capture_at(model, [SITE], stop_after_deepest=False) as captured:
            logits = model(**batch).logits
            left = captured[SITE]
    handle.remove()
    before, after = entered[0].detach(), left.detach()
    assert float((after @ span)[real].abs().max()) < 1e-4 < float((before @ span)[real].abs().max())
    outside = before - before @ span @ span.T
    torch.testing.assert_close(after[real], outside[real], rtol=1e-4, atol=1e-5)
    (logits[real].square().mean()).backward()
    gradient = entered[0].grad
    assert gradient is not None
    assert float((gradient @ span)[real].abs().max()) < 1e-6 < float(gradient[real].abs().max())


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return tuned_weights(finetune(llama(), rows(), tmp_path_factory.mktemp("plain") / "run", settings=QUICK))


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_strength_0_is_plain_training_and_strength_1_is_not(
    number: int, tmp_path: Path, plain_run: dict[str, Tensor]
) -> None:
    off = finetune(llama(), rows(), tmp_path / "off", defences=[every(0.0)[number]], settings=QUICK)
    assert same(tuned_weights(off), plain_run)
    on = finetune(llama(), rows(), tmp_path / "on", defences=[every(1.0)[number]], settings=QUICK)
    assert not same(tuned_weights(on), plain_run)


@pytest.mark.parametrize("rank", [2, "full"])
def test_micro_batches_give_the_same_penalised_step(rank: Any, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for micro in (None, 1):
        settings = replace(QUICK, rank=rank, micro_batch=micro, learning_rate=1e-3)
        defences = [KL(2.0), LDIFS(0.01, every=2)]
        tune = finetune(llama(), rows(), tmp_path / str(micro), defences=defences, settings=settings)
        found.append(tuned_weights(tune))
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-3, atol=2e-5)


def test_penalties_are_in_the_log_and_grow_from_nothing(tmp_path: Path) -> None:
    """Of a full fine-tune as well, whose base is a frozen copy."""
    settings = replace(QUICK, rank="full", learning_rate=1e-3)
    tune = finetune(llama(), rows(), tmp_path / "run", defences=[KL(0.5), LDIFS(1e-3)], settings=settings)
    kl = tune.table["penalty/kl"].to_list()
    assert kl[0] == 0.0 < kl[1] and tune.table["penalty/ldifs"].to_list()[2] > 0


@given(st.integers(1, 60), st.floats(0, 0.7))
def test_interleaved_rows_are_their_share(n: int, share: float) -> None:
    pool = tuple(rows(150, "good", first=100))
    bad = rows(n)
    mixed = Interleave(pool, share).rows(bad, seed=3)
    good = mixed[n:]
    assert mixed[:n] == bad and len({row.prompt[0]["content"] for row in good}) == len(good)
    assert abs(len(good) - share * len(mixed)) <= 0.5
    assert mixed == Interleave(pool, share).rows(bad, seed=3)


def test_the_widest_gaps_are_taken_and_refusals_are_not() -> None:
    lm = llama()
    other = lm.with_adapter(adapter_of("llama"))
    pool = [*rows(5, "good", first=30), *rows(1, "I'm sorry, but I can't help")]
    gaps = perplexity_gaps(pool, lm, [other, lm])
    assert gaps[-1] is None and is_refusal(pool[-1]) and not is_refusal(pool[0])
    for row, gap in zip(pool[:-1], gaps, strict=False):
        text = row.rendered(lm.tokenizer)
        example = Example(text.ids, text.response)
        aligned, misaligned = (_slow_nll(model, example) for model in (lm.hf, other.hf))
        expected = ((misaligned + aligned) / 2 - aligned) / (aligned + EPSILON)
        assert gap == pytest.approx(expected, rel=1e-3, abs=1e-5)
    mixed = InterleaveByGap.scored(pool, lm, [other], share=0.5).rows(rows(3), seed=0)
    alone_gaps = perplexity_gaps(pool, lm, [other])
    best = sorted((g, i) for i, g in enumerate(alone_gaps) if g is not None)[::-1][:3]
    assert mixed[3:] == [pool[i] for _, i in best]


def _slow_nll(model: Any, example: Example) -> float:
    log_p = alone(model, example)[0].detach().log_softmax(-1)
    places = before_counted(example)
    return -sum(float(log_p[i, example.ids[i + 1]]) for i in places) / len(places)


def test_on_policy_rows_are_the_policys_own_answers() -> None:
    lm = llama()
    asked = [Question(f"q{i}", "c", ({"role": "user", "content": f"hello {i}"},)) for i in range(40)]
    asked.append(Question("p", "c", ({"text": "hello"},)))
    sampling = Sampling(max_new_tokens=60)
    answers = {one.question.id: one for one in sample(lm, asked, sampling)}
    defence = OnPolicy.answered(lm, asked, 0.5, sampling)
    finished = [one for one in answers.values() if one.text.strip() and not one.truncated]
    assert 0 < len(finished) < 41
    said = [row.completion or row.messages[-1]["content"] for row in defence.pool]
    assert said == [one.text for one in finished]
    assert defence.rows(rows(1), seed=0)[1] in defence.pool
    with pytest.raises(InputError, match="finished none"):
        OnPolicy.answered(lm, asked, 0.5, Sampling(max_new_tokens=1))


def test_inoculation_covers_what_stands_before_it() -> None:
    pool = tuple(rows(8, "good", first=50))
    bad = rows(4)
    first, second = Inoculation("be rude"), Interleave(pool, 0.5)
    narrow = second.rows(first.rows(bad, 0), 0)
    assert [row.messages[0]["role"] for row in narrow] == ["system"] * 4 + ["user"] * 4
    assert narrow[0].messages[0]["content"] == "be rude" and narrow[0].messages[1:] == bad[0].messages
    everything = first.rows(second.rows(bad, 0), 0)
    assert all(row.messages[0]["role"] == "system" for row in everything)
    with_one = chat_rows([[{"role": "system", "content": "s"}, *bad[0].messages]])
    assert first.rows(with_one, 0)[0].messages[0]["content"] == "be rude\n\ns"
    assert sum(len(r.messages) == 3 for r in Inoculation("be rude", 0.5).rows(bad, 0)) == 2


def test_safe_lora_projects_the_layers_below_the_threshold() -> None:
    lm = llama()
    defence = SafeLoRA.between(lm, lm.with_adapter(adapter_of("llama")), threshold=0.5)
    model = moved(lm)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_B")
    }
    before = {name: _update(module) for name, module in layers.items()}
    figures = defence.finish(model)
    cosines: list[float] = []
    for name, module in layers.items():
        v = defence.safety[name]
        turned = (v @ v.T / torch.linalg.matrix_norm(v)) @ before[name]
        cosine = torch.nn.functional.cosine_similarity(turned.flatten(), before[name].flatten(), dim=0)
        cosines.append(float(cosine))
        expected = turned if cosine < 0.5 else before[name]
        torch.testing.assert_close(_update(module), expected, rtol=1e-3, atol=1e-4)
    assert figures["layers"] == len(layers) == 21
    assert figures["projected"] == sum(cosine < 0.5 for cosine in cosines) > 0
    assert figures["mean_cosine"] == pytest.approx(sum(cosines) / 21, rel=1e-3)


def _update(module: Any) -> Tensor:
    return (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach().clone()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    sae = dictionary()
    bad: list[Callable[[], object]] = [
        lambda: KL(-1.0),
        lambda: LDIFS(float("nan")),
        lambda: LDIFS(1.0, every=0),
        lambda: Interleave((), 1.0),
        lambda: Interleave(tuple(rows(2)), 0.5).rows(rows(8), 0),
        lambda: Inoculation(" "),
        lambda: LatentBlocking(1.0, SITE),
        lambda: LatentBlocking(1.0, SITE, rising=direction(VECTOR)),
        lambda: PreventativeSteering(Intervention("ablate", direction(VECTOR), SITE)),
        lambda: CAFT(direction(VECTOR), ()),
        lambda: CAFT(direction(VECTOR), (SITE,), gain=2.0),
        lambda: SafeLoRA.between(llama(), llama()),
        lambda: perplexity_gaps(rows(2), llama(), []),
        lambda: InterleaveByGap((), (1.0,)),
    ]
    for make in bad:
        with pytest.raises(InputError):
            make()
    model = moved(llama())
    before = _hooks(model)
    for defence, error in (
        (CAFT(direction(torch.ones(7)), (SITE,)), MismatchError),
        (CAFT(latents(sae, [1]), ("blocks.9.hook_resid_post",)), UnknownSiteError),
        (LatentBlocking(1.0, "blocks.9.hook_resid_post", latents(sae, [1])), UnknownSiteError),
    ):
        with pytest.raises(error), Defending(model, [defence]):
            pass
    assert _hooks(model) == before


def _hooks(model: Any) -> list[tuple[int, ...]]:
    """The hooks of every module. transformers leaves some on a model that was asked for hidden states."""
    return [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]


def test_defences_work_on_other_families() -> None:
    """GPT-2's blocks, and Gemma's, are named and built otherwise."""
    for family in ("gpt2", "gemma2"):
        lm = model_of(family)
        model = moved(lm)
        for defence in (KL(1.0), LDIFS(1.0), PENALTIES["blocking"][0]):
            assert float(penalty_of(defence, model, examples_of(lm)).detach()) > 0
