"""An intervention is data: what is done to which direction, where, how strongly, and when.

The operations act on the amount z that is read, and put it at z':

    add          z + level              cap          min(z, level) scale        z level
    floor        max(z, level) clamp        level                  ablate       0 mean_ablate  the
    base model's mean  project_out  0, of the whole component in the span of the directions

and the activation becomes `x + gain (z' - z) W`, with W the decoder rows where z is read by the
encoder, the unit decoder rows where it is a projection. So an edit keeps whatever the dictionary
does not explain. Gain 0 is no edit, bit for bit; 1 is the operation; above 1 it over-corrects: a
cap at gain 2 reflects the excess.

Order: sites act in the order in which a forward pass reaches them, each on what the earlier ones
left. Several latents in one target, and several interventions at one site, all read the unedited x,
and what they move adds up; two that act on one direction at the same tokens are refused by
`SteeringPlan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.errors import InputError, MismatchError
from persona_probe.hooks.sites import parse_site
from persona_probe.steering.affine import AffineEdit
from persona_probe.steering.bridge_hooks import bridge_hooks
from persona_probe.steering.kernel import SiteEdit
from persona_probe.steering.positions import Positions, checked_positions
from persona_probe.steering.reading import encoded, projected
from persona_probe.steering.target import Encoder, Read, Target, direction, latents

__all__ = [
    "Condition",
    "Encoder",
    "Intervention",
    "Level",
    "Op",
    "Positions",
    "Read",
    "Target",
    "Unit",
    "direction",
    "latents",
]

Op = Literal["add", "scale", "clamp", "ablate", "mean_ablate", "project_out", "cap", "floor"]
Unit = Literal["absolute", "residual_rms", "max_activation", "base_mean"]

_WITHOUT_LEVEL = ("ablate", "project_out")


@dataclass(frozen=True)
class Level:
    """Where the amount is put: `values` (one for all latents, or one each) in a unit, `scale` of it
    absolute.

    `absolute`: the amounts themselves, scale 1. `residual_rms`: scale is the root mean square of the
    residual stream's entries at the site. `max_activation`: scale is the latents' largest
    activation. `base_mean`: the base model's mean amounts (as values, or as the scale of values
    that count them).
    """

    values: tuple[float, ...]
    unit: Unit = "absolute"
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise InputError(f"unknown unit {self.unit!r}; there are {', '.join(get_args(Unit))}")
        if not self.values:
            raise InputError("a level needs a value, or one per latent")
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not all(math.isfinite(number) for number in (*self.values, *scales)):
            raise InputError(f"a level must be finite, got {self.values} x {self.scale}")
        if len({1, len(self.values), len(scales)}) > 2:
            raise InputError(f"{len(self.values)} values do not go with {len(scales)} scales")
        if self.unit == "absolute" and any(scale != 1.0 for scale in scales):
            raise InputError(
                f"an absolute level has scale 1, got {self.scale}",
                fix="name the unit that the scale converts from",
            )

    def absolute(self) -> tuple[float, ...]:
        """In units of the amount read: `values * scale`."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        n = max(len(self.values), len(scales))
        values = self.values * (n if len(self.values) == 1 else 1)
        scales = scales * (n if len(scales) == 1 else 1)
        return tuple(value * scale for value, scale in zip(values, scales, strict=True))

    def in_unit(self, unit: Unit, scale: float | tuple[float, ...]) -> Level:
        """The same amounts counted in another unit, `scale` of it absolute (see `unit_scales`)."""
        scales = scale if isinstance(scale, tuple) else (scale,)
        if any(one == 0 for one in scales):
            raise InputError(f"a level cannot be counted in units of 0 ({unit}: {scale})")
        amounts = self.absolute()
        n = max(len(amounts), len(scales))
        wide = amounts * (n if len(amounts) == 1 else 1)
        each = scales * (n if len(scales) == 1 else 1)
        if len(wide) != len(each):
            raise InputError(f"{len(amounts)} levels do not go with {len(scales)} scales")
        return Level(tuple(a / b for a, b in zip(wide, each, strict=True)), unit, scale)

    def __str__(self) -> str:
        numbers = ", ".join(f"{value:.4g}" for value in self.values)
        if self.unit == "base_mean" and self.scale == 1.0:
            return f"{numbers} (the base's mean)"
        return numbers if self.unit == "absolute" else f"{numbers} x {self.unit}"


@dataclass(frozen=True)
class Condition:
    """When the edit is made: `always`, where z > 0 (`active`), where z > threshold (`above`).

    Asked of each latent's own z, or of the one latent (or direction) `of`, read at the same site.
    `decided="token"` asks at every token. `decided="prompt"` asks once: whether z was above the
    threshold anywhere in the prompt; as that is only known at its end, such an edit is of the
    response. `steering.threshold` sets thresholds from data.
    """

    kind: Literal["always", "active", "above"] = "always"
    threshold: float = 0.0
    of: Target | None = None
    read: Read | Literal["auto"] = "auto"
    """How the z of `of` is measured; `auto` is its encoder where it has one."""
    decided: Literal["token", "prompt"] = "token"

    def __post_init__(self) -> None:
        if self.kind not in ("always", "active", "above"):
            raise InputError(f"unknown condition {self.kind!r}; there are always, active, above")
        if not math.isfinite(self.threshold):
            raise InputError(f"a condition's threshold must be finite, got {self.threshold}")
        if self.decided not in ("token", "prompt"):
            raise InputError(f"a condition is decided by token or by prompt, not by {self.decided!r}")
        if self.kind == "always" and (self.of is not None or self.decided == "prompt"):
            raise InputError('a condition that always holds asks nothing; give kind="above"')
        if self.of is None:
            if self.read != "auto":
                raise InputError("a condition on the edited latents reads them as the edit does")
            return
        if self.of.n_latents != 1:
            raise InputError(f"a condition is about one latent or direction, not {self.of.n_latents}")
        if self.read == "auto":
            object.__setattr__(self, "read", "projection" if self.of.encoder is None else "encoder")
        if self.read == "encoder" and self.of.encoder is None:
            raise InputError(f"{self.of} has no encoder to read it by", fix='read="projection"')

    @property
    def above(self) -> float:
        """The amount above which the edit is made."""
        return {"always": -math.inf, "active": 0.0, "above": self.threshold}[self.kind]

    def __str__(self) -> str:
        if self.kind == "always":
            return "always"
        asked = f"{'z' if self.of is None else self.of} > {self.above:g}"
        return f"where {asked}" if self.decided == "token" else f"if {asked} in the prompt"


@dataclass(frozen=True)
class Intervention:
    """One edit of the residual stream; see the module's text for the operations.

    Raises `InputError` for anything that cannot be carried out, and `UnknownSiteError` for a
    malformed site.
    """

    op: Op
    target: Target
    site: str
    """TransformerLens name, such as `blocks.3.hook_resid_post`."""
    positions: Positions = "all"
    """Of each row's own tokens: a name, or indices from 0 (or negative, from the prompt's end). The
    response includes the last prompt token. See `steering.positions`.
    """
    level: Level | None = None
    """Needed by every op but ablate and project_out."""
    gain: float = 1.0
    """Multiplies the edit."""
    read: Read | Literal["auto"] = "auto"
    """How z is measured; `auto` becomes `encoder` where the target has one and the op is not
    project_out.
    """
    condition: Condition = field(default_factory=Condition)

    def __post_init__(self) -> None:
        if self.op not in get_args(Op):
            raise InputError(f"unknown operation {self.op!r}; there are {', '.join(get_args(Op))}")
        parse_site(self.site)
        object.__setattr__(self, "positions", checked_positions(self.positions))
        if self.read == "auto":
            plain = self.target.encoder is None or self.op == "project_out"
            object.__setattr__(self, "read", "projection" if plain else "encoder")
        if self.read not in get_args(Read):
            raise InputError(f"unknown read {self.read!r}; there are {', '.join(get_args(Read))}")
        if self.read == "encoder" and self.target.encoder is None:
            raise InputError(f"{self.target} has no encoder to read it by", fix='read="projection"')
        if not (math.isfinite(self.gain) and self.gain >= 0):
            raise InputError(
                f"gain must be a finite number from 0, got {self.gain}",
                fix="put a minus on the level to push the other way",
            )
        self._check_level()
        self._check_condition()
        if self.op == "project_out":
            self._check_project_out()

    def _check_condition(self) -> None:
        of = self.condition.of
        if of is not None and of.d_model != self.target.d_model:
            raise MismatchError(
                f"the condition reads width {of.d_model}, and {self.target} has width {self.target.d_model}"
            )
        later = ("response", "last_prompt", "think", "answer")
        if self.condition.decided == "prompt" and self.positions not in later:
            raise InputError(
                f"a condition decided on the prompt is known at its end, too late for {self.positions!r}",
                fix=f"positions: one of {', '.join(later)}",
            )

    def _check_level(self) -> None:
        level = self.level
        if (level is None) != (self.op in _WITHOUT_LEVEL):
            raise InputError(f"{self.op} {'needs a' if level is None else 'takes no'} level")
        if level is None:
            return
        if len(level.absolute()) not in (1, self.target.n_latents):
            raise InputError(f"{len(level.absolute())} levels were given for {self.target.n_latents} latents")
        if self.op == "mean_ablate" and level.unit != "base_mean":
            raise InputError(
                f"mean_ablate puts the amount at the base model's mean, got a level in {level.unit}",
                fix='unit="base_mean", or clamp',
            )
        if self.op == "scale" and level.unit != "absolute":
            raise InputError(f"scale multiplies by a plain number, got a level in {level.unit}")

    def _check_project_out(self) -> None:
        if self.read != "projection":
            raise InputError("project_out removes the whole component", fix='read="projection"')
        if self.target.n_latents > 1 and self.condition.kind != "always" and self.condition.of is None:
            raise InputError(
                "projecting out several directions at once has no amount of each for a condition",
                fix="one intervention per direction, or a condition on something else (of=)",
            )
        rank = int(torch.linalg.matrix_rank(self.target.unit.double(), rtol=1e-6))
        if rank < self.target.n_latents:
            raise InputError("the directions to project out depend on one another", fix="leave one out")

    @property
    def over_corrects(self) -> bool:
        """Whether gain is above 1: the edit goes beyond the operation that it is named after."""
        return self.gain > 1

    def with_gain(self, gain: float) -> Intervention:
        """The same at another gain."""
        return replace(self, gain=gain)

    @cached_property
    def compiled(self) -> AffineEdit:
        """The intervention as numbers, for the kernel."""
        n = self.target.n_latents
        coefficients = torch.tensor([0.0, 0.0, -math.inf, math.inf, self.condition.above])
        slope, shift, low, high, above = coefficients[:, None].repeat(1, n).double()
        if self.level is not None:
            level = torch.tensor(self.level.absolute(), dtype=torch.float64).expand(n)
        else:
            level = torch.zeros(n, dtype=torch.float64)
        match self.op:
            case "add":
                shift = level
            case "scale":
                slope = level - 1
            case "cap":
                high = level
            case "floor":
                low = level
            case _:
                slope, shift = torch.full_like(level, -1), level
        if self.read == "projection":
            source = projected(self._basis())
            write = source.read.T
        else:
            source = encoded(self.target)
            write = self.target.decoder
        bias, threshold = source.bias, source.threshold
        return AffineEdit(
            read=source.read.float(),
            coefficients=torch.stack([bias, threshold, slope, shift, low, high, above]).float(),
            write=(self.gain * write.double()).float(),
            positions=self.positions,
            top_k=source.top_k,
            columns=source.columns,
            gate=self._gate(),
            on_prompt=self.condition.decided == "prompt",
        )

    def _gate(self) -> AffineEdit | None:
        """What the condition reads, where that is not what is edited."""
        of = self.condition.of
        if of is None:
            return None
        source = projected(of.unit) if self.condition.read == "projection" else encoded(of)
        nothing = torch.zeros(1, of.d_model)
        coefficients = torch.zeros(7, 1)
        coefficients[0], coefficients[1] = source.bias, source.threshold
        return AffineEdit(
            source.read.float(), coefficients, nothing, self.positions, source.top_k, source.columns
        )

    def _basis(self) -> Float[Tensor, "latent d_model"]:
        """Unit rows; orthonormal ones where the span itself is removed."""
        if self.op != "project_out" or self.target.n_latents == 1:
            # QR may turn a single row round, and a condition is about its sign
            return self.target.unit
        return torch.linalg.qr(self.target.unit.double().T).Q.T.float()

    def fwd_hooks(
        self,
        *,
        prompt_lengths: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks for `TransformerBridge.run_with_hooks(fwd_hooks=...)` and `.hooks(...)`.

        A bridge hook sees one activation and nothing else: it must cover the whole rows, so
        generate without KV cache (`use_past_kv_cache=False`) unless positions are `all`. See
        `bridge_hooks` for the arguments.
        """
        sites = {self.site: SiteEdit([[self.compiled]])} if self.gain else {}
        return bridge_hooks(sites, prompt_lengths=prompt_lengths, attention_mask=attention_mask)

    def __str__(self) -> str:
        parts = [f"{self.op} {self.target}"]
        if self.level is not None:
            parts.append(f"at {self.level}")
        parts.append(f"in {self.site} ({self.read}, {self.positions} tokens)")
        if self.condition.kind != "always":
            parts.append(str(self.condition))
        parts.append(f"gain {self.gain:g}" + (" (over-corrects)" if self.over_corrects else ""))
        return " ".join(parts)

    def _repr_html_(self) -> str:
        facts = {
            "operation": self.op,
            "target": self.target,
            "site": self.site,
            "positions": self.positions,
            "level": self.level,
            "amount read by": self.read,
            "condition": self.condition,
            "gain": f"{self.gain:g}" + (" (over-corrects)" if self.over_corrects else ""),
        }
        rows = "".join(
            f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>"
            for name, value in facts.items()
            if value is not None
        )
        return f"<table>{rows}</table>"
