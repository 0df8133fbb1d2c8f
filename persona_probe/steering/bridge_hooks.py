"""The same edits as hook functions for a `TransformerBridge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import MismatchError
from persona_probe.hooks.sites import Site, parse_site
from persona_probe.steering.kernel import SiteEdit
from persona_probe.steering.positions import RowTokens, row_tokens


def bridge_hooks(
    sites: Mapping[str, SiteEdit],
    *,
    prompt_lengths: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> list[tuple[str, Callable[..., Any]]]:
    """`(hook name, hook)` for every site (two hooks for `resid_mid`).

    `attention_mask` (`[batch, pos]`; what later passes add to it is real) says which tokens are
    padding, `prompt_lengths` how many real tokens of each row are prompt (default: those of the
    mask, else all). A pass is taken to hold whole rows: with a KV cache only edits at all positions
    are right. Raises `MismatchError`, from within the pass, when rows are shorter than the mask or
    the prompt.
    """

    hooks: list[tuple[str, Callable[..., Any]]] = []

    def add(site: Site, edit: SiteEdit) -> None:
        def apply(x: Float[Tensor, "batch pos d_model"]) -> Tensor:
            return edit.apply(x, _whole_rows(x, prompt_lengths, attention_mask))[0]

        if site.kind == "hook_resid_mid":
            hooks.extend(_middle(site.block, apply))
        else:
            hooks.append((site.name, lambda x, hook: apply(x)))  # noqa: ARG005

    # in the order of the forward pass: the middle is read after the edits of what it is made of
    for name in sorted(sites, key=parse_site):
        add(parse_site(name), sites[name])
    return hooks


def _middle(block: int, apply: Callable[[Tensor], Tensor]) -> list[tuple[str, Callable[..., Any]]]:
    """A bridge's `hook_resid_mid` is what the norm reads, not the stream: edit what attention adds."""
    entered: list[Tensor] = []

    def remember(x: Tensor, hook: object) -> None:  # noqa: ARG001
        entered[:] = [x]

    def edit_sum(attn_out: Tensor, hook: object) -> Tensor:  # noqa: ARG001
        middle = entered.pop() + attn_out
        edited = apply(middle)
        return attn_out if edited is middle else attn_out + (edited - middle)

    return [
        (f"blocks.{block}.hook_resid_pre", remember),
        (f"blocks.{block}.hook_attn_out", edit_sum),
    ]


def _whole_rows(x: Tensor, prompt_lengths: Sequence[int] | None, mask: Tensor | None) -> RowTokens:
    batch, length = x.shape[:2]
    shortest = max(mask.shape[1] if mask is not None else 0, *(prompt_lengths or (0,)), 0)
    if length < shortest:
        raise MismatchError(
            f"a pass of {length} tokens came where rows have at least {shortest}: a hook cannot "
            "see the KV cache",
            fix="generate with use_past_kv_cache=False, or use steer()",
        )
    mask = grown = None if mask is None else mask.to(x.device)
    if mask is not None and mask.shape[1] < length:
        grown = torch.cat([mask, mask.new_ones(mask.shape[0], length - mask.shape[1])], dim=1)
    lengths: Tensor | None = None
    if prompt_lengths is not None:
        lengths = torch.tensor(list(prompt_lengths), device=x.device)
    elif mask is not None:
        lengths = mask.long().sum(dim=-1)
    if lengths is not None:
        if batch % len(lengths):
            raise MismatchError(f"{len(lengths)} prompt lengths were given for {batch} rows")
        lengths = lengths.repeat_interleave(batch // len(lengths))
    return row_tokens(batch, length, attention_mask=grown, device=x.device, prompt_lengths=lengths)
