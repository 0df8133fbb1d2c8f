"""The commands, put together, and what their errors become.

Exit codes: 0 done, 1 our fault, 2 the call or an input, 3 a gate asked for by `--fail-on`, 130
stopped by Ctrl-C. A command is a function (or, for a group, a `typer.Typer` named `app`) in the
module of its name; a module here imports nothing heavy at its top, so that `--help` is instant.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

from persona_probe.cli.console import out, show_error
from persona_probe.errors import BusyError, InputError, JudgeError, MissingExtraError, PersonaProbeError

DEBUG = "PERSONA_PROBE_DEBUG"
_INTERRUPTED = 130

_COMMANDS = (
    "audit",
    "calibrate",
    "capture",
    "diff",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "flag",
    "interpret",
    "realign",
    "report",
    "serve",
    "steer",
    "sweep",
    "timeline",
    "transfer",
)
_GROUPS = ("judge", "lab", "organism", "sae")


def exit_code(error: PersonaProbeError) -> int:
    """2 when the call, an input (a judge is one) or the place to write was at fault; 1 for anything else."""
    return 2 if isinstance(error, InputError | JudgeError | MissingExtraError | BusyError) else 1


class _Commands(dict[str, Any]):
    """The commands by name, each made when it is asked for: reading the parameters of all of them, for one
    to be run, would take most of the time that `--help` may take.
    """

    def __init__(self) -> None:
        super().__init__(dict.fromkeys((*_COMMANDS, *_GROUPS)))

    def __getitem__(self, name: str) -> Any:
        if (made := super().__getitem__(name)) is None:
            module = _module(name)
            if name in _GROUPS:
                made = typer.main.get_group(module.app)
                made.name = name
            else:
                alone = typer.Typer(add_completion=False)
                alone.command(name)(getattr(module, name))
                made = typer.main.get_command(alone)
            self[name] = made
        return made

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default


def _module(name: str) -> Any:
    return importlib.import_module(f"persona_probe.cli.{name}")


class _Root(TyperGroup):
    """The top-level group: whatever a command raises becomes a message and an exit code here."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()
        self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if not self._listing:
            return super().get_command(ctx, cmd_name)
        module = _module(cmd_name)
        text = module.app.info.help if cmd_name in _GROUPS else inspect.getdoc(getattr(module, cmd_name))
        return TyperCommand(cmd_name, help=text)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing = True  # the list shows first lines, and needs no parameters
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False

    def invoke(self, ctx: Any) -> Any:
        interrupts: list[int] = []
        try:
            with _noting(interrupts):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _stopped() from None
        except (typer.Exit, typer.Abort, typer.TyperException, BrokenPipeError):
            raise  # the last: who read our output, such as `head`, has had enough; typer ends it quietly
        except Exception as error:
            if interrupts:  # compiled code may make another error of it
                raise _stopped() from error
            if os.environ.get(DEBUG) == "1":
                raise
            if isinstance(error, PersonaProbeError):
                show_error(f"error: {error}")
                raise typer.Exit(exit_code(error)) from None
            show_error(
                f"internal error: {type(error).__name__}: {error}\n"
                f"  next: the same command again with {DEBUG}=1 before it, for the traceback"
            )
            raise typer.Exit(1) from None


@contextmanager
def _noting(interrupts: list[int]) -> Generator[None, None, None]:
    """Put every Ctrl-C on the list, besides what Python does with it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stopped() -> typer.Exit:
    show_error("stopped; run the same command again to resume")
    return typer.Exit(_INTERRUPTED)


def _version(asked: bool) -> bool:
    if asked:
        from importlib import metadata  # slow to load, and rarely asked

        out.print(f"persona-probe {metadata.version('persona-probe')}")
        raise typer.Exit
    return asked


def _callback(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Find the misaligned persona inside a fine-tuned model, prove that it causes the behaviour,
    and turn it off.
    """


def _build() -> typer.Typer:
    root = typer.Typer(
        cls=_Root,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # its boxes take longer to load than all the rest of `--help`
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    root.callback()(_callback)
    return root


app = _build()
