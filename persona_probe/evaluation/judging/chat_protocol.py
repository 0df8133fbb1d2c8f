"""What an OpenAI-compatible server sends back: a reply, a complaint, or garbage.

Garbage includes what cannot be a distribution (NaN, probabilities above 1): it is asked for again,
never scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import httpx

from persona_probe.evaluation.judging.reply import Reply, number_mass


class TransientError(Exception):
    """Worth another try, after `wait` seconds where the server says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class RefusedError(Exception):
    """The server will not answer this request, however often it is asked."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def reply_of(response: httpx.Response, places: int) -> Reply:
    """What a 200 holds, with the probabilities at so many places. Raises `TransientError` when that is not
    a reply.
    """
    try:
        answer: Any = response.json()
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        found = choice.get("logprobs")
        content = found.get("content") if found else None
        written = [_place(one) for one in content or ()][:places]
        usage = answer.get("usage") or {}
        spent = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise TransientError(f"no reply in {response.text[:80]!r}") from error
    prompt_tokens, reply_tokens = (one if isinstance(one, int) and one >= 0 else None for one in spent)
    if not isinstance(text, str | None) or (text is None and not content):
        raise TransientError(f"no reply in {response.text[:80]!r}")
    return Reply(
        written[0][1] if written else None,
        text,
        further=_further(written, choice.get("finish_reason") == "stop") if places > 1 else None,
        prompt_tokens=prompt_tokens,
        reply_tokens=reply_tokens,
    )


def complaint_of(response: httpx.Response, *, hide: str | None) -> str:
    """What the server says is wrong, shortened, without the key should it repeat that."""
    try:
        said: Any = response.json()["error"]
        text = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError):
        text = response.text
    text = " ".join(str(text).split())[:300]
    return text if hide is None else text.replace(hide, "***")


def shows_whole_numbers(probabilities: Mapping[str, float] | None) -> bool:
    """Whether a model that was told to say 100 has a token for it, or for other numbers of two digits.

    "10" alone, likelier than any other number, is how a tokenizer of digit pairs begins 100.
    """
    mass = number_mass(probabilities or {})
    if 100 in mass:
        return True
    return any(number >= 10 for number in mass) and max(mass, key=lambda number: mass[number]) != 10


def _place(one: dict[str, Any]) -> tuple[str, Mapping[str, float] | None]:
    """The token written at a place, and what could have stood there."""
    top = one["top_logprobs"]
    return str(one.get("token", "")), _probabilities(top) if top else None


def _further(
    written: Sequence[tuple[str, Mapping[str, float] | None]], stopped: bool
) -> list[tuple[str, Mapping[str, float]]]:
    """Each token, and what could have stood behind it: nothing where the reply stopped."""
    found: list[tuple[str, Mapping[str, float]]] = []
    for (token, _), (_, probabilities) in pairwise([*written, ("", {} if stopped else None)]):
        if probabilities is None:  # not shown
            break
        found.append((token, probabilities))
    return found


def _probabilities(top: list[dict[str, Any]]) -> dict[str, float]:
    """Token to probability. Raises `ValueError` for what cannot be a distribution."""
    found: dict[str, float] = {}
    for one in top:
        token, logprob = one["token"], one["logprob"]
        if not isinstance(token, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise TypeError("a token is a string and its log-probability a number")
        if not logprob <= 1e-3:  # NaN too
            raise ValueError("a log-probability above 0")
        found[token] = found.get(token, 0.0) + math.exp(logprob)
    if sum(found.values()) > 1.01:
        raise ValueError("probabilities that sum to more than 1")
    return found
