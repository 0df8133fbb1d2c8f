"""Batches of activations for training a dictionary, some of them kept back to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from sae_lens.training.mixing_buffer import mixing_buffer
from torch import Tensor

from persona_probe.errors import InputError, NonFiniteError

HELD_OUT_TOKENS = 16_384
"""At most so many tokens (and at most a tenth) are kept out of training to measure on; as many
calibrate.
"""


def steps_for(tokens: int, held_out: int, batch_tokens: int, steps: int | None) -> int:
    """Steps of training: `steps`, or one pass over what is not held out.

    Raises `InputError` where that is less than two batches.
    """
    left = tokens - held_out
    if left < 2 * batch_tokens:
        raise InputError(
            f"{tokens} tokens of activations are too few: {held_out} are held out, and at least two batches "
            f"of {batch_tokens} are needed beside them",
            fix="capture more tokens, or lower batch_tokens",
        )
    return left // batch_tokens if steps is None else steps


class Feed(Iterator[Tensor]):
    """Batches of activations; keeps `held_out` tokens back and remembers the last ones it gave
    (`recent`).
    """

    def __init__(
        self,
        activations: Tensor | Iterable[Tensor],
        batch_tokens: int,
        steps: int | None,
        device: str,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.device = device
        self._recent: list[Tensor] = []
        if isinstance(activations, Tensor):
            n = activations.shape[0]
            held = min(HELD_OUT_TOKENS, n // 10)
            self.steps = steps_for(n, held, batch_tokens, steps)
            _check_finite(activations)
            order = torch.randperm(n)
            self.held_out = activations[order[:held]].float().to(device)
            self._batches = self._shuffled(activations, order[held:])
        else:
            if steps is None:
                raise InputError("steps must be given when activations come as an iterable")
            self.steps = steps
            chunks = iter(activations)
            wanted = min(HELD_OUT_TOKENS, steps * batch_tokens // 10)
            self.held_out, rest = _take(chunks, max(1, wanted))
            self.held_out = self.held_out.to(device)
            buffer = max(16 * batch_tokens, 4 * HELD_OUT_TOKENS)
            self._batches = mixing_buffer(buffer, batch_tokens, _floats(rest, chunks))

    def __next__(self) -> Tensor:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise InputError(
                f"the activations ran out before step {self.steps} of {self.batch_tokens} tokens",
                fix="give more activations, or fewer steps",
            ) from None
        self._recent.append(batch)
        if (len(self._recent) - 1) * self.batch_tokens >= HELD_OUT_TOKENS:
            self._recent.pop(0)
        return batch.to(self.device)

    def recent(self) -> Float[Tensor, "token d_model"]:
        return torch.cat(self._recent)[-HELD_OUT_TOKENS:].to(self.device)

    def _shuffled(self, activations: Tensor, order: Tensor) -> Iterator[Tensor]:
        while True:
            order = order[torch.randperm(order.shape[0])]
            for start in range(0, order.shape[0] - self.batch_tokens + 1, self.batch_tokens):
                yield activations[order[start : start + self.batch_tokens]].float()


def _take(chunks: Iterator[Tensor], wanted: int) -> tuple[Tensor, Tensor]:
    """The first `wanted` tokens, and what was left of the chunk they ended in."""
    taken: list[Tensor] = []
    n = 0
    for chunk in chunks:
        _check_finite(chunk)
        taken.append(chunk.float())
        n += chunk.shape[0]
        if n >= wanted:
            break
    if n < wanted:
        raise InputError(f"the activations end after {n} tokens; {wanted} are held out alone")
    together = torch.cat(taken)
    return together[:wanted], together[wanted:]


def _floats(first: Tensor, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    for chunk in chunks:
        _check_finite(chunk)
        yield chunk.float()


def _check_finite(x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("the activations hold NaN or infinity")
