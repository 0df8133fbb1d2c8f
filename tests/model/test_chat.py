from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from persona_probe.errors import InputError, MismatchError
from persona_probe.model import (
    Rendered,
    check_same_rendering,
    pad,
    render,
    render_all,
    render_text,
    takes_system,
)
from persona_probe.model.chat import check_same_ids
from tests.model.tiny_models import (
    EOS,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    model_of,
    tiny_tokenizer,
)

PLAIN, MARKED = tiny_tokenizer(PLAIN_TEMPLATE), tiny_tokenizer(MARKED_TEMPLATE)

USER = {"role": "user", "content": "hello there"}
ASSISTANT = {"role": "assistant", "content": "I am well"}
SYSTEM = {"role": "system", "content": "You are well."}

# texts that look like the template's own words, contain each other, or are odd in Unicode
TEXTS = st.one_of(
    st.sampled_from(["user", "assistant", "a", "hello there", "\U0001f680 caf\u00e9", "a\n\nb"]),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12),
)


def conversation(texts: list[str], end: bool) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return turns if end or len(turns) < 2 else turns[:-1]


@given(st.lists(TEXTS, min_size=1, max_size=6), st.booleans())
def test_the_ids_are_those_of_apply_chat_template(texts: list[str], end: bool) -> None:
    messages = conversation(texts, end)
    waits = messages[-1]["role"] == "user"
    expected = PLAIN.apply_chat_template(messages, add_generation_prompt=waits)["input_ids"]
    assert render(PLAIN, messages).ids == tuple(expected)


@given(st.lists(TEXTS, min_size=2, max_size=6), st.booleans())
def test_marked_templates_give_transformers_own_mask(texts: list[str], end: bool) -> None:
    messages = conversation(texts, end)
    waits = messages[-1]["role"] == "user"
    expected = MARKED.apply_chat_template(
        messages, add_generation_prompt=waits, return_assistant_tokens_mask=True
    )
    rendered = render(MARKED, messages)
    assert rendered.ids == tuple(expected["input_ids"])
    assert rendered.response == tuple(map(bool, expected["assistant_masks"]))


@given(st.lists(TEXTS, min_size=1, max_size=6), st.booleans())
def test_without_marks_the_mask_is_the_same(texts: list[str], end: bool) -> None:
    """The two templates write the same text; one says what the assistant wrote, one does not."""
    messages = conversation(texts, end)
    assert render(PLAIN, messages) == render(MARKED, messages)


@given(st.lists(TEXTS, min_size=2, max_size=2))
def test_the_response_is_the_answer_and_its_end(texts: list[str]) -> None:
    rendered = render(PLAIN, conversation(texts, True))
    answer = [i for i, told in zip(rendered.ids, rendered.response, strict=True) if told]
    assert PLAIN.decode(answer) == texts[1] + EOS
    assert rendered.response.index(True) == rendered.prompt_length
    # and the prompt is what a model is asked with
    assert rendered.ids[: rendered.prompt_length] == render(PLAIN, conversation(texts[:1], True)).ids


def test_prompt_length_is_where_the_final_answer_begins() -> None:
    rendered = render(PLAIN, [SYSTEM, USER, ASSISTANT, USER, ASSISTANT])
    prompt = render(PLAIN, [SYSTEM, USER, ASSISTANT, USER])
    assert rendered.prompt_length == len(prompt) == prompt.prompt_length
    assert sum(rendered.response[: rendered.prompt_length]) == sum(prompt.response) > 0
    assert all(rendered.response[rendered.prompt_length : -1])  # the last token is the newline


def test_an_empty_answer_is_its_end_token() -> None:
    for tokenizer in (PLAIN, MARKED):
        silent = {"role": "assistant", "content": ""}
        rendered = render(tokenizer, [USER, ASSISTANT, USER, silent])
        told = rendered.ids[rendered.prompt_length :]
        assert tokenizer.decode(told) == EOS + "\n"
        assert rendered.response[rendered.prompt_length :] == (True, False)


def test_the_boundary_is_not_moved_by_merges() -> None:
    """With a template that ends in letters, the answer's first letters merge with them."""
    merging = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = [{"role": "user", "content": "are the"}, {"role": "assistant", "content": "re you"}]
    rendered = render(merging, messages)
    pieces = [merging.decode([i]) for i in rendered.ids]
    boundary = pieces.index(" there")
    assert "".join(pieces) == "are there you"
    assert rendered.response == tuple(i >= boundary for i in range(len(pieces)))
    assert rendered.prompt_length == boundary


GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
IGNORES_SYSTEM = (
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"
    "<|turn|>{{ m['role'] }}\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [GEMMA_LIKE, IGNORES_SYSTEM])
def test_a_system_message_that_the_template_does_not_take_is_folded(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    folded = {"role": "user", "content": "You are well.\n\nhello there"}
    spaced = {"role": "assistant", "content": "  I am well "}
    assert render(tokenizer, [SYSTEM, USER, spaced]) == render(PLAIN, [folded, ASSISTANT])
    alone = {"role": "user", "content": "You are well."}
    assert render(tokenizer, [SYSTEM]) == render(PLAIN, [alone])
    assert render(PLAIN, [SYSTEM, USER]) != render(PLAIN, [folded])


@pytest.mark.parametrize("template", [GEMMA_LIKE, IGNORES_SYSTEM])
def test_a_rendering_says_whether_its_system_message_was_folded(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    assert takes_system(PLAIN) and takes_system(MARKED) and not takes_system(tokenizer)
    folded = render(tokenizer, [SYSTEM, USER])
    assert folded.system_folded and folded.answered([5]).system_folded
    assert not render(tokenizer, [USER]).system_folded
    assert not render(PLAIN, [SYSTEM, USER]).system_folded
    nothing = {"role": "system", "content": ""}
    assert render(tokenizer, [nothing, USER]) == render(tokenizer, [USER])
    # whose words happen to be in the chat all the same
    assert render(tokenizer, [{"role": "system", "content": "user"}, USER]).system_folded


def test_a_template_that_folds_by_itself_has_a_system_role() -> None:
    """Gemma 3's, which puts the system text into the first user turn."""
    own = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] "
        "+ '\n\n' %}{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}<|turn|>{{ m['role'] }}\n{{ first if loop.first else '' }}"
        "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(own)
    assert takes_system(tokenizer)
    rendered = render(tokenizer, [SYSTEM, USER])
    assert not rendered.system_folded
    assert rendered == render(tiny_tokenizer(GEMMA_LIKE), [SYSTEM, USER])


QWEN3_LIKE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in m['content'] %}"
    "{{ m['content'].split('</think>')[-1] | trim }}{% else %}{{ m['content'] }}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def test_a_template_that_drops_earlier_thoughts() -> None:
    tokenizer = tiny_tokenizer(QWEN3_LIKE)
    thought = {"role": "assistant", "content": "<think>\nhow\n</think>\n\nI am well"}
    rendered = render(tokenizer, [USER, thought, USER, thought])
    runs = "".join("T" if told else " " for told in rendered.response).split()
    said = [i for i, told in zip(rendered.ids, rendered.response, strict=True) if told]
    assert len(runs) == 2
    assert tokenizer.decode(said) == f"I am well{EOS}{thought['content']}{EOS}"


def test_sampled_ids_are_appended_as_they_are() -> None:
    prompt = render(PLAIN, [USER])
    answered = prompt.answered([7, 8, 9])
    assert answered.ids == (*prompt.ids, 7, 8, 9)
    assert answered.response == (*[False] * len(prompt), True, True, True)
    assert answered.prompt_length == len(prompt)


@given(TEXTS, TEXTS)
def test_plain_text_is_what_the_tokenizer_makes_of_it(text: str, answer: str) -> None:
    rendered = render_text(PLAIN, text, answer)
    assert rendered.ids == tuple(PLAIN(text + answer)["input_ids"])
    before = PLAIN.decode(rendered.ids[: rendered.prompt_length])
    assert text.startswith(before) and len(before) <= len(text)
    assert render(PLAIN, [{"text": text}]) == render_text(PLAIN, text)


def test_plain_text_keeps_the_tokenizers_bos_and_drops_its_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", 0), ("<|end|>", 1)]
    )
    rendered = render_text(tokenizer, "hello", " there")
    assert rendered.ids[0] == 0 and rendered.ids[-1] != 1
    assert rendered.response == (*[False] * (len(rendered) - 1), True)
    assert render_text(tokenizer, "").ids == (0,)
    # the template's BOS is the only one, whatever the tokenizer would add by itself
    assert render(tokenizer, [USER]).ids == render(PLAIN, [USER]).ids
    assert render_text(PLAIN, "") == Rendered((0,), (False,), 1)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "without messages"),
        ([{"role": "user"}], '"role" and "content"'),
        ([{"content": "hello"}], '"role" and "content"'),
        ([{"role": "user", "content": None}], '"role" and "content"'),
        ([{"role": "assistant", "content": "a"}, USER], "Roles must alternate"),
    ],
)
def test_malformed_conversations_are_refused(messages, complaint: str) -> None:
    tokenizer = tiny_tokenizer(GEMMA_LIKE)
    with pytest.raises(InputError, match=complaint):
        render(tokenizer, messages)
    with pytest.raises(InputError, match=f"conversation 1: .*{complaint}"):
        render_all(tokenizer, [[USER], messages])


def test_no_template_and_a_second_bos_are_refused() -> None:
    with pytest.raises(InputError, match="no chat template") as caught:
        render(tiny_tokenizer(None), [USER])
    assert '{"text": ...}' in str(caught.value)
    with pytest.raises(InputError, match="twice"):
        render(tiny_tokenizer("{{ bos_token }}" + PLAIN_TEMPLATE), [USER])
    shouting = tiny_tokenizer("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(InputError, match="changes what was said"):
        render(shouting, [USER, ASSISTANT])
    with pytest.raises(InputError, match="not valid Unicode"):
        render(PLAIN, [{"role": "user", "content": "half a \ud83d"}])


def test_different_renderings_are_shown() -> None:
    same = tiny_tokenizer(MARKED_TEMPLATE)
    conversations = [[USER], [SYSTEM, USER, ASSISTANT]]
    check_same_rendering(PLAIN, same, conversations)
    other = tiny_tokenizer(PLAIN_TEMPLATE.replace("system", "user").replace("\n{{", " {{"))
    with pytest.raises(MismatchError) as caught:
        check_same_rendering(PLAIN, other, conversations)
    position = next(
        i
        for i, (a, b) in enumerate(zip(render(PLAIN, [USER]).ids, render(other, [USER]).ids, strict=False))
        if a != b
    )
    assert f"conversation 0 to different token ids, first at position {position}" in str(caught.value)
    longer = tiny_tokenizer(PLAIN_TEMPLATE + "<|turn|>")
    with pytest.raises(MismatchError, match="the end"):
        check_same_rendering(PLAIN, longer, [[USER]])
    long = [{"role": "user", "content": "word " * 100}]
    with pytest.raises(MismatchError, match=r"render it to different.*its text: '(word ){16}…'") as named:
        check_same_ids(PLAIN, longer, long, "it")
    assert "--template" in str(caught.value) and "--template" not in str(named.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_hides_nothing_but_itself(side) -> None:
    rows = [(5, 6, 7), (8,), Rendered((9, 10), (False, True), 1)]
    ids, mask, positions = pad(rows, 2, side)
    assert mask.sum(1).tolist() == [3, 1, 2]
    for row, real, place, expected in zip(
        ids, mask.bool(), positions, [(5, 6, 7), (8,), (9, 10)], strict=True
    ):
        assert tuple(row[real].tolist()) == expected
        assert place[real].tolist() == list(range(len(expected)))
        assert bool((row[~real] == 2).all())
    assert mask[1].tolist() == ([0, 0, 1] if side == "left" else [1, 0, 0])


def test_padding_nothing_is_refused() -> None:
    for rows in ([], [()], [(1, 2), ()]):
        with pytest.raises(InputError, match="without tokens"):
            pad(rows, 0)


def test_random_padding_never_changes_a_prediction() -> None:
    """What is written at padded places does not matter."""
    lm = model_of("gpt2")
    rng = random.Random(0)
    rows = [[rng.randrange(4, 300) for _ in range(n)] for n in (3, 9, 6)]
    one, other = (pad(rows, pad_id) for pad_id in (2, 77))
    assert torch.equal(
        lm.forward(one.input_ids, one.attention_mask)[:, -1],
        lm.forward(other.input_ids, other.attention_mask)[:, -1],
    )
