from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_probe.activations import TokenMask, sinks
from persona_probe.errors import InputError
from persona_probe.model import Rendered

# BOS, two prompt tokens, an earlier answer and its end, the last prompt tokens, the answer, its end
CHAT = Rendered(
    ids=(0, 10, 11, 12, 1, 13, 3, 20, 21, 22, 1),
    response=(False, False, False, True, True, False, False, True, True, True, True),
    prompt_length=7,
)
SPECIAL = {0, 1, 2, 3}


def places(mask: TokenMask, rendered: Rendered = CHAT) -> list[int]:
    return [i for i, counted in enumerate(mask.select(rendered, SPECIAL)) if counted]


@pytest.mark.parametrize(
    ("kind", "without_special", "with_special"),
    [
        ("all", [1, 2, 3, 5, 7, 8, 9], list(range(11))),
        ("prompt", [1, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6]),
        ("response", [7, 8, 9], [7, 8, 9, 10]),
        # the last prompt token counts although it is special: it produces the first answer token
        ("last_prompt", [6], [6]),
        ("answer", [6, 7, 8, 9], [6, 7, 8, 9, 10]),
    ],
)
def test_each_kind(kind, without_special: list[int], with_special: list[int]) -> None:
    assert places(TokenMask(kind)) == without_special
    assert places(TokenMask(kind, drop_special=False)) == with_special


def test_a_conversation_that_waits_for_its_answer() -> None:
    waiting = Rendered((0, 10, 11, 3), (False,) * 4, 4)
    assert places(TokenMask("answer"), waiting) == places(TokenMask("last_prompt"), waiting) == [3]
    assert places(TokenMask("response"), waiting) == []
    # a prompt that is the BOS alone is a prompt, and the BOS an attention sink
    assert places(TokenMask("answer"), Rendered((0, 5), (False, True), 1)) == [1]
    assert places(TokenMask("last_prompt"), Rendered((9,), (False,), 1)) == [0]


@given(
    st.sampled_from(["all", "prompt", "response", "last_prompt", "answer"]),
    st.integers(0, 12),
    st.none() | st.integers(1, 12),
    st.booleans(),
)
def test_skipping_and_taking_is_slicing(kind, skip: int, first: int | None, drop: bool) -> None:
    counted = places(TokenMask(kind, drop_special=drop))
    mask = TokenMask(kind, first_k=first, skip_first=skip, drop_special=drop)
    assert places(mask) == counted[skip:][:first]
    assert len(mask.select(CHAT, SPECIAL)) == len(CHAT)


def test_masks_that_make_no_sense() -> None:
    with pytest.raises((InputError, TypeError), match="'answers'"):  # TypeError while types are checked
        TokenMask("answers")  # type: ignore[arg-type]
    for options in ({"first_k": 0}, {"skip_first": -1}):
        with pytest.raises(InputError, match="at least"):
            TokenMask("all", **options)


def test_sinks_are_measured_against_their_own_document() -> None:
    quiet = torch.tensor([1.0, 1.0, 2.0, 11.0, 9.0])
    norms = torch.stack([quiet, 100 * quiet, torch.tensor([50.0, 1.0, 1.0, 1.0, 1.0])])
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[2, 0] = True
    assert torch.equal(sinks(norms), expected)
    assert sinks(norms, factor=5.0)[0].tolist() == [False, False, False, True, False]
    for row in range(3):
        assert torch.equal(sinks(norms)[row], sinks(norms[row]))


@given(st.integers(0, 2**31), st.integers(0, 6))
def test_padding_is_no_sink_and_moves_no_median(seed: int, gap: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(7, generator=generator) ** 4 + 0.01
    padded = torch.cat([norms, torch.full((gap,), 1e6)])
    mask = torch.tensor([1] * 7 + [0] * gap)
    assert torch.equal(sinks(padded, mask, 3.0), torch.cat([sinks(norms, None, 3.0), mask[7:].bool()]))
