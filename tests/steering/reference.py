"""Steering written the slow way: one row, one token, one latent at a time, in fp64, by the textbook formulas.

Shares no code with `persona_probe.steering` but the `Intervention` that it is told to carry out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from persona_probe.steering import Intervention, RandomMatched, Target
from persona_probe.steering.plan import PlannedEdit

OPENS, CLOSES = 38, 39
"""The ids of `<think>` and `</think>` in the tests' tokenizer."""


def touches(edit: Intervention, position: int, prompt_length: int, ids: Sequence[int] = ()) -> bool:
    if isinstance(edit.positions, tuple):
        return position in edit.positions or (
            position < prompt_length and position - prompt_length in edit.positions
        )
    if edit.positions in ("think", "answer"):
        marks = [token for token in ids[: position + 1] if token in (OPENS, CLOSES)]
        thinking = bool(marks) and marks[-1] == OPENS
        known = bool(marks) or position >= prompt_length
        right = thinking if edit.positions == "think" else known and not thinking
        return right and position >= prompt_length - 1
    return {
        "all": True,
        "prompt": position < prompt_length,
        "response": position >= prompt_length - 1,
        "last_prompt": position == prompt_length - 1,
    }[edit.positions]


def amount(target: Target, read: str, x: Tensor, j: int = 0) -> Tensor:
    """z of the target's latent j on one activation."""
    x = x.double()
    if read == "projection":
        row = target.decoder[j].double()
        return x @ row / row.norm()
    encoder = target.encoder
    assert encoder is not None
    centred = x if encoder.b_dec is None else x - encoder.b_dec.double()
    pre = centred @ encoder.weight.double() + encoder.bias.double()
    column = j if encoder.columns is None else encoder.columns[j]
    fires = encoder.threshold is None or bool(pre[column] > encoder.threshold[column])
    fires = fires and (encoder.k is None or column in pre.topk(encoder.k).indices.tolist())
    return pre[column].clamp(min=0) if fires else torch.zeros_like(pre[column])


def holds(edit: Intervention, x: Tensor, j: int, prompt: Tensor) -> bool:
    """Whether latent j of the edit is edited at x, in a row whose prompt has activations `[pos, d_model]`."""
    condition = edit.condition
    if condition.kind == "always":
        return True
    asked = prompt if condition.decided == "prompt" else x[None]
    if condition.of is not None:
        return any(bool(amount(condition.of, condition.read, y) > condition.above) for y in asked)
    return any(bool(amount(edit.target, edit.read, y, j) > condition.above) for y in asked)


def token_delta(edit: Intervention, x: Tensor, prompt: Tensor | None = None) -> Tensor:
    """What the edit adds to one activation `[d_model]`."""
    prompt = x[None] if prompt is None else prompt
    x = x.double()
    target = edit.target
    decoder = target.decoder.double()
    delta = torch.zeros_like(x)
    if edit.op == "project_out":
        span = decoder.T
        inside = span @ torch.linalg.inv(span.T @ span) @ span.T @ x
        return -edit.gain * inside if holds(edit, x, 0, prompt) else delta
    for j in range(decoder.shape[0]):
        write = decoder[j] / decoder[j].norm() if edit.read == "projection" else decoder[j]
        z = amount(target, edit.read, x, j)
        if not holds(edit, x, j, prompt):
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


def edit_row(edits: Sequence[PlannedEdit], x: Tensor, prompt_length: int, ids: Sequence[int] = ()) -> Tensor:
    """One row's activations `[pos, d_model]`, edited (fp64)."""
    out = x.double().clone()
    for i in range(x.shape[0]):
        total = torch.zeros(x.shape[1]).double()
        vector: Tensor | None = None
        for edit in edits:
            plain = edit.intervention if isinstance(edit, RandomMatched) else edit
            if isinstance(edit, RandomMatched):
                vector = edit.vector.double()
            if touches(plain, i, prompt_length, ids):
                total += token_delta(plain, x[i], x[:prompt_length])
        out[i] += total if vector is None else total.norm() * vector
    return out


def slow_logits(hf: Any, ids: Sequence[int], edits: Sequence[PlannedEdit], prompt_length: int) -> Tensor:
    """Logits `[pos, d_vocab]` of one row alone: no padding, no cache, torch hooks on Llama's layers."""
    handles = []
    for edit_site in {edit.site for edit in edits}:
        block = int(edit_site.split(".")[1])
        assert edit_site.endswith("hook_resid_post")
        here = [edit for edit in edits if edit.site == edit_site]
        handles.append(hf.model.layers[block].register_forward_hook(_hook(here, prompt_length, ids)))
    try:
        with torch.no_grad():
            return hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def _hook(edits: Sequence[PlannedEdit], prompt_length: int, ids: Sequence[int] = ()) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        return edit_row(edits, output[0], prompt_length, ids).to(output.dtype)[None]

    return hook


def slow_greedy(hf: Any, prompt: Sequence[int], edits: Sequence[PlannedEdit], n: int) -> list[int]:
    """Greedy continuation of one prompt, never the padding token 0, all computed anew for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(1 + int(slow_logits(hf, ids, edits, len(prompt))[-1, 1:].argmax()))
    return ids[len(prompt) :]
