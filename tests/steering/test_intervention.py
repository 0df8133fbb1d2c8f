"""Interventions as data: what is filled in, what is refused, and what they say of themselves."""

from __future__ import annotations

import dataclasses
from html import escape
from typing import Any

import pytest
import torch

from persona_probe.errors import InputError, MismatchError, NonFiniteError, UnknownSiteError
from persona_probe.sae.load import Dictionary
from persona_probe.steering import (
    Condition,
    Encoder,
    Intervention,
    Level,
    Target,
    difference_of_means,
    latents,
    residual_rms,
)
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, make_dictionary

ONE = Level((1.0,))


def edit(op: Any = "cap", **fields: Any) -> Intervention:
    given: dict[str, Any] = {
        "target": latents(make_dictionary(), [3]),
        "site": SITES[1],
        "level": ONE,
    }
    return Intervention(op, **(given | fields))


def test_the_fields_are_frozen() -> None:
    names = [field.name for field in dataclasses.fields(Intervention)]
    assert names == ["op", "target", "site", "positions", "level", "gain", "read", "condition"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit().gain = 2.0  # type: ignore[misc]


def test_read_is_found_from_the_target() -> None:
    assert edit().read == "encoder"
    assert edit(target=direction(torch.ones(D_MODEL))).read == "projection"
    assert edit("project_out", level=None).read == "projection"
    assert edit(read="projection").read == "projection"


def test_a_target_holds_its_own_tensors(dictionary: Dictionary) -> None:
    target = latents(dictionary, [5, 2], label="villain")
    assert torch.equal(target.decoder, dictionary.W_dec[[5, 2]])
    assert target.indices == (5, 2) and target.dictionary_digest == dictionary.digest
    assert target.encoder is not None and target.encoder.n_latents == 2
    # the whole dictionary only where the rule needs it
    assert target.encoder.weight.shape[1] == (24 if dictionary.activation == "topk" else 2)
    assert torch.equal(latents(dictionary.latent(5)).decoder, dictionary.W_dec[[5]])
    vector = torch.arange(16, dtype=torch.float64, requires_grad=True)
    held = direction(vector).decoder
    assert held.dtype == torch.float32 and not held.requires_grad
    assert torch.allclose(direction(vector).unit.norm(dim=-1), torch.ones(1))


def test_levels_convert_explicitly() -> None:
    assert Level((1.0, 2.0)).absolute() == (1.0, 2.0)
    assert Level((4.0,), "residual_rms", 0.5).absolute() == (2.0,)
    assert Level((0.5,), "max_activation", (2.0, 8.0)).absolute() == (1.0, 4.0)
    assert Level((0.5, 2.0), "max_activation", (2.0, 8.0)).absolute() == (1.0, 16.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: edit("explode"), "unknown operation 'explode'"),
        (lambda: edit(read="guess"), "unknown read"),
        (lambda: edit(positions="everywhere"), "positions must be one of"),
        (lambda: edit(positions=(1.5,)), "positions must be one of"),
        (lambda: edit(positions=()), "positions must be one of"),
        (lambda: edit(level=Level((1.0,), "miles")), "unknown unit 'miles'"),  # type: ignore[arg-type]
        (lambda: edit(condition=Condition("never")), "unknown condition"),  # type: ignore[arg-type]
        (lambda: edit(condition=Condition("above", float("nan"))), "must be finite"),
        (lambda: edit(level=Level((float("inf"),))), "must be finite"),
        (lambda: edit(level=Level((1.0,), "base_mean", float("nan"))), "must be finite"),
        (lambda: edit(level=Level(())), "needs a value"),
        (lambda: edit(level=Level((1.0,), "absolute", 2.0)), "has scale 1"),
        (lambda: edit(level=Level((1.0, 2.0), "base_mean", (1.0, 2.0, 3.0))), "do not go with"),
        (lambda: edit(level=Level((1.0, 2.0))), "2 levels were given for 1 latents"),
        (lambda: edit(level=None), "cap needs a level"),
        (lambda: edit("ablate"), "ablate takes no level"),
        (lambda: edit("mean_ablate"), "base model's mean"),
        (lambda: edit("scale", level=Level((1.0,), "residual_rms", 2.0)), "plain number"),
        (lambda: edit(gain=-1.0), "gain must be"),
        (lambda: edit(gain=float("nan")), "gain must be"),
        (lambda: edit(read="encoder", target=direction(torch.ones(D_MODEL))), "no encoder"),
        (lambda: edit("project_out", level=None, read="encoder"), "whole component"),
        (
            lambda: edit("project_out", level=None, target=direction(torch.ones(2, D_MODEL))),
            "depend on one another",
        ),
        (
            lambda: edit(
                "project_out", level=None, target=direction(torch.eye(D_MODEL)[:2]),
                condition=Condition("active"),
            ),
            "no amount of each",
        ),
        (lambda: direction(torch.zeros(D_MODEL)), "length zero"),
        (lambda: direction(torch.ones(2, 2, 2)), "a decoder is"),
        (lambda: latents(make_dictionary(), [24]), "no latent 24"),
        (lambda: latents(make_dictionary(), [3, 3]), "different indices"),
        (lambda: latents(make_dictionary(), []), "no latent was named"),
        (lambda: direction(torch.ones(D_MODEL)).amounts(torch.ones(2, D_MODEL), "encoder"), "no encoder"),
        (lambda: Encoder(torch.ones(4), torch.ones(1)), "is \\[d_model, latent\\]"),
        (lambda: Encoder(torch.ones(4, 2), torch.ones(3)), "bias of shape \\(2,\\)"),
        (lambda: Encoder(torch.ones(4, 2), torch.ones(2), k=1), "needs both"),
        (lambda: Encoder(torch.ones(4, 2), torch.ones(2), k=3, columns=(0,)), "k must be"),
        (lambda: Encoder(torch.ones(4, 2), torch.ones(2), k=1, columns=(2,)), "columns 0 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(unchecked: None, make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_a_malformed_site_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(UnknownSiteError, match="nearest names"):
        edit(site="blocks.1.hook_resid_pots")


def test_numbers_that_are_not_finite_are_refused() -> None:
    bad = torch.ones(D_MODEL)
    bad[3] = float("nan")
    with pytest.raises(NonFiniteError, match="decoder"):
        direction(bad)
    with pytest.raises(NonFiniteError, match="encoder bias"):
        Encoder(torch.ones(4, 1), torch.tensor([float("inf")]))


def test_an_encoder_of_another_dictionary_is_refused() -> None:
    encoder = latents(make_dictionary(), [1, 2]).encoder
    with pytest.raises(MismatchError, match="reads 2 latents, not 1"):
        Target(torch.ones(1, D_MODEL), encoder)
    with pytest.raises(MismatchError, match="reads width 16"):
        Target(torch.ones(2, 4), encoder)


def test_it_says_in_words_what_it_does() -> None:
    text = str(edit(level=Level((0.83,), "base_mean"), gain=2.0, condition=Condition("active")))
    assert "cap latent 3 at 0.83 (the base's mean)" in text and SITES[1] in text
    assert "where z > 0" in text and "gain 2 (over-corrects)" in text
    assert "over-corrects" not in str(edit()) and not edit().over_corrects
    assert str(edit(target=direction(torch.ones(D_MODEL), "mean shift"))).startswith("cap mean shift")
    assert edit().with_gain(3.0).gain == 3.0


def test_in_a_notebook_it_is_a_table_in_which_every_name_is_text() -> None:
    hostile = direction(torch.ones(D_MODEL), "<script>alert(1)</script>")
    shown = edit(target=hostile, level=Level((0.83,), "base_mean"), gain=2.0)._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    for said in (
        "cap",
        SITES[1],
        escape("0.83 (the base's mean)"),
        "2 (over-corrects)",
        "projection",
        "always",
    ):
        assert said in shown
    assert "level" not in edit("ablate", level=None)._repr_html_()


def test_the_difference_of_means_takes_off_the_mean_benign_shift() -> None:
    g = torch.Generator().manual_seed(0)
    base, tuned, one, two = torch.randn(4, D_MODEL, generator=g, dtype=torch.float64)
    assert torch.equal(difference_of_means(tuned, base), tuned - base)
    want = (tuned - base) - ((one - base) + (two - base)) / 2
    assert torch.allclose(difference_of_means(tuned, base, [one, two]), want)
    assert torch.equal(difference_of_means(base, base, [base]), torch.zeros(D_MODEL).double())
    with pytest.raises(MismatchError, match="one width"):
        difference_of_means(tuned, base[:3])
    with pytest.raises(NonFiniteError):
        difference_of_means(tuned * float("nan"), base)


def test_the_scale_of_a_site_is_the_root_mean_square_of_its_entries() -> None:
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = (sum(float(entry) ** 2 for row in x.double() for entry in row) / x.numel()) ** 0.5
    assert residual_rms(x) == pytest.approx(want, rel=1e-9)
    assert residual_rms(torch.full((3, 2, 9), 2.0)) == pytest.approx(2.0)
    with pytest.raises(InputError, match="needed"):
        residual_rms(torch.ones(0, 4))
    with pytest.raises(NonFiniteError):
        residual_rms(torch.full((2, 2), float("nan")))
