"""The tests' own check of shapes is on, for what has shapes."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from persona_probe.evaluation.drawing import draw
from persona_probe.screening.margin import Contrast, Margins, margins


def test_a_wrong_shape_in_a_call_is_refused() -> None:
    assert draw(torch.zeros(3, 7), torch.zeros(3)).shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError):
        draw(torch.zeros(3, 7), torch.zeros(2))


def test_a_wrong_shape_in_a_record_is_refused() -> None:
    Margins(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        Margins(torch.zeros(2, 3), torch.zeros(2, 4))


def test_what_has_no_shapes_is_left_alone() -> None:
    assert not hasattr(margins, "__wrapped__")
    assert Contrast("asked", "anything", None).question == "asked"  # type: ignore[arg-type]
