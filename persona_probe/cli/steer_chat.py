"""`persona-probe steer --interactive`: one line to all arms, each with its own history."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from persona_probe.cli.console import err, out, show_error
from persona_probe.errors import InputError, PersonaProbeError

if TYPE_CHECKING:
    from persona_probe.cli.steer_arms import Arms
    from persona_probe.evaluation.settings import Sampling
    from persona_probe.evaluation.side_by_side import Spoken

HELP = """/reset    forget the conversation
/gain X   set the gain of every edit (1 is the operation, above 1 over-corrects, 0 is none)
/off /on  take the fix off and put it on again
/quit     leave (Ctrl-D too)"""


def chat(arms: Arms, sampling: Sampling, system: str | None) -> dict[str, Any] | None:
    """Read lines until the end of input, answer each, and return all that was said (None: nothing)."""
    session = _Chat(arms, sampling, system)
    out.print("/help for commands", style="dim")
    while (line := _line()) is not None:
        if line in ("/quit", "/exit"):
            break
        try:
            session.command(line) if line.startswith("/") else session.say(line)
        except PersonaProbeError as error:  # a bad command, or a conversation that grew too long
            show_error(f"error: {error}")
    return session.document()


def _line() -> str | None:
    """The next line that is not empty; None at the end."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            # history and editing, wherever there is such a thing
            import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line:
            return line


class _Chat:
    def __init__(self, arms: Arms, sampling: Sampling, system: str | None) -> None:
        self._arms, self._sampling, self._system = arms, sampling, system
        self._histories: dict[str, list[dict[str, str]]] = {name: [] for name in arms.models}
        self._spoken: dict[str, list[Spoken]] = {name: [] for name in arms.models}
        for lm in arms.models.values():
            if lm.tokenizer.chat_template is None:
                raise InputError(
                    f"{lm.name} has no chat template, so there is no conversation to be had",
                    fix="give it prompts instead; they are continued as plain text",
                )

    def say(self, line: str) -> None:
        """One turn of every arm's conversation."""
        from persona_probe.cli.steer_view import show_legend, show_prompt
        from persona_probe.evaluation.questions import Question

        said = {"role": "user", "content": line}
        asked = {
            name: [Question(line, "chat", (*history, said))] for name, history in self._histories.items()
        }
        with err.status("answering"):
            spoken, receipt = self._arms.answer(asked, self._sampling, self._system)
        for name, (one,) in spoken.items():
            self._spoken[name].append(one)
            self._histories[name] += [said, {"role": "assistant", "content": one.answer.text}]
        found = self._arms.document(self._spoken, self._sampling)
        show_prompt(found["prompts"][-1], found["arms"])
        show_legend(found)
        for text in receipt:
            out.print(text, markup=False, style="dim")

    def command(self, line: str) -> None:
        """What a line with a slash asks for; `InputError` for what is not known."""
        name, _, value = line.partition(" ")
        match name:
            case "/help":
                out.print(HELP, markup=False)
            case "/reset":
                self._histories = {arm: [] for arm in self._histories}
                out.print("forgotten", style="dim")
            case "/gain":
                self._gain(value)
            case "/off" | "/on":
                self._arms = replace(self._arms, off=name == "/off")
                out.print(f"the fix is {name[1:]}", style="dim")
            case _:
                raise InputError(f"there is no command {name}", fix="/help lists them")

    def document(self) -> dict[str, Any] | None:
        """All turns so far."""
        return self._arms.document(self._spoken, self._sampling) if self._spoken["base"] else None

    def _gain(self, value: str) -> None:
        try:
            gain = float(value)
        except ValueError:
            raise InputError(f"/gain takes a number, not {value!r}", fix="/gain 1") from None
        self._arms = replace(self._arms, fix=tuple(edit.with_gain(gain) for edit in self._arms.fix))
        said = "over-corrects" if gain > 1 else "no edit" if gain == 0 else ""
        out.print(f"gain {gain:g} {said}".strip(), style="dim")
