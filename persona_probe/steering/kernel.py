"""The edit itself: a whole batch, with another intervention on every row, in a handful of tensor
operations.

Every operation is one clipped affine map of the amount z that is read, `z' = min(max(a z + b, low),
high)`, and moves the activation by `(z' - z) @ write`. So what differs between rows is numbers, not
code: rows are padded to the same number of latents and computed together.

    z     = x @ read + bias, 0 at or below the threshold
    delta = (min(max((a - 1) z + b, low - z), high - z), 0 where not selected) @ write

The difference is formed directly: `(z + level) - z` would lose digits. What is not in the edited
direction, the SAE's error included, is untouched. Computed in fp32 at least, and rounded once to
the activation's type.

A condition compares an amount with a threshold: the edited latent's own, or that of a *gate*, a
latent that is read and not edited. It is asked at every token, or of the whole prompt: then the
highest amount so far is kept (`Seen`) from pass to pass.

A decoding step streams all weights through the caches, so every kind of tensor operation that the
model itself does not use starts cold there and costs tens of microseconds. Hence the fused products,
and that what a receipt wants to know is worked out later (`Firing`), for many steps together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_probe.errors import MismatchError
from persona_probe.steering.affine import ABOVE, BIAS, HIGH, LOW, SHIFT, SLOPE, THRESHOLD, AffineEdit, TopK
from persona_probe.steering.firing import Firing
from persona_probe.steering.positions import Positions, RowTokens

_OF_PROMPTS = {"prompt", "last_prompt"}
_INF = math.inf
_KEPT_SHAPES = 8
_NO_EDIT = (0.0, -_INF, 0.0, 0.0, -_INF, _INF, _INF)


class Seen:
    """The highest amounts in the prompts, kept from one forward pass to the next."""

    def __init__(self) -> None:
        self.highest: Float[Tensor, "row latent"] | None = None

    def of_row(self, row: int) -> Float[Tensor, " latent"] | None:
        """Of one of the edited rows; None where nothing was asked."""
        return None if self.highest is None else self.highest[row]

    @classmethod
    def of_rows(cls, rows: Sequence[Float[Tensor, " latent"] | None]) -> Seen:
        """What edited rows saw elsewhere, in other company."""
        seen, known = cls(), [row for row in rows if row is not None]
        if known:
            nothing = known[0].new_full((max(map(len, known)),), -_INF)
            each = [nothing if row is None else row for row in rows]
            seen.highest = torch.stack([torch.cat((row, nothing[len(row) :])) for row in each])
        return seen

    def select(self, kept: Int[Tensor, " row"]) -> None:
        """Of the rows that were edited, keep these (repeats are rows of their own)."""
        if self.highest is not None:
            self.highest = self.highest[kept.to(self.highest.device)]

    def update(
        self, amounts: Float[Tensor, "row pos latent"], prompt: Bool[Tensor, "row pos"], *, begins: bool
    ) -> Float[Tensor, "row 1 latent"]:
        """The highest amounts in the prompts so far, these included."""
        here = torch.where(prompt[..., None], amounts.detach(), -_INF).amax(dim=1)
        before = None if begins else self.highest
        if before is not None and len(before) == len(here):
            n = min(before.shape[1], here.shape[1])  # rows in other company have more latents beside them
            here = torch.cat((torch.maximum(here[:, :n], before[:, :n].to(here)), here[:, n:]), dim=1)
        self.highest = here
        return here[:, None, :]


@dataclass(frozen=True, eq=False)
class _TopKSlots:
    source: TopK
    rows: Int[Tensor, " some_row"]
    columns: Int[Tensor, "some_row latent"]
    here: Bool[Tensor, "some_row latent"]


@dataclass(frozen=True, eq=False)
class _Placed:
    """The numbers of the edited rows, on the activation's device; without `row` where all rows
    share them.
    """

    rows: Int[Tensor, " row"] | None
    read: Float[Tensor, "row d_model latent"] | Float[Tensor, "d_model latent"]
    bias: Float[Tensor, "row_or_1 1 latent"]
    threshold: Float[Tensor, "row_or_1 1 latent"]
    slope: Float[Tensor, "row_or_1 1 latent"]
    shift: Float[Tensor, "row_or_1 1 latent"]
    low: Float[Tensor, "row_or_1 1 latent"]
    high: Float[Tensor, "row_or_1 1 latent"]
    above: Float[Tensor, "row_or_1 1 latent"]
    write: Float[Tensor, "row latent d_model"] | Float[Tensor, "latent d_model"]
    kind: Int[Tensor, "row latent"]
    gate: Int[Tensor, "row 1 latent"] | None
    """Which latent each one's condition is about; None: itself."""
    on_prompt: Bool[Tensor, "row_or_1 1 latent"] | None
    random: Float[Tensor, "row_or_1 1 d_model"] | None
    is_random: Bool[Tensor, "row_or_1 1 1"]
    top_k: tuple[_TopKSlots, ...]


class SiteEdit:
    """All the edits of one site: `rows[i]` are those of row i (none: the row is left alone).

    One row serves a batch of any size; n rows serve a batch of n, or of n r rows when each prompt
    is repeated r times in place (`num_return_sequences`).
    """

    def __init__(self, rows: Sequence[Sequence[AffineEdit]]) -> None:
        distinct: dict[tuple[int, ...], int] = {}
        for i, edits in enumerate(rows):
            if edits:
                distinct.setdefault(tuple(id(edit) for edit in edits), i)
        order: dict[tuple[int, ...], int] = {key: number for number, key in enumerate(distinct)}
        # of each row, its number among the distinct ones; -1 where it is left alone
        self._which = torch.tensor([order.get(tuple(id(edit) for edit in edits), -1) for edits in rows])
        self._kinds: list[Positions] = []
        self._sources: dict[tuple[int, ...], TopK] = {}
        self._stack([rows[i] for i in distinct.values()])
        self._placed: dict[tuple[int, torch.device, torch.dtype], _Placed] = {}

    @property
    def n_rows(self) -> int:
        return len(self._which)

    def take(self, rows: Int[Tensor, " row"], batch: int, seen: Seen) -> SiteEdit:
        """The edit of the rows `rows` of a batch of this size, and `seen` with them.

        An edit of one row serves any batch and stays as it is.
        """
        each = self._which.repeat_interleave(batch // self.n_rows)
        edited = each >= 0
        seen.select((edited.cumsum(0) - 1)[rows][edited[rows]])
        if self.n_rows == 1:
            return self
        taken = copy.copy(self)
        taken._which = each[rows]
        taken._placed = {}
        return taken

    def edited(self, batch: int) -> list[int]:
        """Which rows of a batch of this size have an edit."""
        return (self._which.repeat_interleave(batch // self.n_rows) >= 0).nonzero().flatten().tolist()

    def _stack(self, rows: Sequence[Sequence[AffineEdit]]) -> None:
        width = max(sum(_slots(edit) for edit in edits) for edits in rows)
        d_model = rows[0][0].write.shape[1]
        n = len(rows)
        self._read = torch.zeros(n, d_model, width)
        self._coefficients = torch.tensor(_NO_EDIT)[:, None, None].repeat(1, n, width)
        self._write = torch.zeros(n, width, d_model)
        self._kind = torch.zeros(n, width, dtype=torch.long)
        self._source = torch.full((n, width), -1)
        self._column = torch.zeros(n, width, dtype=torch.long)
        self._gate = torch.arange(width).repeat(n, 1)
        self._on_prompt = torch.zeros(n, width, dtype=torch.bool)
        self._random = torch.zeros(n, d_model)
        self._is_random = torch.zeros(n, dtype=torch.bool)
        for i, edits in enumerate(rows):
            start = 0
            for edit in edits:
                slots = slice(start, start + edit.write.shape[0])
                start = slots.stop
                self._fill(i, slots, edit)
                self._coefficients[:, i, slots] = edit.coefficients
                self._write[i, slots] = edit.write
                self._on_prompt[i, slots] = edit.on_prompt
                if edit.gate is not None:
                    # a latent beside the edited ones, which writes nothing and is never edited
                    beside = slice(start, start + 1)
                    self._fill(i, beside, edit.gate, positions=edit.positions)
                    read_alone = edit.gate.coefficients[[BIAS, THRESHOLD]]
                    self._coefficients[[BIAS, THRESHOLD], i, beside] = read_alone
                    self._gate[i, slots] = start
                    start += 1
                if edit.random is not None:
                    self._random[i], self._is_random[i] = edit.random, True
            # the unused slots follow some position that the row has anyway
            self._kind[i, start:] = self._kind[i, 0]
        # operations that no row needs are left out
        self._gated = bool((self._coefficients[THRESHOLD] > -_INF).any())
        self._sloped = bool((self._coefficients[SLOPE] != 0).any())
        self._floored = bool((self._coefficients[LOW] > -_INF).any())
        self._capped = bool((self._coefficients[HIGH] < _INF).any())
        used = self._write.abs().amax(dim=-1) > 0
        self._conditional = bool((self._coefficients[ABOVE][used] > -_INF).any())
        self._elsewhere = bool((self._gate != torch.arange(width)).any())
        self.remembers = bool(self._on_prompt.any())
        """Whether anything is decided on the prompt."""
        self._prompts_only = _OF_PROMPTS.issuperset(self._kinds) and not self.remembers

    def _fill(self, row: int, slots: slice, edit: AffineEdit, positions: Positions | None = None) -> None:
        """How the latents in these slots are read, and where."""
        self._read[row, :, slots] = edit.read
        self._kind[row, slots] = self._number(edit.positions if positions is None else positions)
        if edit.top_k is not None:
            self._sources.setdefault(edit.top_k.identity, edit.top_k)
            self._source[row, slots] = list(self._sources).index(edit.top_k.identity)
            self._column[row, slots] = torch.tensor(edit.columns)

    def _number(self, positions: Positions) -> int:
        if positions not in self._kinds:
            self._kinds.append(positions)
        return self._kinds.index(positions)

    def _place(self, batch: int, device: torch.device, dtype: torch.dtype) -> _Placed:
        key = (batch, device, dtype)
        if key in self._placed:
            return self._placed[key]
        if self.n_rows > 1 and batch % self.n_rows:
            raise MismatchError(
                f"the plan has {self.n_rows} rows and the batch {batch}",
                fix="give the plan one entry per row of the batch (or a single one for all rows)",
            )
        if len(self._placed) >= _KEPT_SHAPES:
            self._placed.clear()
        repeats = batch if self.n_rows == 1 else batch // self.n_rows
        each = self._which.repeat_interleave(repeats)
        rows = (each >= 0).nonzero().flatten()
        which = each[rows]
        shared = self._read.shape[0] == 1
        pick = torch.zeros(1, dtype=torch.long) if shared else which
        source = self._source[pick].expand(len(rows), -1)
        column = self._column[pick].expand(len(rows), -1)
        top_k: list[_TopKSlots] = []
        for number, encoder in enumerate(self._sources.values()):
            some = (source == number).any(dim=-1).nonzero().flatten()
            top_k.append(
                _TopKSlots(
                    encoder.to(device, dtype),
                    some.to(device),
                    column[some].to(device),
                    (source[some] == number).to(device),
                )
            )
        placed = _Placed(
            rows=None if len(rows) == batch else rows.to(device),
            read=(self._read[0] if shared else self._read[pick]).to(device, dtype),
            **self._numbers(pick, device, dtype),
            write=(self._write[0] if shared else self._write[pick]).to(device, dtype),
            kind=self._kind[pick].expand(len(rows), -1).to(device),
            gate=self._gate[pick, None].expand(len(rows), -1, -1).to(device) if self._elsewhere else None,
            on_prompt=self._on_prompt[pick, None, :].to(device) if self.remembers else None,
            random=self._random[pick, None, :].to(device, dtype) if self._is_random.any() else None,
            is_random=self._is_random[pick, None, None].to(device),
            top_k=tuple(top_k),
        )
        self._placed[key] = placed
        return placed

    def _numbers(
        self, pick: Int[Tensor, " row_or_1"], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        each = self._coefficients[:, pick, None, :].to(device, dtype)
        rows = {"bias": BIAS, "threshold": THRESHOLD, "slope": SLOPE, "shift": SHIFT}
        rows |= {"low": LOW, "high": HIGH, "above": ABOVE}
        return {name: each[row] for name, row in rows.items()}

    def apply(
        self, x: Float[Tensor, "batch pos d_model"], tokens: RowTokens, seen: Seen | None = None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Firing | None]:
        """The edited activation and what was done; no `Firing` when no token of this pass is asked
        for.

        Rows without an edit and tokens outside the positions come back bit for bit. `seen` is what
        earlier passes saw of the prompts; without it, this pass holds whole rows.
        """
        if tokens.written and self._prompts_only:
            return x, None
        dtype = torch.promote_types(x.dtype, torch.float32)
        placed = self._place(x.shape[0], x.device, dtype)
        selected = self._select(placed, tokens)
        if placed.rows is not None and not len(placed.rows):
            return x, None
        idle = selected is not None and not bool(selected.any())
        if idle and not self.remembers:
            return x, None
        own = x if placed.rows is None else x.index_select(0, placed.rows)
        with _exactly(x.device.type):
            wide = own.to(dtype)
            change, keep = self._change(placed, wide, selected, tokens, seen or Seen())
            if idle:  # a prompt that was only looked at
                return x, None
            if placed.random is not None:
                delta = change @ placed.write
                norm = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
                edited = wide + torch.where(placed.is_random, norm * placed.random, delta)
            elif placed.write.ndim == 2:
                edited = torch.addmm(wide.flatten(0, 1), change.flatten(0, 1), placed.write).view_as(wide)
            else:
                edited = torch.baddbmm(wide, change, placed.write)
            edited = edited.to(x.dtype)
        if keep is not None:
            edited = torch.where(keep.any(dim=-1, keepdim=True), edited, own)
        if placed.rows is not None:
            edited = x.index_copy(0, placed.rows, edited)
        return edited, Firing(placed.rows, change.detach(), placed.write, selected, keep)

    def _select(self, placed: _Placed, tokens: RowTokens) -> Bool[Tensor, "row pos slot"] | None:
        chosen = [tokens.select(kind) for kind in self._kinds]
        if all(mask is None for mask in chosen):
            return None
        device = placed.kind.device
        every = torch.ones(tokens.shape, dtype=torch.bool, device=device)
        table = torch.stack([every if mask is None else mask.to(device) for mask in chosen])
        if placed.rows is not None:
            table = table.index_select(1, placed.rows)
        if len(chosen) == 1:
            return table[0, :, :, None]
        rows = torch.arange(table.shape[1], device=device)
        return table[placed.kind, rows[:, None]].transpose(1, 2)

    def _amounts(
        self, placed: _Placed, x: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos latent"]:
        # not fused: rounded as where thresholds are read off data (`Target.amounts`)
        z = x @ placed.read + placed.bias
        for slots in placed.top_k:
            own = x.index_select(0, slots.rows)
            if slots.source.b_dec is not None:
                own = own - slots.source.b_dec
            dense = own @ slots.source.weight + slots.source.bias
            top = dense.topk(slots.source.k, dim=-1, sorted=False).indices
            columns = slots.columns[:, None, :].expand(-1, x.shape[1], -1)
            fires = (top[..., None, :] == columns[..., None]).any(dim=-1)
            amount = torch.where(fires, dense.gather(-1, columns), 0.0)
            there = torch.where(slots.here[:, None, :], amount, z.index_select(0, slots.rows))
            z = z.index_copy(0, slots.rows, there)
        if self._gated:
            z = z.masked_fill(z <= placed.threshold, 0.0)
        return z

    def _change(
        self,
        placed: _Placed,
        x: Float[Tensor, "row pos d_model"],
        selected: Bool[Tensor, "row pos slot"] | None,
        tokens: RowTokens,
        seen: Seen,
    ) -> tuple[Float[Tensor, "row pos latent"], Bool[Tensor, "row pos kept"] | None]:
        """`z' - z`, and where the edit is made (None: everywhere)."""
        change = placed.shift.expand(x.shape[0], x.shape[1], -1)
        if not (self._sloped or self._floored or self._capped or self._conditional):
            return (change if selected is None else torch.where(selected, change, 0.0)), selected
        z = self._amounts(placed, x)
        if self._sloped:
            change = torch.addcmul(placed.shift, placed.slope, z)
        if self._floored:
            change = torch.maximum(change, placed.low - z)
        if self._capped:
            change = torch.minimum(change, placed.high - z)
        keep = selected
        if self._conditional:
            asked = z if placed.gate is None else z.gather(-1, placed.gate.expand(-1, z.shape[1], -1))
            if placed.on_prompt is not None:
                prompt = tokens.in_prompt.to(z.device)
                prompt = prompt if placed.rows is None else prompt.index_select(0, placed.rows)
                highest = seen.update(asked, prompt, begins=tokens.begins)
                asked = torch.where(placed.on_prompt, highest, asked)
            holds = asked > placed.above
            keep = holds if selected is None else holds & selected
        return (change if keep is None else torch.where(keep, change, 0.0)), keep


def _slots(edit: AffineEdit) -> int:
    return edit.write.shape[0] + (edit.gate is not None)


def _exactly(device: str) -> AbstractContextManager[object]:
    """Without a trainer's bf16 autocast, which would round the amounts."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
