"""Fixes by name: what is served, and what keeps a server from starting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_probe.errors import InputError, MismatchError, MissingPathError, NonFiniteError
from persona_probe.model import LanguageModel
from persona_probe.server import Catalogue, Limits
from persona_probe.server.limits import Refusal
from persona_probe.server.service import Service
from persona_probe.steering import Intervention, Level, save_fix
from persona_probe.steering.target import direction
from tests.model.tiny_models import model_of

SITE = "blocks.1.hook_resid_post"


def vector_fix(width: int, site: str = SITE) -> Intervention:
    return Intervention("add", direction(torch.ones(width)), site, level=Level((1.0,)))


def test_a_fix_a_named_fix_and_a_folder_of_fixes(lm: LanguageModel, fixes_folder: Path) -> None:
    assert list(Catalogue.load(lm, [fixes_folder]).fixes) == ["ablate", "cap", "push"]
    one = Catalogue.load(lm, [fixes_folder / "cap", f"again={fixes_folder / 'cap'}"])
    assert list(one.fixes) == ["cap", "again"]
    assert one.digests["cap"] == one.digests["again"]


@pytest.mark.parametrize(
    "name",
    ["../cap", "cap/../cap", "/etc/passwd", "cap\0", "", "CAP", ".", "..\\cap", "%2e%2e/cap", "x" * 10**5],
)
def test_a_name_is_never_a_path(catalogue: Catalogue, name: str) -> None:
    with pytest.raises(Refusal) as refused:
        catalogue.fix(name)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 500


def test_an_unknown_name_is_told_the_nearest(catalogue: Catalogue) -> None:
    with pytest.raises(Refusal, match=r"nearest names: ablate"):
        catalogue.fix("ablat")
    with pytest.raises(Refusal, match=r"blocks\.4\.hook_resid_post#INDEX"):
        catalogue.probes(["blocks.9.hook_resid_post#3"], "none")
    with pytest.raises(InputError, match="no latent 999999"):
        catalogue.probes(["blocks.4.hook_resid_post#999999"], "none")
    with pytest.raises(Refusal, match="no intervention whose latents"):
        catalogue.probes(True, "none")


def test_a_gain_takes_the_place_of_the_fixes_own(catalogue: Catalogue) -> None:
    assert [edit.gain for edit in catalogue.fix("push", 2.5)] == [2.5, 2.5]
    assert catalogue.fix("push", 2.5) is catalogue.fix("push", 2.5)
    for number in range(2000):
        catalogue.fix("push", number / 1000)
    assert len(catalogue._regained) <= 256  # pyright: ignore[reportPrivateUsage]


def test_a_vector_that_is_not_finite_is_refused_with_its_folder(lm: LanguageModel, tmp_path: Path) -> None:
    save_fix(vector_fix(lm.d_model), tmp_path / "good")
    save_fix(vector_fix(lm.d_model), tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "tensors.safetensors")
    tensors["0.decoder"][0, 3] = float("nan")
    save_file(tensors, tmp_path / "broken" / "tensors.safetensors")
    with pytest.raises(NonFiniteError, match="broken"):
        Catalogue.load(lm, [tmp_path])


def test_a_fix_of_another_model_is_refused_with_its_folder(lm: LanguageModel, tmp_path: Path) -> None:
    save_fix(vector_fix(lm.d_model + 1), tmp_path / "wide")
    with pytest.raises(MismatchError, match=r"wide: .* acts on width 193.*192"):
        Catalogue.load(lm, [tmp_path / "wide"])
    save_fix(vector_fix(lm.d_model, "blocks.40.hook_resid_post"), tmp_path / "deep")
    with pytest.raises(InputError, match="deep"):
        Catalogue.load(lm, [tmp_path / "deep"])


def test_what_else_keeps_a_server_from_starting(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no fix 'cap' to be the default"):
        Service(lm, Catalogue(), Limits(), default="cap")
    with pytest.raises(InputError, match="max_queue must be a positive number"):
        Limits(max_queue=0)
    with pytest.raises(MissingPathError, match="no folder"):
        Catalogue.load(lm, [tmp_path / "nowhere"])
    with pytest.raises(MissingPathError, match="neither a fix nor"):
        Catalogue.load(lm, [tmp_path])
    for name in ("none", "with space"):
        save_fix(vector_fix(lm.d_model), tmp_path / name)
        with pytest.raises(InputError, match="cannot be served as"):
            Catalogue.load(lm, [tmp_path / name])
    save_fix(vector_fix(lm.d_model), tmp_path / "a")
    with pytest.raises(InputError, match="two fixes are called 'a'"):
        Catalogue.load(lm, [tmp_path / "a", f"a={tmp_path / 'none'}"])
    record = tmp_path / "a" / "intervention.json"
    record.write_text(json.dumps({"format": 1, "interventions": "all of them"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"intervention\.json is malformed"):
        Catalogue.load(lm, [tmp_path / "a"])


def test_a_fix_of_thoughts_needs_a_model_that_has_them(lm: LanguageModel, tmp_path: Path) -> None:
    without = model_of("llama")
    for name, model in (("doubt", without), ("wonder", lm)):
        fix = Intervention("add", direction(torch.ones(model.d_model)), SITE, "think", Level((1.0,)))
        save_fix(fix, tmp_path / name)
    assert list(Catalogue.load(lm, [tmp_path / "wonder"]).fixes) == ["wonder"]
    with pytest.raises(MismatchError, match=r"doubt: .*no tokens <think>"):
        Catalogue.load(without, [tmp_path / "doubt"])
