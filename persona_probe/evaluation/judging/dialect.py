"""How one endpoint wants to be asked: which parameters it takes, under which names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from persona_probe.evaluation.judging.asked_model import Call

TOP = 20
TEXT_TOKENS = 16
"""Longest reply where the number is parsed."""
DIGIT_TOKENS = 4
"""Longest number written digit by digit, and what stands behind it."""
WRITTEN = "written"
"""Of a number's digits, only what could have stood in the place of those written is known."""
CONTINUED: Mapping[str, tuple[dict[str, object], dict[str, object]]] = {
    "continue_final_message": ({"continue_final_message": True, "add_generation_prompt": False}, {}),
    "prefix": ({}, {"prefix": True}),
    "last message": ({}, {}),
}
"""How endpoints are told to continue the reply that is the last message: what is said beside the
messages, and in it. vLLM and SGLang; DeepSeek and Mistral; llama.cpp and others.
"""
_LEFT_OUT = ("seed", "temperature")


@dataclass(frozen=True)
class Dialect:
    """What a call's body says."""

    logprobs: bool = True
    """Probabilities are asked for; else a text."""
    limit: str = "max_tokens"
    without: Sequence[str] = ()
    """Parameters left out."""
    digits: str | None = None
    """Where numbers are split: `WRITTEN`, or the way in which replies are continued."""

    def places(self, call: Call) -> int:
        """Of how many tokens of the reply the probabilities are asked for."""
        if self.digits is not None:
            return DIGIT_TOKENS - len(call.begun)
        return int(self.logprobs)

    def body(self, model: str, call: Call, tokens: int | None = None) -> dict[str, object]:
        """The body of a call; with `tokens`, one for a text of so many."""
        messages: list[dict[str, object]] = [{"role": "user", "content": call.prompt}]
        body: dict[str, object] = {"model": model, "messages": messages, "temperature": 0, "seed": 0}
        if call.begun and self.digits is not None:
            beside, within = CONTINUED[self.digits]
            messages.append({"role": "assistant", "content": call.begun, **within})
            body |= beside
        places = 0 if tokens is not None else self.places(call)
        if places:
            body |= {self.limit: places, "logprobs": True, "top_logprobs": TOP}
        else:
            body |= {self.limit: tokens or TEXT_TOKENS}
        return {name: value for name, value in body.items() if name not in self.without}

    def adapted(self, complaint: str) -> Dialect | None:
        """Without, or under another name, what a server complains of; None when nothing is left to change."""
        if "max_completion_tokens" in complaint and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        for name in _LEFT_OUT:
            if name in complaint and name not in self.without:
                return replace(self, without=(*self.without, name))
        return replace(self, logprobs=False, digits=None) if self.logprobs else None
