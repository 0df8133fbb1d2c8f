"""A *fix* on disk: a folder with one or more interventions, numbers in JSON and tensors in
safetensors.

    fix/
      intervention.json      what is done, where and how strongly
      tensors.safetensors    `<number>.decoder`, `<number>.encoder.weight`, ...

What is loaded equals what was saved bit for bit. Random controls (`RandomMatched`) are not fixes,
and not saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_probe.artifact import StrPath, atomic_folder, read_json, write_json
from persona_probe.errors import InputError, MissingPathError, PersonaProbeError
from persona_probe.steering.intervention import (
    Condition,
    Encoder,
    Intervention,
    Level,
    Op,
    Read,
    Target,
    Unit,
)
from persona_probe.steering.positions import NamedPositions

FORMAT = 1
_NUMBERS = "intervention.json"
_TENSORS = "tensors.safetensors"
_WRITTEN = "give a folder that save_fix or an audit (interventions/) wrote"
_ENCODER_TENSORS = ("weight", "bias", "threshold", "b_dec")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _LevelRecord(_Strict):
    values: tuple[float, ...]
    unit: Unit
    scale: float | tuple[float, ...]


class _EncoderRecord(_Strict):
    k: int | None
    columns: tuple[int, ...] | None


class _TargetRecord(_Strict):
    label: str
    indices: tuple[int, ...] | None
    dictionary_digest: str | None
    encoder: _EncoderRecord | None


class _ConditionRecord(_Strict):
    kind: Literal["always", "active", "above"]
    threshold: float
    of: _TargetRecord | None = None
    read: Read | Literal["auto"] = "auto"
    decided: Literal["token", "prompt"] = "token"


class _InterventionRecord(_Strict):
    op: Op
    site: str
    positions: NamedPositions | tuple[int, ...]
    level: _LevelRecord | None
    gain: float
    read: Read
    condition: _ConditionRecord
    target: _TargetRecord


class _FixRecord(_Strict):
    format: Literal[1]
    interventions: tuple[_InterventionRecord, ...]


def save_fix(
    interventions: Intervention | Sequence[Intervention],
    folder: StrPath,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a fix as a folder, whole or not at all, and return its path.

    Raises `InputError` for no intervention, for a random control, and for a folder in use (unless
    `overwrite`); `DiskFullError`.
    """
    fix = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    if not fix:
        raise InputError("a fix holds at least one intervention")
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for number, edit in enumerate(fix):
        if not isinstance(edit, Intervention):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"only interventions can be saved, not {type(edit).__name__}")
        records.append(_record(edit).model_dump(mode="json"))
        tensors |= {f"{number}.{name}": tensor for name, tensor in _tensors(edit.target).items()}
        if edit.condition.of is not None:
            gate = _tensors(edit.condition.of)
            tensors |= {f"{number}.condition.{name}": tensor for name, tensor in gate.items()}
    with atomic_folder(folder, overwrite=overwrite, known_by=(_NUMBERS, _TENSORS)) as path:
        # safetensors refuses tensors that share memory, as the encoders of one top-k dictionary do
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / _TENSORS)
        write_json(path / _NUMBERS, {"format": FORMAT, "interventions": records})
    return Path(folder)


def load_fix(folder: StrPath) -> tuple[Intervention, ...]:
    """Read a fix that `save_fix` wrote.

    Raises `MissingPathError` for a folder or file that is not there, `InputError` (`NonFiniteError`
    for NaN and infinity) for one that is malformed, naming the file and the field.
    """
    path = Path(folder)
    for name in (_NUMBERS, _TENSORS):
        if not (path / name).is_file():
            raise MissingPathError(
                f"{path} is not a fix: it has no {name}",
                fix=_WRITTEN,
            )
    try:
        record = _FixRecord.model_validate(read_json(path / _NUMBERS))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].partition(" or instance of ")[0]
        raise InputError(
            f"{path / _NUMBERS} is malformed{where and f' at {where}'}: {said}", fix=_WRITTEN
        ) from error
    if not record.interventions:
        raise InputError(f"{path / _NUMBERS} holds no intervention", fix=_WRITTEN)
    try:
        tensors = load_file(path / _TENSORS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / _TENSORS} cannot be read: {error}", fix=_WRITTEN) from error
    fix = tuple(
        _intervention(path, number, entry, tensors) for number, entry in enumerate(record.interventions)
    )
    if tensors:
        raise InputError(f"{path / _TENSORS} holds tensors of no intervention: {sorted(tensors)}")
    return fix


def _record(edit: Intervention) -> _InterventionRecord:
    level, condition = edit.level, edit.condition
    return _InterventionRecord(
        op=edit.op,
        site=edit.site,
        positions=edit.positions,
        level=None
        if level is None
        else _LevelRecord(values=level.values, unit=level.unit, scale=level.scale),
        gain=edit.gain,
        read="encoder" if edit.read == "encoder" else "projection",
        condition=_ConditionRecord(
            kind=condition.kind,
            threshold=condition.threshold,
            of=None if condition.of is None else _target_record(condition.of),
            read=condition.read,
            decided=condition.decided,
        ),
        target=_target_record(edit.target),
    )


def _target_record(target: Target) -> _TargetRecord:
    encoder = target.encoder
    return _TargetRecord(
        label=target.label,
        indices=target.indices,
        dictionary_digest=target.dictionary_digest,
        encoder=None if encoder is None else _EncoderRecord(k=encoder.k, columns=encoder.columns),
    )


def _tensors(target: Target) -> dict[str, Float[Tensor, "..."]]:
    found: dict[str, Tensor] = {"decoder": target.decoder}
    for name in _ENCODER_TENSORS if target.encoder is not None else ():
        tensor: Tensor | None = getattr(target.encoder, name)
        if tensor is not None:
            found[f"encoder.{name}"] = tensor
    return found


def _intervention(
    path: Path, number: int, record: _InterventionRecord, tensors: dict[str, Tensor]
) -> Intervention:
    """Build intervention `number`, taking its tensors out of `tensors`."""
    try:
        level, condition = record.level, record.condition
        of = condition.of
        return Intervention(
            record.op,
            _target(path, f"{number}.", record.target, tensors),
            record.site,
            record.positions,
            None if level is None else Level(level.values, level.unit, level.scale),
            record.gain,
            record.read,
            Condition(
                condition.kind,
                condition.threshold,
                None if of is None else _target(path, f"{number}.condition.", of, tensors),
                condition.read,
                condition.decided,
            ),
        )
    except PersonaProbeError as error:
        error.message = f"{path}, intervention {number}: {error.message}"
        raise


def _target(path: Path, prefix: str, record: _TargetRecord, tensors: dict[str, Tensor]) -> Target:
    def take(name: str) -> Tensor:
        if prefix + name not in tensors:
            raise InputError(f"{path / _TENSORS} lacks the tensor {prefix}{name}")
        return tensors.pop(prefix + name)

    def take_if_there(name: str) -> Tensor | None:
        return tensors.pop(prefix + name, None)

    encoder = record.encoder
    return Target(
        take("decoder"),
        None
        if encoder is None
        else Encoder(
            take("encoder.weight"),
            take("encoder.bias"),
            take_if_there("encoder.threshold"),
            take_if_there("encoder.b_dec"),
            encoder.k,
            encoder.columns,
        ),
        record.indices,
        record.dictionary_digest,
        record.label,
    )
