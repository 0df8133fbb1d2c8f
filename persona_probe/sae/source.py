"""Activations that can be read again from any shard on: what a training run that was killed needs.

They come from a store, or from a model that reads the documents whenever a shard is wanted. For one
plan both give the same shards, so training on either gives the same dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from persona_probe.activations.capture_plan import Data, plan_capture
from persona_probe.activations.masks import TokenMask
from persona_probe.activations.store import ActivationStore
from persona_probe.model.language_model import LanguageModel

SHARD_TOKENS = 4096
"""Tokens that a model reads at a time for training."""


@dataclass(frozen=True, eq=False)
class TokenSource:
    """One model's activations at one site, shard by shard. Made by `stored_tokens` or `live_tokens`."""

    site: str
    d_model: int
    sizes: tuple[int, ...]
    """Tokens of each shard: at most, where sinks have still to be found."""
    read: Callable[[int], Float[Tensor, "token d_model"]]
    digest: str
    """Of everything that decides the activations' bits."""
    model_name: str
    model_digest: str | None
    """Of the model's full weights, recorded in the dictionary that is trained."""

    @property
    def tokens(self) -> int:
        """Of all shards, at most."""
        return sum(self.sizes)


def stored_tokens(store: ActivationStore, site: str | None = None, model: int | str = 0) -> TokenSource:
    """The activations of one model of a store. Raises `MismatchError` for a site or model it has not."""
    index, chosen = store.index_of(model), store.site_of(site)
    return TokenSource(
        site=chosen,
        d_model=store.d_model,
        sizes=tuple(shard.tokens for shard in store.shards),
        read=lambda number: store.rows(number, index, chosen),
        digest=f"{store.digest} {index}",
        model_name=store.models[index].name,
        model_digest=store.models[index].weights,
    )


def live_tokens(
    lm: LanguageModel,
    data: Data,
    site: str,
    mask: TokenMask | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int | None = None,
) -> TokenSource:
    """What `lm` makes of `data`, read when it is needed and kept nowhere.

    Raises `UnknownSiteError`, and `InputError` where the mask (all tokens, by default) leaves nothing.
    """
    plan = plan_capture(
        lm, data, [site], mask or TokenMask("all"), shard_tokens=shard_tokens, batch_tokens=batch_tokens
    )
    return TokenSource(
        site=site,
        d_model=lm.d_model,
        sizes=tuple(int(plan.survey.selected[first:last].sum()) for first, last in plan.bounds),
        read=lambda number: plan.compute(number).activations[0, site],
        digest=plan.digest,
        model_name=lm.name,
        model_digest=lm.checkpoint.weights_digest,
    )
