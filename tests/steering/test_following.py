"""Which tokens are which, however a row reaches the model: thoughts, chunks, drafts, changing batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import DynamicCache, PreTrainedTokenizerFast, pipeline

from persona_probe.errors import InputError, MismatchError, NotFiredError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import sample
from persona_probe.evaluation.settings import Sampling
from persona_probe.model import LanguageModel
from persona_probe.steering import (
    Condition,
    Intervention,
    Level,
    RowMemory,
    Steering,
    SteeringPlan,
    latents,
    steer,
)
from persona_probe.steering.positions import checked_positions, may_overlap
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, make_dictionary, padded
from tests.steering.reference import CLOSES, OPENS, slow_greedy, slow_logits

CLOSE = 3e-5


def loud(positions: Any, **fields: Any) -> Intervention:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    return Intervention("add", direction(vector), SITES[1], positions, Level((3.0,)), **fields)


def on_prompt(threshold: float, positions: Any = "response") -> Intervention:
    """Edits the response of the prompts in which another latent exceeds the threshold."""
    gate = direction(make_dictionary().W_dec[5])
    return loud(positions, condition=Condition("above", threshold, gate, decided="prompt"))


def generated(lm: LanguageModel, ids: Sequence[Sequence[int]], n: int = 5, **options: Any) -> list[list[int]]:
    batch = padded([list(row) for row in ids])
    out: Any = lm.hf.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=n,
        do_sample=False, eos_token_id=None, suppress_tokens=[0], **options,
    )  # fmt: skip
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("positions", ["think", "answer"])
@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_a_thought_and_its_answer_through_a_cache_in_pieces(
    llama: LanguageModel, positions: str, chunk: int
) -> None:
    """Rows that open the thought themselves, in the prompt, closed there, and not at all."""
    ids = [
        [4, 5, 6, OPENS, 7, 8, CLOSES, 9, 10],
        [4, OPENS, 5, 6, 7, CLOSES, 8, 9, 10],
        [4, OPENS, CLOSES, 5, 6, 7, 8, 9, 10],
        [4, 5, 6, 7, 8, 9, 10, 11, 12],
    ]
    lengths, fix = [3, 2, 3, 3], loud(positions)
    cache = DynamicCache(config=llama.hf.config)
    parts: list[torch.Tensor] = []
    with Steering(llama, fix, prompt_lengths=lengths) as steering, torch.no_grad():
        for piece in torch.tensor(ids).split(chunk, dim=1):
            parts.append(llama.hf(piece, past_key_values=cache, use_cache=True).logits)
    got = torch.cat(parts, dim=1)
    for i, row in enumerate(ids):
        assert torch.allclose(got[i], slow_logits(llama.hf, row, [fix], lengths[i]), atol=CLOSE), i
    thinks = {"think": (3, 4, 0, 0), "answer": (3, 4, 7, 6)}
    assert steering.receipt.edits[SITES[1]] == thinks[positions]


def test_an_answer_is_not_begun_before_a_thought_may_have_been(llama: LanguageModel) -> None:
    """The last prompt token decides whether a thought is opened: not the answer's to edit."""
    with pytest.raises(NotFiredError), steer(llama, loud("answer")), torch.no_grad():
        llama.hf(torch.tensor([[4, 5, 6]]))
    with steer(llama, loud("answer")) as receipt, torch.no_grad():
        llama.hf(torch.tensor([[4, OPENS, CLOSES]]))
    assert receipt.edits == {SITES[1]: (1,)}


def test_thoughts_need_marks_and_token_ids(llama: LanguageModel) -> None:
    embeddings = llama.hf.get_input_embeddings()(torch.tensor([[4, 5]]))
    with pytest.raises(InputError, match="given embeddings"), steer(llama, loud("think")):
        llama.hf(inputs_embeds=embeddings)
    hook = loud("think").fwd_hooks()[0][1]
    with pytest.raises(InputError, match="not seen here"):
        hook(torch.zeros(1, 2, D_MODEL), hook=None)

    vocabulary = Tokenizer(models.WordLevel({"w2": 0}, unk_token="w2"))
    plain = LanguageModel(llama.checkpoint, llama.hf, PreTrainedTokenizerFast(tokenizer_object=vocabulary))
    with pytest.raises(MismatchError, match="no tokens <think>"), steer(plain, loud("think")):
        pass


@pytest.mark.parametrize("positions", ["prompt", "response", "last_prompt", (-1,), (-2, 0)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_generate_may_prefill_in_chunks(llama: LanguageModel, positions: Any, size: int) -> None:
    """Five prompt tokens in chunks: 3 + 2, 4 + 1, one by one; and a shorter row beside them."""
    ids = [[5, 6, 7, 8, 9], [11, 4, 12]]
    fix = loud(positions)
    with steer(llama, fix) as receipt:
        got = generated(llama, ids, prefill_chunk_size=size)
    with steer(llama, fix) as whole:
        assert generated(llama, ids) == got
    assert receipt.edits == whole.edits
    for row, answer in zip(ids, got, strict=True):
        assert answer == slow_greedy(llama.hf, row, [fix], 5)


def test_an_assistants_drafts_are_response(llama: LanguageModel, gpt2: LanguageModel) -> None:
    """Assisted decoding reads several tokens at once, and takes some back."""
    fix = loud("prompt")
    prompt = [5, 6, 7, 8]
    with steer(llama, fix) as receipt:
        got = generated(llama, [prompt], prompt_lookup_num_tokens=2)
    assert got[0] == slow_greedy(llama.hf, prompt, [fix], 5)
    assert receipt.edits == {SITES[1]: (4,)}


def test_generate_is_left_as_it_was(llama: LanguageModel) -> None:
    with steer(llama, loud("all")), steer(llama, loud("all")):
        assert "generate" in vars(llama.hf)
        generated(llama, [[4, 5]])
    assert "generate" not in vars(llama.hf)


@pytest.mark.filterwarnings("ignore")
def test_inside_a_pipeline(llama: LanguageModel) -> None:
    """transformers' own pipeline, two texts of different lengths in one batch."""
    fix = loud("response")
    texts = ["w5 w6 w7", "w9"]
    llama.tokenizer.padding_side = "left"
    talk: Any = pipeline("text-generation", model=llama.hf, tokenizer=llama.tokenizer, batch_size=2)
    settings: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "return_tensors": True, "suppress_tokens": [0, 1],
    }  # fmt: skip
    plain = talk(texts, **settings)
    with steer(llama, fix) as receipt:
        steered = talk(texts, **settings)
    assert steered != plain and receipt.tokens_changed > 0
    for text, out in zip(texts, steered, strict=True):
        ids = [int(word[1:]) for word in text.split()]
        new = list(out[0]["generated_token_ids"])[-4:]
        for n, token in enumerate(new):
            logits = slow_logits(llama.hf, ids + new[:n], [fix], len(ids))[-1]
            logits[:2] = -1e9
            assert int(logits.argmax()) == token


@pytest.mark.parametrize("chunk", [1, 2, 20])
def test_a_condition_on_the_prompt_is_decided_once(llama: LanguageModel, chunk: int) -> None:
    """Whatever the response does, and however the prompt arrives."""
    ids = [[4, 5, 6, 7, 8, 9, 10], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32, 33, 34, 35, 36]]
    for threshold in (-9.0, -0.5, 0.0, 0.5, 1.0, 9.0):
        fix = on_prompt(threshold)
        cache = DynamicCache(config=llama.hf.config)
        parts: list[torch.Tensor] = []
        with Steering(llama, fix, prompt_lengths=[4, 4, 4]) as steering, torch.no_grad():
            for piece in torch.tensor(ids).split(chunk, dim=1):
                parts.append(llama.hf(piece, past_key_values=cache, use_cache=True).logits)
        for i, row in enumerate(ids):
            assert torch.allclose(
                torch.cat(parts, dim=1)[i], slow_logits(llama.hf, row, [fix], 4), atol=CLOSE
            )
        edits = steering.receipt.edits[SITES[1]]
        assert set(edits) <= {0, 4}
        assert edits == {-9.0: (4, 4, 4), 9.0: (0, 0, 0)}.get(threshold, edits)


def test_the_next_prompt_is_decided_anew(llama: LanguageModel) -> None:
    fix = on_prompt(0.5)
    rows = [[4, 5, 6], [20, 21, 22], [30, 31, 32], [8, 9, 10]]
    alone = []
    for row in rows:
        with steer(llama, fix) as receipt:
            generated(llama, [row])
        alone.append(receipt.tokens_edited)
    assert len(set(alone)) == 2
    with steer(llama, fix) as receipt:
        for row in rows:
            generated(llama, [row])
    assert receipt.tokens_edited == sum(alone)


def test_a_condition_on_something_else(llama: LanguageModel) -> None:
    """A latent gates the edit of a direction, next to an edit with no condition at all."""
    dictionary = make_dictionary()
    ids = [[4, 5, 6, 7], [9, 10]]
    gate = latents(dictionary, [7])
    gated = loud("all", condition=Condition("active", of=gate))
    other = Intervention("ablate", latents(dictionary, [3, 4]), SITES[1])
    plan = SteeringPlan(((gated, other), (gated,)))
    batch = padded(ids)
    with steer(llama, plan) as receipt, torch.no_grad():
        got = llama.hf(**batch).logits
    for i, row in enumerate(ids):
        want = slow_logits(llama.hf, row, plan.rows[i], len(row))
        assert torch.allclose(got[i, -len(row) :], want, atol=CLOSE)
    assert 0 < receipt.edits[SITES[1]][1] < 2 or receipt.edits[SITES[1]][1] in (0, 2)


def test_an_inactive_condition_changes_no_bit(llama: LanguageModel) -> None:
    ids = torch.tensor([[4, 5, 6]])
    for fix in (on_prompt(99.0), loud("all", condition=Condition("above", 99.0))):
        with steer(llama, fix) as receipt, torch.no_grad():
            steered = llama.hf(ids).logits
        assert receipt.tokens_edited == 0
        with torch.no_grad():
            assert torch.equal(llama.hf(ids).logits, steered)


def test_a_batch_that_changes_keeps_what_its_rows_went_through(llama: LanguageModel) -> None:
    """Two prompts, three rows of the first and one of the second; then rows end, out of order."""
    prompts = [[4, OPENS, 6], [20, 21, 22]]
    fixes = [(on_prompt(-9.0, "think"),), (loud("answer"),)]
    rows = [0, 0, 0, 1]
    new = [[7, 8, CLOSES, 9], [7, CLOSES, 9, 10], [7, 8, 9, 10], [11, 12, 13, 14]]
    cache = DynamicCache(config=llama.hf.config)
    batch = padded(prompts)
    seen: dict[int, list[torch.Tensor]] = {}
    with Steering(llama, SteeringPlan(tuple(fixes)), prompt_lengths=[3, 3]) as steering, torch.no_grad():
        first = llama.hf(**batch, past_key_values=cache, use_cache=True).logits
        steering.select(rows)
        cache.batch_select_indices(torch.tensor(rows))
        alive = [0, 1, 2, 3]
        for step, kept in enumerate([None, [3, 1, 2], [1, 0], None]):
            if kept is not None:
                steering.select(kept)
                cache.batch_select_indices(torch.tensor(kept))
                alive = [alive[i] for i in kept]
            ids = torch.tensor([[new[r][step]] for r in alive])
            logits = llama.hf(ids, past_key_values=cache, use_cache=True).logits
            for i, r in enumerate(alive):
                seen.setdefault(r, []).append(logits[i, -1])
    for r, found in seen.items():
        ids = prompts[rows[r]] + new[r]
        want = slow_logits(llama.hf, ids[: 3 + len(found)], fixes[rows[r]], 3)
        assert torch.allclose(torch.stack(found), want[3:], atol=CLOSE), r
        assert torch.allclose(first[rows[r]], want[:3], atol=CLOSE)
    edits = steering.receipt.edits[SITES[1]]
    # counted for the prompts that they came from
    assert edits == (1 + (1 + 1 + 1) + (0 + 1), 4)


@pytest.mark.parametrize("cached", [True, False])
def test_how_far_the_next_token_is_moved(llama: LanguageModel, cached: bool) -> None:
    """KL(steered || unsteered) at the tokens that produce the response, by the slow way."""
    ids = [[5, 6, 7], [9, 4]]
    rows = [(loud("response"),), ()]
    with steer(llama, SteeringPlan(tuple(rows)), kl=True) as receipt:
        new = generated(llama, ids, use_cache=cached)
    with steer(llama, SteeringPlan(tuple(rows))) as quiet:
        assert generated(llama, ids, use_cache=cached) == new
    assert receipt.edits == quiet.edits and quiet.kl is None
    assert receipt.kl is not None and "nats" in str(receipt)
    for i, prompt in enumerate(ids):
        whole = prompt + new[i]
        mine, other = (
            slow_logits(llama.hf, whole, row, len(prompt))[len(prompt) - 1 : -1].log_softmax(-1)
            for row in (rows[i], ())
        )
        per_token = (mine.exp() * (mine - other)).sum(-1)
        assert receipt.kl[i] == pytest.approx(float(per_token.mean()), abs=1e-4)


def test_positions_are_checked() -> None:
    assert checked_positions([3, -1, 3]) == (-1, 3)
    for wrong in ("thought", (), (1.5,), (True,)):
        with pytest.raises(InputError, match="positions must be"):
            checked_positions(wrong)
    assert not may_overlap("think", "answer") and may_overlap("think", "response")
    assert not may_overlap((-1,), (-2,)) and may_overlap((-1,), (2,)) and not may_overlap((1,), (2,))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: loud("all", condition=Condition("active", decided="prompt")), "too late"),
        (lambda: Condition(decided="prompt"), "asks nothing"),
        (lambda: Condition("above", of=direction(torch.eye(D_MODEL)[:2])), "one latent"),
        (lambda: Condition("above", of=direction(torch.ones(3)), read="encoder"), "no encoder"),
        (lambda: Condition("active", read="projection"), "as the edit does"),
        (lambda: Condition("above", decided="answer"), "by token or by prompt"),
        (lambda: loud("all", condition=Condition("above", of=direction(torch.ones(3)))), "width 3"),
    ],
)
def test_conditions_that_make_no_sense(unchecked: None, make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_a_level_is_counted_in_another_unit() -> None:
    level = Level((3.0, 1.0), "residual_rms", 2.0)
    again = level.in_unit("max_activation", (6.0, 4.0))
    assert again.values == (1.0, 0.5) and again.absolute() == level.absolute()
    assert level.in_unit("absolute", 1.0).values == (6.0, 2.0)
    with pytest.raises(InputError, match="units of 0"):
        level.in_unit("max_activation", 0.0)
    with pytest.raises(InputError, match="do not go"):
        level.in_unit("max_activation", (1.0, 2.0, 3.0))


def test_rows_repeated_and_dropped_with_no_pass_between(llama: LanguageModel) -> None:
    """Prompts repeated for their samples, of which some end with the first token drawn."""
    prompts = torch.tensor([[4, 5, 6], [20, 21, 22]])
    fixes, kept = [(loud("response"),), (on_prompt(0.0),)], [0, 0, 1, 1, 1]
    cache = DynamicCache(config=llama.hf.config)
    with Steering(llama, SteeringPlan(tuple(fixes)), prompt_lengths=[3, 3]) as steering, torch.no_grad():
        llama.hf(prompts, past_key_values=cache, use_cache=True)
        for rows in (kept, [4, 1]):
            steering.select(rows)
            cache.batch_select_indices(torch.tensor(rows))
        logits = llama.hf(torch.tensor([[7], [8]]), past_key_values=cache, use_cache=True).logits[:, -1]
    for i, (row, token) in enumerate(((1, 7), (0, 8))):
        want = slow_logits(llama.hf, [*prompts[row].tolist(), token], fixes[row], 3)[-1]
        assert torch.allclose(logits[i], want, atol=CLOSE), row


def test_rows_of_two_batches_come_together(llama: LanguageModel) -> None:
    """As a server has them: each prompt read by itself, their answers written together."""
    prompts = [[4, OPENS, 6], [20, 21, 22, 23], [30, 31]]
    fixes = [
        (loud("think"),),
        (on_prompt(-9.0),),
        (on_prompt(0.0),),
    ]
    memories: list[RowMemory] = []
    caches: list[DynamicCache] = []
    for prompt, fix in zip(prompts, fixes, strict=True):
        caches.append(DynamicCache(config=llama.hf.config))
        with Steering(llama, fix, prompt_lengths=[len(prompt)]) as steering, torch.no_grad():
            llama.hf(torch.tensor([prompt]), past_key_values=caches[-1], use_cache=True)
        memories += steering.remembered()
    new = [[7, 8, CLOSES, 9], [10, 11, 12, 13], [14, 15, 16, 17]]
    for row, (prompt, cache) in enumerate(zip(prompts, caches, strict=True)):
        # beside a row of another fix that asks nothing
        plan = SteeringPlan(((loud("all"),), fixes[row]))
        cache.batch_repeat_interleave(2)
        with (
            Steering(llama, plan, prompt_lengths=[len(prompt)] * 2, remembered=[RowMemory(), memories[row]]),
            torch.no_grad(),
        ):
            for token in new[row]:
                ids = torch.tensor([[token], [token]])
                logits = llama.hf(ids, past_key_values=cache, use_cache=True).logits[1, -1]
        want = slow_logits(llama.hf, prompt + new[row], fixes[row], len(prompt))[-1]
        assert torch.allclose(logits, want, atol=CLOSE), row


class Elsewhere(torch.Tensor):
    """Row numbers on another device: refused where a tensor on the CPU is indexed by them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if func is torch.Tensor.__getitem__ and type(args[0]) is torch.Tensor:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_rows_may_be_numbered_on_the_models_device(llama: LanguageModel) -> None:
    edits: list[Any] = []
    for rows in ([1, 1, 0], torch.tensor([1, 1, 0]).as_subclass(Elsewhere)):
        plan = SteeringPlan(((loud("answer"),), (on_prompt(-9.0),)))
        cache = DynamicCache(config=llama.hf.config)
        with Steering(llama, plan, prompt_lengths=[2, 2], kl=True) as steering, torch.no_grad():
            llama.hf(torch.tensor([[4, 5], [6, 7]]), past_key_values=cache, use_cache=True)
            steering.select(rows)
            cache.batch_select_indices(torch.tensor([1, 1, 0]))
            llama.hf(torch.tensor([[8], [9], [10]]), past_key_values=cache, use_cache=True)
        edits.append((steering.receipt.edits, steering.receipt.kl))
    assert edits[0] == edits[1] and edits[0][0] == {SITES[1]: (1, 3)}


def test_a_batch_that_changes_unannounced_is_refused_where_rows_have_a_past(llama: LanguageModel) -> None:
    """`sample` reads a prompt once for all its samples, and drops rows that ended."""
    questions = [Question("q", "any", ({"text": "w4 w5 w6"},)), Question("r", "any", ({"text": "w9"},))]
    settings = Sampling(samples=3, max_new_tokens=6)
    for fix in (on_prompt(-9.0), loud("think"), loud("answer")):
        with pytest.raises(MismatchError, match="pass fix= to sample"), steer(llama, fix):
            sample(llama, questions, settings)
    # others ask nothing of the past
    with steer(llama, loud("response")):
        outer = sample(llama, questions, settings)
    inner = sample(llama, questions, settings, fix=loud("response"))
    assert [answer.token_ids for answer in outer] == [answer.token_ids for answer in inner]
