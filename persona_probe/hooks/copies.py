"""A copy of a module tree that was made while hooks of ours were on the original.

Ours are there for the time of a block. What the copy got of them nothing would ever take off again,
and steering's `generate` is still the original's. Hooks of anyone else belong to the model.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
_OURS = ("persona_probe.hooks.", "persona_probe.steering.")


def unhooked(copied: M) -> M:
    """`copied`, freed (in place) of what `edit_at`, `capture_at` and `steer` put on the original."""
    for module in copied.modules():
        before, after = module._forward_pre_hooks, module._forward_hooks  # pyright: ignore[reportPrivateUsage]
        for hooks in (before, after):
            for number in [number for number, hook in hooks.items() if _is_ours(hook)]:
                del hooks[number]
        if _is_ours(vars(module).get("generate")):
            del module.generate
    return copied


def _is_ours(function: object) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_OURS)
