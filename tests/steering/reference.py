"""Steering written the slow way: one row, one token, one latent at a time, in fp64, by the textbook formulas.

Shares no code with `persona_probe.steering` but the `Intervention` that it is told to carry out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from persona_probe.steering import Intervention, RandomMatched
from persona_probe.steering.plan import PlannedEdit


def touches(edit: Intervention, position: int, prompt_length: int) -> bool:
    if isinstance(edit.positions, tuple):
        return position in edit.positions
    return {
        "all": True,
        "prompt": position < prompt_length,
        "response": position >= prompt_length - 1,
        "last_prompt": position == prompt_length - 1,
    }[edit.positions]


def token_delta(edit: Intervention, x: Tensor) -> Tensor:
    """What the edit adds to one activation `[d_model]`."""
    x = x.double()
    target = edit.target
    decoder = target.decoder.double()
    delta = torch.zeros_like(x)
    if edit.op == "project_out":
        span = decoder.T
        holds = edit.condition.kind == "always" or bool(
            x @ span[:, 0] / span[:, 0].norm() > edit.condition.above
        )
        inside = span @ torch.linalg.inv(span.T @ span) @ span.T @ x
        return -edit.gain * inside if holds else delta
    for j in range(decoder.shape[0]):
        if edit.read == "projection":
            write = decoder[j] / decoder[j].norm()
            z = x @ write
        else:
            encoder = target.encoder
            assert encoder is not None
            write = decoder[j]
            centred = x if encoder.b_dec is None else x - encoder.b_dec.double()
            pre = centred @ encoder.weight.double() + encoder.bias.double()
            column = j if encoder.columns is None else encoder.columns[j]
            z = pre[column].clamp(min=0)
            if encoder.threshold is not None and pre[column] <= encoder.threshold[column]:
                z = torch.zeros_like(z)
            if encoder.k is not None and column not in pre.topk(encoder.k).indices.tolist():
                z = torch.zeros_like(z)
        if edit.condition.kind == "active" and not z > 0:
            continue
        if edit.condition.kind == "above" and not z > edit.condition.threshold:
            continue
        level = 0.0
        if edit.level is not None:
            levels = edit.level.absolute()
            level = levels[j] if len(levels) > 1 else levels[0]
        put = {
            "add": z + level,
            "scale": z * level,
            "clamp": torch.tensor(level).double(),
            "ablate": torch.tensor(0.0).double(),
            "mean_ablate": torch.tensor(level).double(),
            "cap": z.clamp(max=level),
            "floor": z.clamp(min=level),
        }[edit.op]
        delta += edit.gain * (put - z) * write
    return delta


def edit_row(edits: Sequence[PlannedEdit], x: Tensor, prompt_length: int, start: int = 0) -> Tensor:
    """One row's activations `[pos, d_model]`, whose first token is number `start`, edited (fp64)."""
    out = x.double().clone()
    for i in range(x.shape[0]):
        total = torch.zeros(x.shape[1]).double()
        vector: Tensor | None = None
        for edit in edits:
            plain = edit.intervention if isinstance(edit, RandomMatched) else edit
            if isinstance(edit, RandomMatched):
                vector = edit.vector.double()
            if touches(plain, start + i, prompt_length):
                total += token_delta(plain, x[i])
        out[i] += total if vector is None else total.norm() * vector
    return out


def slow_logits(hf: Any, ids: Sequence[int], edits: Sequence[PlannedEdit], prompt_length: int) -> Tensor:
    """Logits `[pos, d_vocab]` of one row alone: no padding, no cache, torch hooks on Llama's layers."""
    handles = []
    for edit_site in {edit.site for edit in edits}:
        block = int(edit_site.split(".")[1])
        assert edit_site.endswith("hook_resid_post")
        here = [edit for edit in edits if edit.site == edit_site]
        handles.append(hf.model.layers[block].register_forward_hook(_hook(here, prompt_length)))
    try:
        with torch.no_grad():
            return hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def _hook(edits: Sequence[PlannedEdit], prompt_length: int) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return edit_row(edits, output[0], prompt_length).to(output.dtype)[None]

    return hook


def slow_greedy(hf: Any, prompt: Sequence[int], edits: Sequence[PlannedEdit], n: int) -> list[int]:
    """Greedy continuation of one prompt, never the padding token 0, all computed anew for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(1 + int(slow_logits(hf, ids, edits, len(prompt))[-1, 1:].argmax()))
    return ids[len(prompt) :]
