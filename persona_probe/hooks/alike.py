"""Run the first blocks of a pass once for all rows that are still alike.

Rows that read the same tokens stay the same until an edit tells them apart. Where one prompt is read
under many fixes, the blocks before the first edited site therefore run on the distinct prompts alone,
and the rows part there. What comes out is what whole rows give, up to the rounding of another batch
shape; the cache of those blocks is repeated for every row.

Not covered: passes with anything in the cache, and families other than those in `FAMILIES`, whose
blocks may be given tensors that this would not know how to cut.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from persona_probe.hooks.sites import blocks_of, causal_lm, parse_site

FAMILIES = ("gemma2", "gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Model types of which this is tested."""


def blocks_before(sites: Iterable[str]) -> int:
    """How many of the first blocks a pass goes through before it comes to any of `sites`."""
    places = [parse_site(name) for name in sites]
    return min((place.block + (place.kind == "hook_resid_post") for place in places), default=0)


class Alike:
    """`of_row[i]` is the place of row i's prompt among the distinct ones, the rows `first`."""

    def __init__(self, prompts: Iterable[tuple[int, ...]]) -> None:
        places: dict[tuple[int, ...], int] = {}
        first: list[int] = []
        of_row: list[int] = []
        for row, prompt in enumerate(prompts):
            if prompt not in places:
                places[prompt] = len(first)
                first.append(row)
            of_row.append(places[prompt])
        self.first: Int[Tensor, " distinct"] = torch.tensor(first)
        self.of_row: Int[Tensor, " row"] = torch.tensor(of_row)

    @contextmanager
    def sharing(self, hf_model: nn.Module, blocks: int) -> Generator[int, None, None]:
        """Within the block, a pass over these rows runs the first `blocks` blocks on the distinct ones.

        Yields how many blocks those are in fact: 0 where nothing is alike, or the family is not covered.
        Afterwards the cache wants `repeat`.
        """
        config = cast("Any", causal_lm(hf_model)).config
        plain = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        if len(self.first) == len(self.of_row) or config.model_type not in FAMILIES or not plain:
            blocks = 0
        modules = blocks_of(hf_model)
        with ExitStack() as stack:
            for block in range(blocks):
                handle = modules[block].register_forward_pre_hook(self._cut, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if blocks:
                # before any edit of what this block leaves
                stack.callback(modules[blocks - 1].register_forward_hook(self._part, prepend=True).remove)
            yield blocks

    def repeat(self, cache: Any, blocks: int) -> None:
        """Give the cache of the first `blocks` blocks all rows."""
        for layer in cache.layers[:blocks]:
            layer.batch_select_indices(self.of_row.to(layer.keys.device))

    def _cut(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._first(args), self._first(kwargs)

    def _first(self, given: Any) -> Any:
        """The distinct rows of every tensor that has all rows."""
        if isinstance(given, Tensor):
            whole = given.ndim >= 2 and given.shape[0] == len(self.of_row)
            return given.index_select(0, self.first.to(given.device)) if whole else given
        if isinstance(given, tuple | list):
            parts = [self._first(part) for part in cast("list[Any]", given)]
            return tuple(parts) if isinstance(given, tuple) else parts
        if isinstance(given, Mapping):
            return {name: self._first(part) for name, part in cast("dict[str, Any]", given).items()}
        return given

    def _part(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        every = x.index_select(0, self.of_row.to(x.device))
        return every if isinstance(output, Tensor) else (every, *output[1:])
