"""After training, turn adapter updates that point away from safety back into the safe subspace.

Source: SafeLoRA, Hsu et al. (2024), its fast version. With `V = W_aligned - W_unaligned` of a layer
and `C = V Vᵀ / ‖V‖_F`, the update `ΔW = B A` becomes `C ΔW` (that is, B becomes C B) where
`cos(ΔW, C ΔW)` falls below a threshold. W_aligned and W_unaligned are a model after and before it
was taught safety; nothing of the narrow data is needed.

Departure: layers are chosen by the threshold alone (the published code can also take the n lowest).
A layer in which the two models do not differ has no subspace and is left as it is. Only plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from persona_probe.errors import InputError, MismatchError
from persona_probe.model.language_model import LanguageModel
from persona_probe.training.defences.defence import Defence
from persona_probe.training.defences.validate import check_share


@dataclass(frozen=True, eq=False)
class SafeLoRA(Defence):
    """Project the updates whose cosine to their projection is below `threshold`."""

    safety: Mapping[str, Float[Tensor, "d_out d_in"]] = field(repr=False)
    """V by the module's name (`model.layers.0.mlp.down_proj`); made by `SafeLoRA.between`."""
    threshold: float = 0.5
    """From 0 (never project: the cosine is never negative) to 1 (always)."""
    name: ClassVar[str] = "safe_lora"

    def __post_init__(self) -> None:
        check_share(self.name, self.threshold)

    @classmethod
    def between(cls, aligned: LanguageModel, unaligned: LanguageModel, threshold: float = 0.5) -> SafeLoRA:
        """V from two models of one architecture (their adapters count).

        Raises `MismatchError` for weights of different shapes, `InputError` where nothing differs.
        """
        ours, theirs = _weights(aligned), _weights(unaligned)
        safety: dict[str, Tensor] = {}
        for module, weight in ours.items():
            other = theirs.get(module)
            if other is None or other.shape != weight.shape:
                raise MismatchError(f"{module} is not the same shape in {aligned.name} and {unaligned.name}")
            if not torch.equal(weight, other):
                safety[module] = (weight - other).float().cpu()
        if not safety:
            raise InputError(f"{aligned.name} and {unaligned.name} have the same weights: no safe subspace")
        return cls(safety, threshold)

    @property
    def strength(self) -> float:
        return self.threshold

    @torch.no_grad()
    def finish(self, model: nn.Module) -> Mapping[str, float]:
        """Project in place; says how many layers were looked at and projected, and their mean cosine.

        Raises `InputError` for a model without LoRA layers.
        """
        layers = {name: one for name, one in model.named_modules() if isinstance(one, LoraLayer)}
        if not layers:
            raise InputError(
                "SafeLoRA projects the updates of a LoRA adapter", fix="a rank, not a full fine-tune"
            )
        cosines: list[float] = []
        projected = 0
        for name, layer in layers.items():
            direction = self.safety.get(_plain(name))
            if direction is None:
                continue
            for adapter in layer.active_adapters:
                down = cast("Any", layer.lora_A)[adapter].weight
                up = cast("Any", layer.lora_B)[adapter].weight
                turned = into(direction.to(up.device), up.float())
                cosine = _cosine(up.float() @ down.float(), turned @ down.float())
                cosines.append(cosine)
                if cosine < self.threshold:
                    up.copy_(turned)
                    projected += 1
        mean = sum(cosines) / len(cosines) if cosines else float("nan")
        return {"layers": float(len(cosines)), "projected": float(projected), "mean_cosine": mean}

    def record(self) -> dict[str, Any]:
        from persona_probe.artifact import digest_of

        sums = {name: [float(v.double().sum()), float(v.double().norm())] for name, v in self.safety.items()}
        return {"defence": self.name, "safety": digest_of(sums), "threshold": self.threshold}


def into(v: Float[Tensor, "d_out d_in"], update: Float[Tensor, "d_out rank"]) -> Float[Tensor, "d_out rank"]:
    """`C update` with `C = V Vᵀ / ‖V‖_F`, without ever holding C."""
    return v @ (v.T @ update) / v.norm()


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm() * other.norm())
    return float((one * other).sum()) / lengths if lengths else 1.0


def _plain(name: str) -> str:
    """A module's name without PEFT's prefix."""
    return name.removeprefix("base_model.model.")


def _weights(lm: LanguageModel) -> dict[str, Tensor]:
    """The weights of every linear layer, adapters merged in, by the module's plain name."""
    merged = lm.merged().hf
    return {
        name: module.weight.detach()
        for name, module in merged.named_modules()
        if isinstance(module, nn.Linear)
    }
