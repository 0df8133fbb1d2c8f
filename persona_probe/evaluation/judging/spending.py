"""What a judge's calls cost, and where to stop."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from persona_probe.errors import InputError, JudgeError
from persona_probe.evaluation.judging.reply import Reply

CHARACTERS_A_TOKEN = 4
"""A rule of thumb, for English; used only where a model's own count is not known."""


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    prompt: float
    reply: float

    @classmethod
    def parse(cls, text: str) -> Price:
        """`"2.5/10"`: a prompt's tokens and a reply's. Raises `InputError`."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", text)
        if match is None:
            raise InputError(f"a price is dollars per million tokens, such as 2.5/10, not {text!r}")
        return cls(float(match[1]), float(match[2]))

    def of(self, prompt_tokens: float, reply_tokens: float) -> float:
        """Dollars for so many tokens."""
        return (self.prompt * prompt_tokens + self.reply * reply_tokens) / 1e6


@dataclass(frozen=True)
class Budget:
    """The most that one process may spend; None: no limit. A rerun has it anew, for what is left to do."""

    calls: int | None = None
    dollars: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`"2000"` or `"2000calls"`; `"5usd"` or `"$5"`. Raises `InputError`."""
        match = re.fullmatch(r"(\$?)(\d+(?:\.\d+)?)\s*(usd|calls|)", text.strip().lower())
        dollars = match is not None and bool(match[1] or match[3] == "usd")
        if match is None or (match[1] and match[3] == "calls") or (not dollars and "." in match[2]):
            raise InputError(f"a budget is a number of calls (2000) or dollars (5usd), not {text!r}")
        return cls(dollars=float(match[2])) if dollars else cls(calls=int(match[2]))

    def __str__(self) -> str:
        return f"{self.calls} calls" if self.calls is not None else f"{self.dollars:g} dollars"


class BudgetSpentError(JudgeError):
    """The budget is spent; what was judged is on record."""


class Spending:
    """Counts calls and dollars against a budget; safe to use from several threads."""

    def __init__(self, budget: Budget | None, price: Price | None) -> None:
        if budget is not None and budget.dollars is not None and price is None:
            raise InputError(
                f"a budget of {budget} needs a price",
                fix="state it behind the judge's spec, in dollars per million tokens: #price=2.5/10",
            )
        self.budget = budget
        self.price = price
        self.calls = 0
        self.dollars = 0.0
        self._lock = threading.Lock()

    def reserve(self, prompt: str) -> None:
        """Count a call before it is made. Raises `BudgetSpentError` when it would exceed the budget."""
        with self._lock:
            cost = self._guess(prompt)
            if self.budget is not None and (
                (self.budget.calls is not None and self.calls + 1 > self.budget.calls)
                or (self.budget.dollars is not None and self.dollars + cost > self.budget.dollars)
            ):
                raise BudgetSpentError(f"the judge's budget of {self.budget} is spent")
            self.calls += 1
            self.dollars += cost

    def settle(self, prompt: str, reply: Reply | None) -> None:
        """Replace what was reserved by what the call cost; a call without reply (None) cost nothing."""
        with self._lock:
            guess = self._guess(prompt)
            if reply is None:
                self.calls -= 1
                self.dollars -= guess
            elif self.price is not None and reply.prompt_tokens is not None:
                self.dollars += self.price.of(reply.prompt_tokens, reply.reply_tokens or 0) - guess

    def _guess(self, prompt: str) -> float:
        return 0.0 if self.price is None else self.price.of(tokens_of(prompt), 1)


def tokens_of(prompt: str) -> int:
    """About how many tokens a prompt has."""
    return -(-len(prompt) // CHARACTERS_A_TOKEN)
