"""Prompts put to a model until everything that they need is known, in one call or several each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

from persona_probe.evaluation.judging.asked_model import AskedModel, Call, Keep
from persona_probe.evaluation.judging.reply import Failure, Reading, Reply, read
from persona_probe.evaluation.judging.spending import Spending
from persona_probe.evaluation.judging.written import read_written

Recall = Callable[[Call], Reply | None]
"""The reply on record to a call."""


class Rounds:
    """The replies to `prompts` (by key) so far, and the calls that they still take."""

    def __init__(
        self, model: AskedModel, prompts: Mapping[str, str], recall: Recall = lambda _: None
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._told: dict[str, dict[str, Reply | Failure]] = {key: {} for key in prompts}
        self._lock = threading.Lock()
        self.recalled = 0
        """Replies taken from the record."""
        for key in prompts:
            found = True
            while found:
                on_record = {call.begun: recall(call) for call in self._lacking(key)}
                found = {begun: reply for begun, reply in on_record.items() if reply is not None}
                self._told[key] |= found
                self.recalled += len(found)

    def waiting(self) -> list[Call]:
        """The calls to be made next: those whose need is known by now."""
        return [call for key in self._prompts for call in self._lacking(key)]

    def settled(self, key: str) -> bool:
        """Whether a prompt needs no further call."""
        return not self._lacking(key)

    def take(self, call: Call, reply: Reply | Failure) -> bool:
        """Keep a reply; from any thread. Returns whether its prompt is settled by it."""
        with self._lock:
            self._told[call.key][call.begun] = reply
            return self.settled(call.key)

    def reading(self, key: str) -> Reading:
        """What the replies to a prompt say; a call that failed leaves it without."""
        replies: dict[str, Reply] = {}
        for begun, reply in self._told[key].items():
            if isinstance(reply, Failure):
                return Reading(note=reply.reason)
            replies[begun] = reply
        return read(replies[""]) if replies[""].further is None else read_written(replies)

    def _lacking(self, key: str) -> Sequence[Call]:
        told = self._told[key]
        replies = {begun: reply for begun, reply in told.items() if isinstance(reply, Reply)}
        if len(replies) < len(told):  # one failed: the others would be asked for nothing
            return ()
        begun = self._model.further(replies) if replies else [""]
        return [Call(key, self._prompts[key], one) for one in begun if one not in told]


def ask_in_full(rounds: Rounds, model: AskedModel, spending: Spending, keep: Keep) -> None:
    """Make all calls that `rounds` wait for; `keep` is told of each as for `AskedModel.ask`.

    Raises what `AskedModel.ask` raises, and `BudgetSpentError`.
    """

    def reserved(calls: Iterable[Call]) -> Generator[Call, None, None]:
        for call in calls:
            spending.reserve(call.prompt)
            yield call

    def settle(call: Call, reply: Reply | Failure) -> None:
        spending.settle(call.prompt, reply if isinstance(reply, Reply) else None)
        keep(call, reply)

    while waiting := rounds.waiting():
        model.ask(reserved(waiting), settle)
