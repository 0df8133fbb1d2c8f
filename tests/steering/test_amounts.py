"""The amounts of a fix's targets, against one conversation, one token, one latent at a time in fp64."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from persona_probe.errors import InputError, NotFiredError
from persona_probe.model import LanguageModel
from persona_probe.model.chat import Rendered
from persona_probe.sae.load import Dictionary
from persona_probe.steering import Intervention, Level, latents
from persona_probe.steering.amounts import gauges_of, read_amounts
from persona_probe.steering.target import direction
from tests.steering.conftest import SITES, random_intervention
from tests.steering.reference import token_delta, touches


def slow_amount(edit: Intervention, column: int, x: Tensor) -> float:
    """One latent's activation (or projection) at one token `[d_model]`."""
    target, encoder, x = edit.target, edit.target.encoder, x.double()
    if encoder is None:
        row = target.decoder[column].double()
        return float(x @ row / row.norm())
    centred = x if encoder.b_dec is None else x - encoder.b_dec.double()
    pre = [
        float(centred @ w + b) for w, b in zip(encoder.weight.double().T, encoder.bias.double(), strict=True)
    ]
    at = column if encoder.columns is None else encoder.columns[column]
    if encoder.k is not None and sorted(pre)[-encoder.k] > pre[at]:
        return 0.0
    floor = 0.0 if encoder.threshold is None else max(0.0, float(encoder.threshold[at]))
    return pre[at] if pre[at] > floor else 0.0


def written(prompts: list[list[int]], answer: int) -> list[Rendered]:
    return [
        Rendered(tuple(ids), (False,) * len(ids), len(ids)).answered([7 + i, 9, 3][:answer])
        for i, ids in enumerate(prompts)
    ]


@torch.no_grad()
def hidden(lm: LanguageModel, ids: tuple[int, ...]) -> tuple[Tensor, ...]:
    return lm.hf(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states


def test_amounts_are_the_slow_ones(
    llama: LanguageModel,
    dictionary: Dictionary,
    draw: random.Random,
    prompts: Callable[[int], list[list[int]]],
) -> None:
    fix = [random_intervention(draw, dictionary, site=site) for site in (SITES[1], SITES[0])]
    conversations = written(prompts(6), 3)
    read = read_amounts(llama, fix, conversations)
    assert [g.site for g in read.gauges] == [e.site for e in fix for _ in range(e.target.n_latents)]
    for amounts, conversation in zip(read.amounts, conversations, strict=True):
        states = hidden(llama, conversation.ids)
        assert amounts.shape == (len(conversation), len(read.gauges))
        columns = [(edit, column) for edit in fix for column in range(edit.target.n_latents)]
        for at, (edit, column) in enumerate(columns):
            state = states[SITES.index(edit.site) + 1][0]
            slow = [slow_amount(edit, column, x) for x in state]
            torch.testing.assert_close(amounts[:, at], torch.tensor(slow), atol=1e-4, rtol=1e-4)
    assert read.receipt.sites == ()


def test_under_the_fix_the_edited_stream_is_read(
    llama: LanguageModel, dictionary: Dictionary, prompts: Callable[[int], list[list[int]]]
) -> None:
    """At one site: what was there, plus the slow delta at the tokens that the fix touches."""
    edit = Intervention(
        "cap", latents(dictionary, [3, 8]), SITES[1], "response", Level((-0.5,)), 2.0, "projection"
    )
    conversations = written(prompts(5), 3)
    read = read_amounts(llama, [edit], conversations, steered=True)
    for row, conversation in enumerate(conversations):
        state = hidden(llama, conversation.ids)[2][0].double()
        touched = [touches(edit, i, conversation.prompt_length) for i in range(len(conversation))]
        edited = [x + token_delta(edit, x) if t else x for x, t in zip(state, touched, strict=True)]
        for column in range(2):
            slow = torch.tensor([slow_amount(edit, column, x) for x in edited])
            torch.testing.assert_close(read.amounts[row][:, column], slow, atol=1e-4, rtol=1e-4)
        assert read.receipt.edits[SITES[1]][row] == sum(touched)
    assert read.receipt.tokens_changed > 0


def test_gain_0_reads_what_is_there(
    llama: LanguageModel, dictionary: Dictionary, prompts: Callable[[int], list[list[int]]]
) -> None:
    edit = Intervention("ablate", latents(dictionary, [3]), SITES[1], gain=0.0)
    conversations = written(prompts(3), 2)
    off, on = (read_amounts(llama, [edit], conversations, steered=s) for s in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(off.amounts, on.amounts, strict=True))
    assert on.receipt.edits == {}


def test_every_number_has_a_name(dictionary: Dictionary) -> None:
    fix = [
        Intervention("ablate", latents(dictionary, [4]), SITES[0]),
        Intervention("ablate", latents(dictionary, [4, 7], label="pair"), SITES[1]),
        Intervention("project_out", direction(torch.eye(16)[:2], label=""), SITES[2]),
    ]
    assert [(g.label, g.read) for g in gauges_of(fix)] == [
        ("latent 4", "encoder"),
        ("pair: latent 4", "encoder"),
        ("pair: latent 7", "encoder"),
        ("direction 1", "projection"),
        ("direction 2", "projection"),
    ]


def test_nothing_to_read(llama: LanguageModel, dictionary: Dictionary) -> None:
    edit = Intervention("ablate", latents(dictionary, [3]), SITES[1], (40,))
    with pytest.raises(InputError, match="at least one intervention"):
        read_amounts(llama, [], written([[5]], 1))
    with pytest.raises(InputError, match="one conversation"):
        read_amounts(llama, [edit], [])
    with pytest.raises(NotFiredError):
        read_amounts(llama, [edit], written([[5]], 1), steered=True)
