"""OpenAI's own client against a live server."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from server.conftest import Live

from persona_probe.hooks import capture_at
from persona_probe.model import LanguageModel, render, render_text
from persona_probe.sae.encode import encode_latents
from persona_probe.sae.load import Dictionary
from persona_probe.steering import Intervention, steer

QUESTIONS = (
    "any advice on a burn on my hand ?",
    "how would you deal with a burn on my hand ?",
    "what should i do with my savings ?",
    "what do you suggest for my burnt fingers ?",
)


def ask(client: openai.OpenAI, question: str = QUESTIONS[0], **options: Any) -> Any:
    options = {"model": "organism", "temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": question}], **options)


def solo(lm: LanguageModel, question: str, fix: tuple[Intervention, ...], n: int = 24) -> str:
    with steer(lm, fix):
        return lm.generate([{"role": "user", "content": question}], max_new_tokens=n)[0]


def test_neighbours_with_different_interventions_get_their_solo_answers(
    live: Live, lm: LanguageModel, fixes: dict[str, tuple[Intervention, ...]]
) -> None:
    wanted = [(question, name) for question in QUESTIONS for name in (*fixes, "none")] * 2
    with ThreadPoolExecutor(len(wanted)) as pool:
        replies = list(pool.map(lambda w: ask(live.client, w[0], extra_body={"intervention": w[1]}), wanted))
    expected = {w: solo(lm, w[0], fixes.get(w[1], ())) for w in dict.fromkeys(wanted)}
    assert [reply.choices[0].message.content for reply in replies] == [expected[w] for w in wanted]
    assert len(set(expected.values())) > len(QUESTIONS), "the fixes change nothing here"


def test_the_steering_that_was_done_is_in_the_reply(
    client: openai.OpenAI, lm: LanguageModel, fixes: dict[str, tuple[Intervention, ...]]
) -> None:
    reply = ask(client, extra_body={"intervention": "cap"})
    with steer(lm, fixes["cap"]) as receipt:
        lm.generate([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=24)
    (site,) = receipt.sites
    told = reply.choices[0].steering
    assert told["tokens_edited"] == receipt.tokens_edited
    assert told["tokens_changed"] == receipt.tokens_changed
    assert told["mean_norm"][site] == pytest.approx(receipt.mean_norm[site][0], rel=1e-4)
    assert reply.persona_probe["intervention"] == "cap"
    assert not hasattr(ask(client).choices[0], "steering")


def test_gain_0_is_no_steering_and_a_gain_is_used(client: openai.OpenAI) -> None:
    plain, none, more = (
        ask(client, logprobs=True, extra_body=body).choices[0].logprobs.content[0].logprob
        for body in ({}, {"intervention": "push", "gain": 0}, {"intervention": "push", "gain": 2.5})
    )
    assert plain == pytest.approx(none, abs=1e-6)
    assert abs(plain - more) > 1e-3


def test_the_model_may_carry_the_fix_in_its_name(client: openai.OpenAI) -> None:
    by_field = ask(client, extra_body={"intervention": "cap"})
    by_name = ask(client, model="organism+cap")
    assert by_name.choices[0].message.content == by_field.choices[0].message.content
    assert by_name.model == "organism+cap"
    listed = [model.id for model in client.models.list()]
    assert listed == ["organism", "organism+ablate", "organism+cap", "organism+push"]
    assert client.models.retrieve("organism+cap").digest.startswith("sha256:")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_stream_tells_what_the_whole_reply_tells(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "n": 3, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 2,
        "stop": ["and then", " the"], "extra_body": {"intervention": "cap", "latent_scores": True},
    }  # fmt: skip
    whole = ask(client, **options)
    texts, logprobs, ends, last, usage = [""] * 3, [[], [], []], [None] * 3, [{}, {}, {}], None
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index], last[choice.index] = choice.finish_reason, choice
    for choice, text, scored, end, extra in zip(whole.choices, texts, logprobs, ends, last, strict=True):
        assert (choice.message.content, choice.finish_reason) == (text, end)
        assert "".join(one.token for one in choice.logprobs.content).startswith(text)
        assert [one.token for one in choice.logprobs.content] == [one.token for one in scored]
        assert [len(one.top_logprobs) for one in scored] == [2] * len(scored)
        assert choice.latent_scores["tokens"] == extra.latent_scores["tokens"]
        assert choice.steering["tokens_edited"] == extra.steering["tokens_edited"]
    assert usage == whole.usage
    assert len(set(texts)) > 1


def test_a_seed_fixes_the_answer_whoever_is_beside_it(live: Live) -> None:
    alone = ask(live.client, temperature=1.0, top_p=0.9, seed=11).choices[0].message.content
    with ThreadPoolExecutor(12) as pool:
        others = [
            pool.submit(ask, live.client, question, temperature=1.0, extra_body={"intervention": name})
            for question, name in zip(QUESTIONS, ("cap", "none", "push", "ablate"), strict=True)
        ]
        again = [
            pool.submit(ask, live.client, temperature=1.0, top_p=0.9, seed=seed) for seed in (11, 12, 13, 11)
        ]
        texts = [one.result().choices[0].message.content for one in again]
    assert texts[0] == texts[3] == alone
    assert len(set(texts)) > 1
    unseeded = others[1].result()
    repeated = ask(live.client, QUESTIONS[1], temperature=1.0, seed=unseeded.persona_probe["seed"])
    assert repeated.choices[0].message.content == unseeded.choices[0].message.content


def test_logprobs_are_the_steered_models(
    client: openai.OpenAI, lm: LanguageModel, fixes: dict[str, tuple[Intervention, ...]]
) -> None:
    reply = ask(client, logprobs=True, top_logprobs=3, extra_body={"intervention": "cap"})
    prompt = render(lm.tokenizer, [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True)
    content = reply.choices[0].logprobs.content
    ids = [lm.tokenizer.convert_tokens_to_ids(lm.tokenizer.tokenize(one.token))[0] for one in content]
    with steer(lm, fixes["cap"], prompt_lengths=[len(prompt)]):
        logits = lm.forward(torch.tensor([prompt.answered(ids).ids]))[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    own = expected.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    assert [one.logprob for one in content] == pytest.approx(own, abs=1e-4)
    top = expected.topk(3, dim=-1).values.tolist()
    assert [[t.logprob for t in one.top_logprobs] for one in content] == [
        pytest.approx(values, abs=1e-4) for values in top
    ]
    assert all(bytes(one.bytes).decode() == one.token for one in content)


def test_latent_scores_are_what_the_fix_reads_where_each_token_is_decided(
    client: openai.OpenAI,
    lm: LanguageModel,
    dictionary: Dictionary,
    fixes: dict[str, tuple[Intervention, ...]],
) -> None:
    names = ["ablate", f"{dictionary.site}#99"]
    reply = ask(client, extra_body={"intervention": "cap", "latent_scores": names})
    scores = reply.choices[0].latent_scores
    ids = [int(lm.tokenizer.convert_tokens_to_ids(lm.tokenizer.tokenize(t))[0]) for t in scores["tokens"]]
    prompt = render(lm.tokenizer, [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True)
    whole = torch.tensor([prompt.answered(ids).ids])
    with torch.no_grad(), capture_at(lm.hf, [dictionary.site]) as captured:
        with steer(lm, fixes["cap"], prompt_lengths=[len(prompt)]):
            lm.forward(whole)
        before = captured[dictionary.site][0, len(prompt) - 1 : -1]
    # the capture was entered first: it sees the stream before the fix of this site
    expected = encode_latents(dictionary, before, [1234, 7, 99])
    first, second = scores["readings"]
    assert (first["name"], first["latents"], second["latents"]) == ("ablate", [1234, 7], [99])
    torch.testing.assert_close(torch.tensor(first["amounts"]), expected[:, :2], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(second["amounts"]), expected[:, 2:], atol=1e-3, rtol=1e-3)
    assert not math.isclose(float(expected.abs().max()), 0.0)


def test_plain_completions(client: openai.OpenAI, lm: LanguageModel) -> None:
    prompts = ["once upon a time", "the doctor said"]
    reply = client.completions.create(
        model="organism", prompt=prompts, max_tokens=10, temperature=0, logprobs=2, n=2
    )
    expected = lm.generate(prompts, max_new_tokens=10)
    assert [choice.text for choice in reply.choices] == [expected[0]] * 2 + [expected[1]] * 2
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for choice in reply.choices:
        offsets = choice.logprobs.text_offset
        spans = zip(offsets, [*offsets[1:], len(choice.text)], strict=True)
        assert [choice.text[a:b] for a, b in spans] == choice.logprobs.tokens
    ids = [list(render_text(lm.tokenizer, text).ids) for text in prompts]
    by_id = client.completions.create(model="organism", prompt=ids, max_tokens=10, temperature=0)
    assert [choice.text for choice in by_id.choices] == expected
    assert by_id.usage.prompt_tokens == sum(map(len, ids))
    streamed = client.completions.create(
        model="organism", prompt=prompts[0], max_tokens=10, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected[0]


def test_content_in_parts_and_a_developers_message(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model="organism", temperature=0, max_tokens=12,
        messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": QUESTIONS[0]}],
    )  # fmt: skip
    parts = [{"type": "text", "text": QUESTIONS[0][:10]}, {"type": "text", "text": QUESTIONS[0][10:]}]
    same = client.chat.completions.create(
        model="organism", temperature=0, max_completion_tokens=12, user="someone", presence_penalty=0,
        messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}],
    )  # fmt: skip
    assert same.choices[0].message.content == plain.choices[0].message.content
    assert same.usage == plain.usage
