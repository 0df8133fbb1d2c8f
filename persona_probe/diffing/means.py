"""Mean activations of several models on the same conversations: all that the direction path needs,
with no SAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64, Int
from torch import Tensor

from persona_probe.activations.masks import TokenMask
from persona_probe.activations.stream import stream
from persona_probe.diffing.statistics import MeanSums, cluster_mean, number_clusters
from persona_probe.errors import InputError, MismatchError
from persona_probe.model.chat import Rendered
from persona_probe.model.language_model import LanguageModel
from persona_probe.model.pair import ModelPair


@dataclass(frozen=True, eq=False)
class SiteMeans:
    """Mean activation at one site, per model (in the order in which they were given; the first is
    the base).

    Over counted tokens, then over conversations.
    """

    site: str
    mean: Float64[Tensor, "model d_model"]
    cluster_sums: Float64[Tensor, "model cluster d_model"]
    """Sums of the conversations' means by cluster: what errors of projections are made of."""
    conversations: Int[Tensor, " cluster"]
    """Conversations of each cluster."""
    residual_rms: Float64[Tensor, " model"]
    """Root mean square of the entries of an activation: norm / sqrt(d_model), over all counted
    tokens.
    """
    tokens: int

    def shift(self, model: int = 1) -> Float64[Tensor, " d_model"]:
        """Mean activation of `model` minus the base's."""
        return self.mean[model] - self.mean[0]

    def projected_shift(self, unit: Float64[Tensor, " d_model"], model: int = 1) -> tuple[float, float]:
        """The shift of `model` along `unit`, and its cluster-robust standard error (NaN with one
        cluster).
        """
        sums = (self.cluster_sums[model] - self.cluster_sums[0]) @ unit.double()
        found = cluster_mean(sums[:, None], self.conversations)
        return float(found.mean), float(found.error)


def mean_difference(
    models: Sequence[LanguageModel],
    rendered: Sequence[Rendered],
    clusters: Sequence[str] | None = None,
    sites: Sequence[str] = (),
    mask: TokenMask | None = None,
    *,
    batch_tokens: int = 4096,
) -> dict[str, SiteMeans]:
    """Mean activations of `models` (base first) at `sites`, in one pass over `rendered`; by site.

    `clusters` names each conversation's question (each its own, by default); `mask` counts the last
    prompt token and the answer by default.

    Raises `MismatchError` (models that do not belong together), `UnknownSiteError`, `InputError`
    (nothing to read), `NonFiniteError`."""
    for model in models[1:]:
        ModelPair(models[0], model)
    if not sites:
        raise InputError("no site to read", fix="name one, such as blocks.3.hook_resid_post")
    numbers, names = number_clusters(check_clusters(clusters, rendered))
    sums = {site: MeanSums(len(models), len(names), models[0].d_model) for site in sites}
    for chunk in stream(models, rendered, sites, mask or TokenMask("answer"), batch_tokens=batch_tokens):
        for site, its in sums.items():
            read = [chunk.activations[i, site] for i in range(len(models))]
            its.add(chunk.document, numbers, read)
    return {site: site_means(site, its) for site, its in sums.items()}


def site_means(site: str, sums: MeanSums) -> SiteMeans:
    """The means that `sums` come to."""
    n = int(sums.conversations.sum())
    width = sums.activation.shape[-1]
    return SiteMeans(
        site=site,
        mean=sums.activation.sum(dim=1) / n,
        cluster_sums=sums.activation,
        conversations=sums.conversations,
        residual_rms=(sums.square / (sums.tokens * width)).sqrt(),
        tokens=sums.tokens,
    )


def check_clusters(clusters: Sequence[str] | None, rendered: Sequence[Rendered]) -> Sequence[str]:
    """One cluster name per conversation. Raises `MismatchError` when there are more or fewer."""
    if clusters is None:
        return [str(i) for i in range(len(rendered))]
    if len(clusters) != len(rendered):
        raise MismatchError(
            f"{len(rendered)} conversations and {len(clusters)} cluster names: one each is needed"
        )
    return clusters
