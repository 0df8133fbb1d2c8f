"""What a client may send: OpenAI's request bodies, and this server's own fields.

Own fields (`extra_body` of OpenAI's clients):

    intervention     name of a fix, or "none"; `"model": "MODEL+FIX"` says the same
    gain             in the place of the fix's own
    latent_scores    true: the amounts that the fix reads, per token; or a list of fixes and
                     `SITE#INDEX` latents

A field of OpenAI's that would change the answer and is not carried out here (tools, penalties, a
response format) is refused by name unless it is given the value that changes nothing.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from persona_probe.model.chat_template import Message
from persona_probe.server.limits import Refusal

_CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}
_OF_NO_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: str | None = None

    @property
    def message(self) -> Message:
        """For the chat template; a developer's message is a system message."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    intervention: str | None = None
    gain: float | None = Field(None, ge=0)
    latent_scores: bool | list[str] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises `Refusal` for an empty one, and for more than 16."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16 or not all(0 < len(stop) <= 1000 for stop in stops):
            raise Refusal(400, "stop takes up to 16 strings of 1 to 1000 characters", param="stop")
        return tuple(stops)

    @property
    def asked_tokens(self) -> int | None:
        """How long the answer may get, where the request says so."""
        return self.max_tokens

    def check_extra(self) -> None:
        """Raise `Refusal` for a field that asks for something that is not done here."""
        for name, value in (self.model_extra or {}).items():
            if name in _OF_NO_EFFECT or not value or value in _CHANGES_NOTHING.get(name, ()):
                continue
            raise Refusal(
                400,
                f"{name[:100]!r} is not supported",
                code="unsupported_parameter",
                param=name[:100],
                fix="leave it out",
            )


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """How many alternatives per token; None for no log-probabilities."""
        if not self.logprobs:
            if self.top_logprobs:
                raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
            return None
        return self.top_logprobs or 0


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt: text, or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise Refusal(400, "prompt is an empty list", param="prompt")
        if isinstance(prompt[0], int):
            return [cast("list[int]", prompt)]
        return cast("list[str] | list[list[int]]", prompt)
