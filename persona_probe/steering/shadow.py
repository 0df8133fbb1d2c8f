"""The same forward passes without the edits, to say how far these move the next-token distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Shadow:
    """A second run of every pass, with a cache of its own. Twice the time, twice the cache."""

    def __init__(self) -> None:
        self.running = False
        """Whether the pass now under way is the second one."""
        self._cache: Any = None
        self._own_cache: Any = None
        self._logits: Tensor | None = None

    @contextmanager
    def beside(
        self, model: nn.Module, compare: Callable[[Float[Tensor, "batch pos"]], None]
    ) -> Generator[None, None, None]:
        """Run beside every pass of the causal `model`, and give `compare` the divergence
        KL(edited || unedited), in nats, at each token whose logits were computed.
        """

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.running:
                self._logits = self._run(module, args, kwargs)

        def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
            if self.running:
                return
            self._cache = getattr(output, "past_key_values", None)
            assert self._logits is not None
            compare(divergence(output.logits.detach(), self._logits))

        handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def select(self, rows: Int[Tensor, " row"]) -> None:
        """Keep these rows, as in the caller's own cache."""
        if self._own_cache is not None:
            self._own_cache.batch_select_indices(rows)

    @torch.no_grad()
    def _run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            # a cache that is new here is taken over as it stands; after that, each pass fills its own
            known = cache is self._cache and self._own_cache is not None and cache.get_seq_length() > 0
            own = self._own_cache if known else copy.deepcopy(cache)
            kwargs = {**kwargs, "past_key_values": own}
        self.running = True
        try:
            output = module(*args, **kwargs)
        finally:
            self.running = False
        self._own_cache = getattr(output, "past_key_values", None)
        return output.logits


def divergence(
    logits: Float[Tensor, "*batch d_vocab"], reference: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(softmax(logits) || softmax(reference)) in nats, in fp32."""
    mine, other = logits.float().log_softmax(dim=-1), reference.float().log_softmax(dim=-1)
    return (mine.exp() * (mine - other)).sum(dim=-1).clamp(min=0)
