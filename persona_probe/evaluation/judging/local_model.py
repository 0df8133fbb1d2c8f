"""A Hugging Face causal model, loaded here, as judge.

One token of top-20 probabilities where the tokenizer writes every number from 0 to 100 as one
token, as an endpoint would give them; else whole numbers put together from their digits (see
`digits`). A model without chat template reads the prompt as plain text, with "Score:" behind it; a
template that can think is told not to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.evaluation.judging.asked_model import AskedModel, Call, Keep
from persona_probe.evaluation.judging.digits import NumberTokens, number_probabilities, number_tokens
from persona_probe.evaluation.judging.options import LocalOptions
from persona_probe.evaluation.judging.reply import Failure, Reply
from persona_probe.evaluation.judging.spending import BudgetSpentError
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import sample
from persona_probe.evaluation.settings import Sampling
from persona_probe.model.chat import Rendered, pad, render, render_text
from persona_probe.model.checkpoint import Checkpoint, describe
from persona_probe.model.language_model import LanguageModel, load_model

TOP = 20
CUE = "\n\nScore:"
"""What stands behind a prompt in plain text."""
_REPLY_TOKENS = 4
"""A space and three digits."""


class LocalModel(AskedModel):
    """The checkpoint at `place`, loaded when it is first asked. Raises `InputError` when there is none."""

    def __init__(self, place: str, options: LocalOptions) -> None:
        try:
            self.checkpoint = describe(place)
        except InputError as error:
            raise type(error)(
                f"the judge local:{place}: {error.message}", fix=error.fix, command=error.command
            ) from error
        self._options = options

    @cached_property
    def lm(self) -> LanguageModel:
        """The model."""
        return load_model(
            self.checkpoint.path,
            adapter=self.checkpoint.adapter,
            device=self._options.device,
            dtype=self._options.dtype,
        )

    @cached_property
    def tokens(self) -> NumberTokens:
        """How it writes numbers."""
        return number_tokens(self.lm.tokenizer)

    @property
    def identity(self) -> Mapping[str, object]:
        """The files' digest, and what else decides the figures."""
        return {"checkpoint": self.checkpoint.digest, "dtype": self._options.dtype}

    def is_model(self, checkpoint: Checkpoint) -> bool:
        """Whether they are the same files, here or copied elsewhere."""
        mine, other = self.checkpoint, checkpoint
        if (_place(mine.path), _place(mine.adapter)) == (_place(other.path), _place(other.adapter)):
            return True
        return Path(other.path).is_dir() and mine.digest == other.digest

    def reach(self) -> None:
        """Load it."""
        _ = self.lm

    def learn(self) -> Mapping[str, object]:
        """Whether numbers are one token, and whether it has a chat template."""
        chat = self.lm.tokenizer.chat_template is not None
        return {"whole": self.tokens.whole, "chat": chat}

    def use(self, learnt: Mapping[str, object]) -> None:
        """Nothing to set: the tokenizer tells each time."""

    def request(self, prompt: str, begun: str = "") -> Mapping[str, object]:
        """The model and the prompt."""
        del begun  # all that a number needs is read from one pass
        return {**self.identity, "prompt": prompt}

    def ask(self, calls: Iterable[Call], keep: Keep) -> None:
        """Prompts of like length together."""
        rendered: list[tuple[Rendered, Call]] = []
        spent: BudgetSpentError | None = None
        longest = getattr(self.lm.hf.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        try:
            for call in calls:
                prompt = self._render(call.prompt)
                if len(prompt) + _REPLY_TOKENS > longest:
                    keep(call, Failure(f"a prompt of {len(prompt)} tokens, and the judge reads {longest}"))
                else:
                    rendered.append((prompt, call))
        except BudgetSpentError as error:
            spent = error
        rendered.sort(key=lambda one: len(one[0]))
        for start in range(0, len(rendered), self._options.batch):
            batch = rendered[start : start + self._options.batch]
            for (_, call), reply in zip(batch, self._replies([one for one, _ in batch]), strict=True):
                keep(call, reply)
        if spent is not None:
            raise spent

    def write(self, prompt: str, tokens: int) -> Reply | Failure:
        """See `AskedModel`: the most probable token each time."""
        template = str(self.lm.tokenizer.chat_template or "")
        message = {"role": "user", "content": prompt} if template else {"text": prompt}
        asked = Question("prompt", "prompt", (message,))
        thinking = False if "enable_thinking" in template else None
        settings = Sampling(temperature=0, max_new_tokens=tokens, enable_thinking=thinking)
        return Reply(text=sample(self.lm, [asked], settings)[0].text)

    def _render(self, prompt: str) -> Rendered:
        tokenizer = self.lm.tokenizer
        if tokenizer.chat_template is None:
            return render_text(tokenizer, prompt + CUE)
        message = [{"role": "user", "content": prompt}]
        return render(tokenizer, message, variables={"enable_thinking": False})

    @torch.no_grad()
    def _replies(self, prompts: Sequence[Rendered]) -> list[Reply | Failure]:
        ids, mask, positions = pad(prompts, self.lm.pad_id).to(self.lm.device)
        with self.lm.active() as hf:
            output: Any = hf(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=not self.tokens.whole
            )
            logits = output.logits[:, -1]
            if self.tokens.whole:
                found = [self._top(row) for row in logits.float().softmax(-1)]
            else:
                found = self._by_digits(hf, output, logits, mask)
        return [
            Reply(one, by_digits=not self.tokens.whole, prompt_tokens=len(prompt), reply_tokens=1)
            if torch.isfinite(row).all()
            else Failure("the model's logits are not finite")
            for one, row, prompt in zip(found, logits, prompts, strict=True)
        ]

    def _by_digits(self, hf: Any, output: Any, logits: Tensor, mask: Tensor) -> list[dict[str, float]]:
        cache = output.past_key_values
        if not hasattr(cache, "batch_select_indices"):
            raise InputError(
                f"{type(hf).__name__} splits numbers and keeps no cache of keys and values by row",
                fix="choose a judge that writes numbers as one token, or serve it and use openai:MODEL@URL",
            )
        numbers = number_probabilities(hf, logits, cache, mask, self.tokens)
        words = [self._top(row, without=self.tokens.first) for row in logits.float().softmax(-1)]
        return [{**word, **number} for word, number in zip(words, numbers, strict=True)]

    def _top(self, p: Tensor, without: Mapping[int, str] | None = None) -> dict[str, float]:
        """The likeliest tokens as they are written; those that are written alike, together."""
        values, ids = p.topk(min(TOP, len(p)))
        found: dict[str, float] = {}
        for value, token_id in zip(values.tolist(), ids.tolist(), strict=True):
            if token_id in (without or ()):
                continue
            token = cast("str", self.lm.tokenizer.decode([token_id]))
            found[token] = found.get(token, 0.0) + value
        return found


def _place(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path is not None and Path(path).is_dir() else path
