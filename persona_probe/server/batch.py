"""The answers that are being written at one time, as one batch that others join and leave.

Every forward pass writes one token of every row. Between two passes rows that ended leave, and new
ones join: their prompts are run as a batch of their own, padded on the left, and what it left in the
cache of keys and values is put under that of the others, the shorter padded on the left again. Mask
and position ids make the padding invisible, so a row is what it would be alone up to the rounding of
another batch shape; what it draws is its own (see `Row.uniform`), and a row whose logits are not
finite fails alone.

Not covered: models that keep something else than keys and values per token (recurrent states), and
caches of a fixed size. Sliding windows are served from whole caches, by the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from persona_probe.errors import InputError, NonFiniteError
from persona_probe.evaluation.drawing import draw
from persona_probe.model.chat import pad
from persona_probe.model.language_model import LanguageModel
from persona_probe.server.answering import News, Row, TokenScore
from persona_probe.server.stage import Amounts, stage


class RunningBatch:
    """Rows in any stage of being written. Used from one thread."""

    def __init__(self, lm: LanguageModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._lm = lm
        self._tokenizer = tokenizer or lm.tokenizer
        self.rows: list[Row] = []
        self._cache = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=lm.device)
        self._logits = torch.zeros(0, lm.d_vocab, device=lm.device)
        self._amounts: Amounts = []
        self._stage: ExitStack | None = None
        named = inspect.signature(lm.hf.forward).parameters
        self._last_only: dict[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in named else {}

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Run the prompts of new rows, and take the rows in. Answers to one prompt under one fix
        share its run.
        """
        self.close()
        groups: dict[tuple[object, ...], list[Row]] = {}
        for row in rows:
            wish = row.wish
            groups.setdefault((wish.prompt, id(wish.fix), tuple(map(id, wish.probes))), []).append(row)
        units = list(groups.values())
        cache = DynamicCache()
        ids, mask, positions = pad([unit[0].wish.prompt for unit in units], self._lm.pad_id).to(
            self._lm.device
        )
        with stage(self._lm, units) as amounts:
            output: Any = self._lm.hf(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **self._last_only,
            )
        _check_cache(self._lm, cache)
        unit_of_row = [number for number, unit in enumerate(units) for _ in unit]
        index = torch.tensor(unit_of_row, device=self._lm.device)
        if len(units) < len(rows):
            cache.batch_select_indices(index)
        logits = output.logits[:, -1][index]
        alone = not self.rows
        # from here on what goes wrong is wrong with all of them
        self.rows += [row for unit in units for row in unit]
        if not alone:
            self._cache = _under(self._cache, cache)
            length = self._cache.get_seq_length()
            masks = [pad_tensor(one, (length - one.shape[1], 0)) for one in (self._mask, mask[index])]
            self._mask = torch.cat(masks)
            self._logits = torch.cat((self._logits, logits))
        else:
            self._cache, self._mask, self._logits = cache, mask[index], logits
        self._amounts += [amounts[number] for number in unit_of_row]

    def write(self) -> list[News]:
        """Choose the next token of every row from the logits of the last pass, and tell the rows.

        Returns what there is to tell. Rows that ended by it (or could not go on: `row.error`) are
        taken out by `leave`.
        """
        if not self.rows:
            return []
        finite = self._logits.amax(dim=-1).isfinite().tolist()
        tokens = self._choose()
        scores = self._score(tokens)
        news: list[News] = []
        for number, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            if not finite[number]:
                row.error = NonFiniteError(
                    f"NaN or infinite logits for token {len(row.token_ids) + 1} of the answer",
                    fix="a smaller gain, or another intervention",
                )
                news.append(News(row, "", row.n_shown, True))
                continue
            if number in scores:
                row.scores.append(scores[number])
            if row.wish.probes:
                row.amounts.append(list(self._amounts[number]))
            piece = row.write(token, self._tokenizer, self._lm.eos_ids)
            if piece is not None:
                news.append(News(row, piece, row.n_shown, row.finish_reason is not None))
        return news

    def leave(self, gone: Sequence[Row]) -> None:
        """Take rows out, and the padding that only they needed."""
        leaving = set(map(id, gone))
        kept = [number for number, row in enumerate(self.rows) if id(row) not in leaving]
        if len(kept) == len(self.rows):
            return
        self.close()
        self.rows = [self.rows[number] for number in kept]
        self._amounts = [self._amounts[number] for number in kept]
        if not kept:
            self._cache = DynamicCache()
            self._mask, self._logits = self._mask[:0, :0], self._logits[:0]
            return
        index = torch.tensor(kept, device=self._lm.device)
        mask = self._mask[index]
        unused = int((mask.cumsum(dim=-1) == 0).sum(dim=-1).min())
        for layer in _layers(self._cache):
            layer.keys, layer.values = (one[index, :, unused:] for one in _kept(layer))
        self._mask, self._logits = mask[:, unused:], self._logits[index]

    @torch.no_grad()
    def forward(self) -> None:
        """Feed every row its last token."""
        if not self.rows:
            return
        if self._stage is None:
            self._stage = ExitStack()
            self._amounts = self._stage.enter_context(stage(self._lm, [[row] for row in self.rows]))
        device = self._lm.device
        token = torch.tensor([[row.token_ids[-1]] for row in self.rows], device=device)
        position = torch.tensor([[row.length - 1] for row in self.rows], device=device)
        self._mask = pad_tensor(self._mask, (0, 1), value=1)
        output: Any = self._lm.hf(
            input_ids=token,
            attention_mask=self._mask,
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits = output.logits[:, -1]

    def close(self) -> None:
        """Take the hooks off the model; the next pass puts them back."""
        held, self._stage = self._stage, None
        if held is not None:
            held.close()

    def _choose(self) -> Int[Tensor, " row"]:
        tokens = self._logits.argmax(dim=-1)
        drawn: dict[tuple[float, float], list[int]] = {}
        for number, row in enumerate(self.rows):
            if row.wish.temperature:
                drawn.setdefault((row.wish.temperature, row.wish.top_p), []).append(number)
        for (temperature, top_p), numbers in drawn.items():
            uniform = torch.tensor([self.rows[number].uniform() for number in numbers], dtype=torch.float64)
            own = self._logits[numbers]
            tokens[numbers] = draw(own, uniform.to(own.device), temperature=temperature, top_p=top_p)
        return tokens

    def _score(self, tokens: Int[Tensor, " row"]) -> dict[int, TokenScore]:
        """Of the rows that ask for log-probabilities, by their number."""
        asked = {n: row.wish.top_logprobs for n, row in enumerate(self.rows)}
        asked = {n: top for n, top in asked.items() if top is not None}
        if not asked:
            return {}
        numbers = list(asked)
        # OpenAI too writes -9999 where there is no probability; JSON has no infinity
        scores = torch.log_softmax(self._logits[numbers].float(), dim=-1).clamp(min=-9999.0)
        own: list[float] = scores.gather(-1, tokens[numbers][:, None])[:, 0].tolist()
        top = scores.topk(max(1, *asked.values()), dim=-1)
        best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            n: TokenScore(one, tuple(zip(ids, values, strict=True))[: asked[n]])
            for n, one, (ids, values) in zip(numbers, own, best, strict=True)
        }


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    """Those that hold something: where layers share keys and values, one of them does."""
    layers = cast("list[DynamicLayer]", cache.layers)
    return [layer for layer in layers if layer.is_initialized]


def _kept(layer: DynamicLayer) -> tuple[Float[Tensor, "row head pos width"], ...]:
    """Its keys and values."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys, layer.values


def _widened(kept: Float[Tensor, "row head pos width"], length: int) -> Float[Tensor, "row head new width"]:
    return pad_tensor(kept, (0, 0, length - kept.shape[2], 0))


def _under(upper: DynamicCache, lower: DynamicCache) -> DynamicCache:
    """One cache of the rows of both, aligned at their last token; `upper` is changed."""
    length = max(upper.get_seq_length(), lower.get_seq_length())
    for one, other in zip(_layers(upper), _layers(lower), strict=True):
        one.keys, one.values = (
            torch.cat((_widened(above, length), _widened(below, length)))
            for above, below in zip(_kept(one), _kept(other), strict=True)
        )
    return upper


def _check_cache(lm: LanguageModel, cache: DynamicCache) -> None:
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise InputError(
            f"{lm.name} cannot be served: it keeps {', '.join(kinds) or 'nothing'} from token to token, "
            "not keys and values alone",
            fix="serve a transformer with a cache of keys and values",
        )
