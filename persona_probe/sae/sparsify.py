"""Dictionaries that EleutherAI's sparsify wrote, by a reader of our own.

A folder per hookpoint, named after the module it was trained on (`layers.10`, `layers.10.mlp`), holds
`cfg.json` and `sae.safetensors` with `encoder.weight` [d_sae, d_model], `encoder.bias`, `W_dec`
[d_sae, d_model] and `b_dec`:

    f = topk(relu((x - b_dec) @ encoder.weight.T + encoder.bias), k),    x_hat = f @ W_dec + b_dec

A hookpoint is a module, and x is its output: `layers.10` is block 10's residual stream on leaving.
sae-lens's own loader of these files transposes `W_dec`, and takes every hookpoint for that one.

Not covered, and refused by name: transcoders, skip connections, signed and groupmax activations,
embedding and n-gram corrections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file

from persona_probe.artifact import digest_file, digest_of, read_json
from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks.sites import layout_of
from persona_probe.model.language_model import LanguageModel
from persona_probe.sae.convert import check_tensors
from persona_probe.sae.dictionary import Dictionary

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_FOLDER = re.compile(r"(?:.*\.)?(?:layers|h)[._](\d+)(?:\.(\w+))?")
_HOOKS = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attn": "hook_attn_out",
}
_REFUSED = {
    "transcode": "a transcoder, which predicts one module's output from its input",
    "skip_connection": "with a linear skip connection",
    "embed_skip": "corrected by the embeddings",
    "gram_lookup": "corrected by a table of n-grams",
    "signed": "with signed latents",
}
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def is_sparsify(folder: Path) -> bool:
    """Whether a folder holds a dictionary in sparsify's format."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def read_sparsify(folder: Path, site: str | None = None) -> Dictionary:
    """The dictionary in a sparsify folder, in fp32.

    `site` is needed where the folder's name is not its hookpoint's. Raises `InputError` for a kind
    that is not a top-k autoencoder, a damaged file or a hookpoint that has no site, `MismatchError`
    for another `site` than the folder's, `NonFiniteError`.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG} holds no JSON object")
    settings = cast("dict[str, Any]", config)
    # what older versions did not write is how they behaved
    for name, what in _REFUSED.items():
        if settings.get(name):
            raise InputError(f"{folder} is {what} ({name}); only top-k autoencoders can be used")
    if settings.get("activation", "topk") != "topk":
        raise InputError(f"{folder} has the activation {settings['activation']!r}; only 'topk' can be used")
    try:
        d_model, k = int(settings["d_in"]), int(settings["k"])
        d_sae = int(settings.get("num_latents") or d_model * int(settings["expansion_factor"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} does not say {error}") from error
    try:
        found = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    absent, unknown = _NAMES.keys() - found.keys(), found.keys() - _NAMES.keys()
    if absent or unknown:
        named = ", ".join(sorted(absent or unknown))
        raise InputError(
            f"{folder / WEIGHTS} {'lacks' if absent else 'has also'} {named}; expected {', '.join(_NAMES)}"
        )
    tensors = {_NAMES[name]: tensor.float() for name, tensor in found.items()}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    check_tensors(str(folder), tensors, d_model, d_sae)
    hookpoint, its_site = _hookpoint(folder)
    if site is not None and its_site is not None and site != its_site:
        raise MismatchError(f"{folder} was trained at {its_site}, not at {site}", fix=f"site={its_site!r}")
    chosen = its_site or site
    if chosen is None:
        raise InputError(
            f"the folder's name, {folder.name!r}, is no hookpoint with a site, as layers.10 is",
            fix="say which activation it reads: load_sae(path, site='blocks.10.hook_resid_post')",
        )
    return Dictionary(
        site=chosen,
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=None,
        activation="topk",
        k=k,
        apply_b_dec_to_input=True,
        normalisation="none",
        path=str(folder),
        digest=digest_of([digest_file(folder / name) for name in (CONFIG, WEIGHTS)]),
        meta={"format": "sparsify", "hookpoint": hookpoint, **_run_facts(folder)},
    )


def check_hookpoint(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Raise `MismatchError` where a module's output, which sparsify read, is not what `lm`'s site means.

    On Gemma 2 and 3 the output of `mlp` is normalised before it is added to the residual stream.
    """
    hookpoint = str(dictionary.meta.get("hookpoint") or "")
    layout = layout_of(lm.hf)
    for kind, module in (("hook_mlp_out", layout.mlp_out), ("hook_attn_out", layout.attn_out)):
        if hookpoint and dictionary.site.endswith(kind) and module != hookpoint.rpartition(".")[2]:
            raise MismatchError(
                f"{dictionary.path} reads the output of the module {hookpoint!r}, and in {lm.name} that is "
                f"not what is added to the residual stream ({module} is)",
                fix="use a dictionary of the residual stream",
            )


def _hookpoint(folder: Path) -> tuple[str | None, str | None]:
    """The hookpoint a folder is named after, and its site; a run with several seeds nests them."""
    for name in (folder.resolve().name, folder.resolve().parent.name):
        match = _FOLDER.fullmatch(name)
        if match and match[2] in _HOOKS:
            return name, f"blocks.{match[1]}.{_HOOKS[match[2]]}"
    return None, None


def _run_facts(folder: Path) -> Mapping[str, Any]:
    """Model and data, from the `config.json` that a run leaves beside its hookpoints."""
    file = folder.parent / "config.json"
    facts = read_json(file) if file.is_file() else {}
    named = (
        {"model_name": facts.get("model"), "dataset": facts.get("dataset")} if isinstance(facts, dict) else {}
    )
    return {name: value for name, value in named.items() if isinstance(value, str)}
