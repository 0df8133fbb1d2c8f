"""A model provider for Inspect: a local checkpoint, under an intervention if wanted.

    inspect eval persona_probe/misalignment --model persona_probe/DIR -M steer=FIX

Answers are drawn by our own sampler: the number of an answer (Inspect's epoch, less one) and the id
of its question, which our task writes beside the messages, decide its random numbers. So a log holds
the very answers that `persona-probe evaluate` draws. Under any other task the id is a digest of the
messages, and the number counts how often they came.

Not covered: tools, images, several choices, log-probabilities, stop sequences and penalties, which
are refused by name.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    Content,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from persona_probe.artifact import digest_of
from persona_probe.errors import InputError
from persona_probe.evaluation.answers import Answer
from persona_probe.evaluation.arms import Models
from persona_probe.evaluation.gathering import Gathering
from persona_probe.evaluation.questions import Question
from persona_probe.evaluation.sampling import prompt_of, sample
from persona_probe.evaluation.settings import Sampling
from persona_probe.steering.io import load_fix

NOTE = "persona_probe"
"""The key, in the last message's metadata, under which our task says which answer is wanted."""
BATCH = 256
LONGEST = 1024
"""New tokens, where a task sets no limit."""
_ARGS = "steer, gain, adapter, device, dtype, batch_size, enable_thinking, generation_config"
_NOT_DONE = (
    "stop_seqs", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices", "best_of",
    "logprobs", "top_logprobs", "response_schema",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """One answer that is asked for."""

    question: Question
    number: int
    sampling: Sampling


class LocalModelAPI(ModelAPI):
    """The provider `persona_probe/DIR`, a checkpoint's or an adapter's folder.

    Its arguments (`-M`): `steer`, a fix's folder (or several); `gain`, instead of each edit's own;
    `adapter`, a folder to be put on DIR; `device`, `dtype`, `batch_size`, and `enable_thinking` and
    `generation_config` as in `Sampling`. Raises `InputError` for anything else.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        steer: str | Sequence[str] | None = None,
        gain: float | None = None,
        adapter: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = BATCH,
        enable_thinking: bool | None = None,
        generation_config: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if unknown:
            raise InputError(
                f"persona_probe knows no model argument {next(iter(unknown))!r}", fix=f"-M: {_ARGS}"
            )
        folder = Path(adapter or model_name)
        fixes = [steer] if isinstance(steer, str) else list(steer or ())
        fix = tuple(edit for path in fixes for edit in load_fix(path))
        self._fix = fix if gain is None else tuple(edit.with_gain(float(gain)) for edit in fix)
        self._lm = Models(Path(model_name) if adapter else None, device=device, dtype=dtype)[folder]
        self.folder = folder
        self._batch_size = batch_size
        self._base = Sampling(enable_thinking=enable_thinking, generation_config=generation_config)
        self._drawn: dict[tuple[Sampling, Question], list[Answer]] = {}
        self._came: Counter[Question] = Counter()
        self._answers = Gathering(self._draw, limit=batch_size)

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,  # noqa: ARG002 (the provider's signature)
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer, drawn in a batch with what others ask at the same time."""
        if tools:
            raise InputError("persona_probe models call no tools")
        start = time.perf_counter()
        wanted = self._wanted(input, self._sampling(config))
        answer = await self._answers(wanted)
        prompt = prompt_of(self._lm.tokenizer, wanted.question, None, wanted.sampling)
        return _output(self.model_name, answer, len(prompt), time.perf_counter() - start)

    def max_tokens(self) -> int | None:
        return LONGEST

    def max_connections(self) -> int:
        return self._batch_size

    def _sampling(self, config: GenerateConfig) -> Sampling:
        for name in _NOT_DONE:
            if getattr(config, name) not in (None, False, 1, []):
                raise InputError(f"persona_probe models do not do {name}", fix=f"leave {name} out")
        given = {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_new_tokens": config.max_tokens,
            "seed": config.seed,
        }
        return replace(self._base, **{name: value for name, value in given.items() if value is not None})

    def _wanted(self, messages: Sequence[ChatMessage], sampling: Sampling) -> Wanted:
        note = cast("Mapping[str, Any]", (messages[-1].metadata or {}).get(NOTE, {}))
        if note.get("plain"):
            said: tuple[dict[str, str], ...] = ({"text": messages[-1].text},)
        else:
            said = tuple({"role": message.role, "content": message.text} for message in messages)
        question = _Asked(str(note.get("question") or digest_of(said)), "prompt", said)
        if note:
            return Wanted(question, note["sample"], replace(sampling, samples=note["samples"]))
        self._came[question] += 1
        return Wanted(question, self._came[question] - 1, replace(sampling, samples=self._came[question]))

    def _draw(self, batch: Sequence[Wanted]) -> list[Answer]:
        """The answers wanted. All samples of a question are drawn when the first is asked for: the
        prompt is run once, and the other epochs find theirs here.
        """
        lacking: dict[Sampling, list[Question]] = {}
        for one in batch:
            held = self._drawn.get((replace(one.sampling, samples=1), one.question), [])
            if len(held) <= one.number:
                members = lacking.setdefault(one.sampling, [])
                members += [] if one.question in members else [one.question]
        for sampling, questions in lacking.items():
            answers = sample(self._lm, questions, sampling, fix=self._fix, batch_size=self._batch_size)
            for place, question in enumerate(questions):
                own = answers[place * sampling.samples : (place + 1) * sampling.samples]
                held = self._drawn.setdefault((replace(sampling, samples=1), question), [])
                held += own[len(held) :]
        return [self._drawn[replace(one.sampling, samples=1), one.question][one.number] for one in batch]


@dataclass(frozen=True)
class _Asked(Question):
    """A question that is told from another by what it says."""

    def __hash__(self) -> int:
        return hash((self.id, len(self.messages)))


def _output(model: str, answer: Answer, prompt_tokens: int, seconds: float) -> ModelOutput:
    content: list[Content] = [ContentText(text=answer.text)]
    if answer.thought is not None:
        content.insert(0, ContentReasoning(reasoning=answer.thought))
    message = ChatMessageAssistant(
        content=answer.text if answer.thought is None else content, model=model, source="generate"
    )
    written = len(answer.token_ids)
    return ModelOutput(
        model=model,
        choices=[
            ChatCompletionChoice(message=message, stop_reason="max_tokens" if answer.truncated else "stop")
        ],
        usage=ModelUsage(
            input_tokens=prompt_tokens, output_tokens=written, total_tokens=prompt_tokens + written
        ),
        time=seconds,
    )
