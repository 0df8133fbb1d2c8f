"""What a judge needs of the model that it asks, wherever that runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from persona_probe.evaluation.judging.reply import Failure, Reply
from persona_probe.model.checkpoint import Checkpoint


class Call(NamedTuple):
    """One prompt to be put to the model."""

    key: str
    """Of the prompt."""
    prompt: str
    begun: str = ""
    """How the reply begins, where it is to be continued."""


Keep = Callable[[Call, Reply | Failure], None]
"""Told of each reply as it arrives, in any order and from any thread."""


class AskedModel(ABC):
    """A model that is asked many prompts, each by itself."""

    @abstractmethod
    def reach(self) -> None:
        """Make sure that it can be asked. Costs nothing. Raises `JudgeError`."""

    @abstractmethod
    def learn(self) -> Mapping[str, object]:
        """Find out how it must be asked; may take calls. Raises `JudgeError`."""

    @abstractmethod
    def use(self, learnt: Mapping[str, object]) -> None:
        """Ask in the way that `learn` found, now or in an earlier run."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """Which model it is, for the keys of `learn`'s result."""

    @abstractmethod
    def request(self, prompt: str, begun: str = "") -> Mapping[str, object]:
        """Everything that decides the reply to `prompt`, once `use` was called."""

    @abstractmethod
    def ask(self, calls: Iterable[Call], keep: Keep) -> None:
        """Make all calls; `calls` is drawn from as they go out, and may raise to stop."""

    @abstractmethod
    def write(self, prompt: str, tokens: int) -> Reply | Failure:
        """A text of at most so many tokens, once `use` was called: what it is, not how probable."""

    def further(self, replies: Mapping[str, Reply]) -> Sequence[str]:
        """With what the reply to a prompt must be begun, and continued by the model, before its score is
        known; `replies` are those so far, by their beginning.
        """
        del replies
        return ()

    def is_model(self, checkpoint: Checkpoint) -> bool:
        """See `Judge.is_model`."""
        del checkpoint
        return False
