"""Which weights of which architecture can carry an edit, so that no hook is needed any more.

An edit can be baked in where it is an affine map `x -> M x + c` of something that a linear layer
computes:

    site                      carried by                    which maps
    hook_attn_out             attention's output layer      any
    hook_mlp_out              the MLP's output layer        any
    hook_resid_mid            attention's output layer      a shift c
    hook_resid_post           the MLP's output layer        a shift c
    hook_resid_pre, block i   as hook_resid_post, i - 1     a shift c
    hook_resid_pre, block 0   the embedding                 any

because the residual stream itself passes a block by without any weights. To project a direction out
of the whole stream, project it out of everything that is written into it (`projected_out`).

A shift needs a bias, and not every architecture has one (transformers 5.23, read and tested):

    family           attention's output layer        MLP's output layer
    gpt2             has one                         has one
    llama            config attention_bias           config mlp_bias
    mistral, qwen2   written as a Llama, which computes the same (no sliding window)
    qwen3            config attention_bias           none
    gemma2, gemma3   neither: a norm with a gain of its own stands behind each layer

Only an unconditional edit of all tokens is affine, and only one that is read by projection or not
at all: a cap, a floor or an encoder (its ReLU) depends on the activation, and stays a hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.hooks.sites import Site, causal_lm, parse_site, site_names
from persona_probe.model.language_model import LanguageModel
from persona_probe.steering.affine import ABOVE, BIAS, HIGH, LOW, SHIFT, SLOPE
from persona_probe.steering.intervention import Intervention
from persona_probe.steering.plan import PlannedEdit
from persona_probe.steering.target import Target

EMBEDDING = "embedding"


@dataclass(frozen=True)
class Carrier:
    """Where a family keeps the layers that write into the residual stream; paths within a block."""

    attn: str
    mlp: str
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    """Added up, they are the stream on entering block 0."""
    attn_bias: str | bool = False
    """Whether its bias is there (True), or the name of the config switch that gives it one."""
    mlp_bias: str | bool = False
    transposed: bool = False
    """Weights are `[in, out]` (GPT-2's Conv1D)."""
    as_llama: bool = False
    """A shift is carried by writing the model as a Llama."""


_LLAMA = Carrier("self_attn.o_proj", "mlp.down_proj", attn_bias="attention_bias", mlp_bias="mlp_bias")
_LIKE_LLAMA = Carrier("self_attn.o_proj", "mlp.down_proj", as_llama=True)

CARRIERS: dict[str, Carrier] = {
    "gpt2": Carrier(
        "attn.c_proj",
        "mlp.c_proj",
        blocks="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        attn_bias=True,
        mlp_bias=True,
        transposed=True,
    ),
    "llama": _LLAMA,
    "mistral": _LIKE_LLAMA,
    "qwen2": _LIKE_LLAMA,
    "qwen3": Carrier("self_attn.o_proj", "mlp.down_proj", attn_bias="attention_bias"),
}
"""The families that can carry an edit, by the `model_type` of their config."""


@dataclass(frozen=True, eq=False)
class Affine:
    """`x -> x + x @ matrix + shift`."""

    matrix: Float[Tensor, "d_model d_model"] | None
    shift: Float[Tensor, " d_model"] | None

    def __add__(self, other: Affine) -> Affine:
        """Both, reading the same x."""
        return Affine(_sum(self.matrix, other.matrix), _sum(self.shift, other.shift))


def affine(edit: PlannedEdit) -> Affine:
    """An intervention as an affine map, in fp64. Raises `InputError`, naming what it is, where it is
    none.
    """
    if not isinstance(edit, Intervention):
        raise InputError("a random control depends on the activation, and cannot be baked in")
    if edit.positions != "all":
        raise InputError(
            f"weights act on every token, and cannot edit {edit.positions!r} alone: {edit}",
            fix="keep it a fix, and serve it with steer()",
        )
    numbers = edit.compiled.coefficients.double()
    if edit.op in ("cap", "floor") or bool(numbers[LOW : HIGH + 1].isfinite().any()):
        raise InputError(
            f"a {edit.op} is not a bias: whether it acts depends on the activation: {edit}",
            fix="keep it a fix, and serve it with steer()",
        )
    if bool((numbers[ABOVE] > -torch.inf).any()):
        raise InputError(f"a condition depends on the activation, and cannot be baked in: {edit}")
    slope, write = numbers[SLOPE], edit.compiled.write.double()
    if not bool(slope.any()):
        return Affine(None, numbers[SHIFT] @ write)
    if edit.read == "encoder":
        raise InputError(
            f"an encoder is not linear, and what it reads cannot be baked in: {edit}",
            fix='read="projection", or add instead',
        )
    matrix = edit.compiled.read.double() * slope @ write
    shift = (numbers[BIAS] * slope + numbers[SHIFT]) @ write
    return Affine(matrix, shift if bool(shift.any()) else None)


def placed(lm: LanguageModel, fix: Sequence[PlannedEdit]) -> dict[str, Affine]:
    """The map that each layer has to carry, by `EMBEDDING`, `attn.<block>` or `mlp.<block>`.

    Raises `InputError`, naming edit and architecture, for anything that cannot be carried.
    """
    carrier = carrier_of(lm)
    maps: dict[str, Affine] = {}
    behind: dict[str, Affine] = {}
    for edit in (one for one in fix if one.gain):
        found, site = affine(edit), parse_site(edit.site)
        layer, whole = _layer(site)
        if found.matrix is not None and not whole:
            raise InputError(
                f"the residual stream passes {site} by without weights, so only a shift can be baked "
                f"in there: {edit}",
                fix="take it out of everything that is written: projected_out(lm, target)",
            )
        has = {"attn": carrier.attn_bias, "mlp": carrier.mlp_bias}.get(layer.partition(".")[0], True)
        if found.shift is not None and not has and not carrier.as_llama:
            kind, what = lm.hf.config.model_type, "attention's" if layer.startswith("attn") else "the MLP's"
            raise InputError(f"in {kind!r} {what} output layer can have no bias, to carry: {edit}")
        if found.shift is not None and not has and _windowed(lm):
            raise InputError(
                f"a model with sliding-window attention cannot be written as a Llama, to carry: {edit}",
                fix="keep it a fix, and serve it with steer()",
            )
        into = maps if whole else behind
        into[layer] = into[layer] + found if layer in into else found
    for layer, found in behind.items():
        # the stream comes after the layer: its shift is not what the layer's own map sees
        maps[layer] = maps[layer] + found if layer in maps else found
    return maps


def carrier_of(lm: LanguageModel) -> Carrier:
    """Raises `InputError` for an architecture that is not in `CARRIERS`."""
    config = cast(Any, causal_lm(lm.hf)).config
    found = CARRIERS.get(config.model_type)
    if found is None:
        raise InputError(
            f"no edit can be baked into {config.model_type!r} (it can into {', '.join(CARRIERS)})",
            fix="keep it a fix, and serve it with steer()",
        )
    return found


def _windowed(lm: LanguageModel) -> bool:
    """Whether some token may not see all that are before it."""
    config = cast(Any, causal_lm(lm.hf)).config
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(kinds - {"full_attention"}) or (
        window is not None and window < config.max_position_embeddings
    )


def projected_out(lm: LanguageModel, target: Target, gain: float = 1.0) -> tuple[Intervention, ...]:
    """The direction projected out of the embedding and of all that attention and MLPs write: the
    whole residual stream is then without it (Soligo et al. 2025; Arditi et al. 2024).

    Runs as a fix like any other, and can be baked into the weights.
    """
    written = [name for name in site_names(lm.hf) if name.endswith(("hook_attn_out", "hook_mlp_out"))]
    sites = [Site(0, 0).name, *written]
    return tuple(Intervention("project_out", target, site, gain=gain) for site in sites)


def _layer(site: Site) -> tuple[str, bool]:
    """Which layer carries an edit of this site, and whether it carries any map (else a shift)."""
    match site.kind:
        case "hook_resid_pre":
            return (EMBEDDING, True) if site.block == 0 else (f"mlp.{site.block - 1}", False)
        case "hook_attn_out":
            return f"attn.{site.block}", True
        case "hook_resid_mid":
            return f"attn.{site.block}", False
        case "hook_mlp_out":
            return f"mlp.{site.block}", True
        case _:
            return f"mlp.{site.block}", False


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other
