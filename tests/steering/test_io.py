"""A fix on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_probe.errors import InputError, MissingPathError, NonFiniteError
from persona_probe.model import LanguageModel
from persona_probe.sae.load import Dictionary
from persona_probe.steering import (
    Condition,
    Intervention,
    Level,
    RandomMatched,
    Target,
    latents,
    load_fix,
    save_fix,
    steer,
)
from persona_probe.steering.target import direction
from tests.steering.conftest import D_MODEL, SITES, make_dictionary, random_intervention


def same(one: Intervention, other: Intervention) -> bool:
    """Every field, and every bit of every tensor."""
    plain = all(
        getattr(one, name) == getattr(other, name)
        for name in ("op", "site", "positions", "level", "gain", "read")
    )
    asked, again = one.condition, other.condition
    plain = plain and replace(asked, of=None, read="auto") == replace(again, of=None, read="auto")
    plain = plain and asked.read == again.read and (asked.of is None) == (again.of is None)
    gates = asked.of is None or again.of is None or same_target(asked.of, again.of)
    return plain and gates and same_target(one.target, other.target)


def same_target(a: Target, b: Target) -> bool:
    named = (a.indices, a.dictionary_digest, a.label) == (b.indices, b.dictionary_digest, b.label)
    if not (named and torch.equal(a.decoder, b.decoder)):
        return False
    if a.encoder is None or b.encoder is None:
        return a.encoder is b.encoder
    for name in ("weight", "bias", "threshold", "b_dec"):
        x, y = getattr(a.encoder, name), getattr(b.encoder, name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
            return False
    return (a.encoder.k, a.encoder.columns) == (b.encoder.k, b.encoder.columns)


def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    tmp_path: Path, dictionary: Dictionary, llama: LanguageModel
) -> None:
    draw = random.Random(0)
    fix = [random_intervention(draw, dictionary) for _ in range(14)]
    assert save_fix(fix, tmp_path / "fix") == tmp_path / "fix"
    loaded = load_fix(tmp_path / "fix")
    assert len(loaded) == 14 and all(map(same, fix, loaded))
    ids = torch.tensor([[4, 5, 6, 7, 8, 9]])
    for one, other in zip(fix, loaded, strict=True):
        with steer(llama, one), torch.no_grad():
            want = llama.hf(ids).logits
        with steer(llama, other), torch.no_grad():
            assert torch.equal(llama.hf(ids).logits, want)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3),
    gain=st.floats(0, 1e6),
    threshold=st.floats(-1e9, 1e9),
    label=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_every_number_and_label_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[float],
    gain: float,
    threshold: float,
    label: str,
) -> None:
    target = direction(torch.eye(D_MODEL)[: len(values)], label)
    edit = Intervention(
        "floor", target, SITES[0], (4, 9), Level(tuple(values), "base_mean"), gain,
        condition=Condition("above", threshold),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("fix") / "one"
    save_fix(edit, folder)
    assert same(load_fix(folder)[0], edit)


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    one = Intervention("ablate", latents(make_dictionary(), [1]), SITES[0])
    two = Intervention("ablate", latents(make_dictionary(), [2]), SITES[0])
    save_fix(one, tmp_path / "fix")
    with pytest.raises(InputError, match="not empty"):
        save_fix(two, tmp_path / "fix")
    assert same(load_fix(tmp_path / "fix")[0], one)
    save_fix(two, tmp_path / "fix", overwrite=True)
    assert same(load_fix(tmp_path / "fix")[0], two)


def test_only_fixes_are_saved(unchecked: None, tmp_path: Path) -> None:
    one = Intervention("ablate", latents(make_dictionary(), [1]), SITES[0])
    with pytest.raises(InputError, match="at least one"):
        save_fix([], tmp_path / "fix")
    control: Any = RandomMatched(one, torch.eye(D_MODEL)[0])
    assert not (tmp_path / "fix").exists()
    with pytest.raises(InputError, match="not RandomMatched"):
        save_fix([one, control], tmp_path / "fix")
    assert list(tmp_path.iterdir()) == []


def edited_json(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "intervention.json").read_text())
        change(record)
        (folder / "intervention.json").write_text(json.dumps(record))

    return apply


def cut_tensors(folder: Path) -> None:
    data = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(data[: len(data) // 2])


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "tensors.safetensors")
        change(tensors)
        save_file(tensors, folder / "tensors.safetensors")

    return apply


@pytest.mark.parametrize(
    ("damage", "says", "error"),
    [
        (lambda f: (f / "intervention.json").unlink(), "has no intervention.json", MissingPathError),
        (lambda f: (f / "tensors.safetensors").unlink(), "has no tensors", MissingPathError),
        (lambda f: (f / "intervention.json").write_text("{"), "intervention.json", InputError),
        (lambda f: (f / "intervention.json").write_text("[]"), r"malformed: [^_]*\n  fix", InputError),
        (edited_json(lambda r: r.update(format=2)), "malformed at format", InputError),
        (edited_json(lambda r: r.update(interventions=[])), "no intervention", InputError),
        (edited_json(lambda r: r["interventions"][0].pop("gain")), r"interventions\.0\.gain", InputError),
        (edited_json(lambda r: r["interventions"][0].update(op="explode")), r"0\.op", InputError),
        (edited_json(lambda r: r["interventions"][0].update(extra=1)), r"0\.extra", InputError),
        (edited_json(lambda r: r["interventions"][0].update(gain=-1)), "intervention 0: gain", InputError),
        (edited_json(lambda r: r["interventions"][0].update(gain=float("nan"))), "gain", InputError),
        (edited_json(lambda r: r["interventions"][0].update(site="x")), "0: there is no hook", InputError),
        (edited_json(lambda r: r["interventions"][0]["level"].update(unit="miles")), "unit", InputError),
        (cut_tensors, "cannot be read", InputError),
        (with_tensors(lambda t: t.__delitem__("0.decoder")), "lacks the tensor 0.decoder", InputError),
        (with_tensors(lambda t: t.update(stray=torch.ones(1))), "of no intervention", InputError),
        (with_tensors(lambda t: t["0.decoder"].fill_(float("nan"))), "NaN", NonFiniteError),
        (with_tensors(lambda t: t.update({"0.encoder.bias": torch.ones(7)})), "bias of shape", InputError),
    ],
)  # fmt: skip
def test_a_malformed_folder_is_refused(
    unchecked: None, tmp_path: Path, damage: Callable[[Path], None], says: str, error: type[Exception]
) -> None:
    folder = tmp_path / "fix"
    save_fix(Intervention("cap", latents(make_dictionary(), [1]), SITES[0], level=Level((1.0,))), folder)
    damage(folder)
    with pytest.raises(error, match=says):
        load_fix(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="is not a fix"):
        load_fix(tmp_path / "nowhere")
