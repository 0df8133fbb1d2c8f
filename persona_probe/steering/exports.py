"""A fix without hooks: a plain Hugging Face checkpoint whose weights carry it.

    bake(tuned, load_fix("out/interventions"), "steered-model")

What can be carried, and by which weights, is in `steering.carriers`; the rest is refused by name.
Every checkpoint is compared with the hooks it stands for before it is put in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from persona_probe.artifact import StrPath, atomic_folder, check_replaceable, write_manifest
from persona_probe.errors import InputError, MismatchError
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.loading import quietly
from persona_probe.steering.carriers import EMBEDDING, Affine, Carrier, carrier_of, placed
from persona_probe.steering.plan import PlannedEdit, steer

_KNOWN_BY = ("config.json", "manifest.json")
"""The files by which a checkpoint that was written here is known."""
_AS_LLAMA = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps "
    "rope_parameters use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings"
).split()


class Baked(NamedTuple):
    """A checkpoint that needs no hook."""

    path: Path
    architecture: str
    """That of the checkpoint; a Llama where another could not carry the bias."""
    layers: tuple[str, ...]
    """Which layers carry the fix."""
    max_difference: float
    """Largest difference between its logits and those of the model with hooks, on the texts compared."""


def bake(
    lm: LanguageModel,
    fix: PlannedEdit | Sequence[PlannedEdit],
    folder: StrPath,
    *,
    texts: Int[Tensor, "batch pos"] | None = None,
    tolerance: float | None = None,
    facts: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Baked:
    """Write `lm` (its adapter merged) with `fix` in its weights, its tokenizer, and a `manifest.json`
    that says what was baked into what, with `facts` beside.

    Before it is put in place, its logits are compared with those of the hooks on `texts` (token
    ids; default: random ones). They must agree within `tolerance` (default: 1e-3 of the largest
    logit in fp32, 5e-2 in a 16-bit type).

    Raises `InputError` for a fix that weights cannot carry, and for a folder in use (unless
    `overwrite`); `MismatchError` where hooks and weights differ.
    """
    check_replaceable(folder, overwrite, _KNOWN_BY)
    edits = [fix] if isinstance(fix, PlannedEdit) else list(fix)
    maps = placed(lm, edits)
    if not maps:
        raise InputError("there is no edit in this fix to bake in (gain 0 is none)")
    carried = _with(lm.merged(), maps, carrier_of(lm))
    if texts is None:
        texts = torch.randint(lm.d_vocab, (4, 16), generator=torch.Generator().manual_seed(0))
    difference = _difference(lm, edits, carried, texts)
    bound = tolerance if tolerance is not None else (1e-3 if lm.dtype == torch.float32 else 5e-2)
    if not difference.relative <= bound:
        raise MismatchError(
            f"the baked weights give other logits than the hooks, by {difference.absolute:.3g} "
            f"({difference.relative:.2g} of the largest)"
        )
    with atomic_folder(folder, overwrite=overwrite, known_by=_KNOWN_BY) as path:
        with quietly():
            carried.save_pretrained(str(path))
        lm.tokenizer.save_pretrained(str(path))
        made = Baked(Path(folder), type(carried).__name__, tuple(maps), difference.absolute)
        said = {"model": lm.name, "fix": [str(edit) for edit in edits], **made._asdict(), **(facts or {})}
        write_manifest(path, said)
    return made


class _Difference(NamedTuple):
    absolute: float
    relative: float


@torch.no_grad()
def _difference(
    lm: LanguageModel, fix: Sequence[PlannedEdit], carried: PreTrainedModel, ids: Tensor
) -> _Difference:
    ids = ids.to(lm.device)
    with steer(lm, fix):
        want = lm.forward(ids).float()
    got = carried(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    absolute = float((got - want).abs().max())
    return _Difference(absolute, absolute / max(float(want.abs().max()), 1e-9))


@torch.no_grad()
def _with(lm: LanguageModel, maps: dict[str, Affine], carrier: Carrier) -> PreTrainedModel:
    """A copy of the model in which the layers carry their maps."""
    config: Any = _config(lm, maps, carrier)
    weights = {name: tensor.detach() for name, tensor in lm.hf.state_dict().items()}
    untied = EMBEDDING in maps and bool(config.tie_word_embeddings)
    if untied:
        # the unembedding must stay as it was
        config.tie_word_embeddings = False
        weights["lm_head.weight"] = cast(Any, lm.hf.get_output_embeddings()).weight.detach()
    for layer, found in maps.items():
        if layer == EMBEDDING:
            for number, name in enumerate(carrier.embeddings):
                weight = weights[f"{name}.weight"]
                shift = None if number else found.shift  # added up, they get the shift once
                weights[f"{name}.weight"] = _applied(weight, Affine(found.matrix, shift))
            continue
        kind, _, block = layer.partition(".")
        path = f"{carrier.blocks}.{block}.{carrier.attn if kind == 'attn' else carrier.mlp}"
        _carry(weights, path, found, transposed=carrier.transposed)
    with quietly():
        copy: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=lm.dtype)
    wanted = copy.state_dict()
    complete = {
        name: weights[name] if name in weights else torch.zeros_like(tensor)
        for name, tensor in wanted.items()
    }
    absent = [name for name in wanted if name not in weights and not name.endswith(".bias")]
    extra = [name for name in weights if name not in wanted]
    if absent or extra:
        raise MismatchError(f"{config.model_type!r} does not hold the same weights: {[*absent, *extra][:3]}")
    copy.load_state_dict(complete)
    copy.generation_config = lm.hf.generation_config
    return copy.eval().to(lm.device)  # type: ignore[arg-type]


def _config(lm: LanguageModel, maps: dict[str, Affine], carrier: Carrier) -> Any:
    config: Any = type(lm.hf.config).from_dict(lm.hf.config.to_dict())
    shifted = {layer.partition(".")[0] for layer, found in maps.items() if found.shift is not None}
    if carrier.as_llama and shifted & {"attn", "mlp"}:
        kept = {name: getattr(config, name) for name in _AS_LLAMA if getattr(config, name, None) is not None}
        # every bias there is: those that the model did not have are 0
        return LlamaConfig(**kept, attention_bias=True, mlp_bias=True)
    for kind, switch in (("attn", carrier.attn_bias), ("mlp", carrier.mlp_bias)):
        if kind in shifted and isinstance(switch, str):
            setattr(config, switch, True)
    return config


def _carry(weights: dict[str, Tensor], path: str, found: Affine, *, transposed: bool) -> None:
    weight = weights[f"{path}.weight"]
    written = weight if transposed else weight.T  # [in, d_model]: what each input adds to the stream
    changed = _applied(written, Affine(found.matrix, None))
    weights[f"{path}.weight"] = changed if transposed else changed.T.contiguous()
    bias = weights.get(f"{path}.bias")
    if bias is None and found.shift is None:
        return
    bias = torch.zeros_like(written[0]) if bias is None else bias
    weights[f"{path}.bias"] = _applied(bias[None], found)[0]


def _applied(rows: Float[Tensor, "row d_model"], found: Affine) -> Float[Tensor, "row d_model"]:
    """The map on every row, in fp64, rounded once to the weights' type."""
    wide = rows.double()
    if found.matrix is not None:
        wide = wide + wide @ found.matrix.to(wide)
    if found.shift is not None:
        wide = wide + found.shift.to(wide)
    return wide.to(rows.dtype)
