"""The commands, put together, and what their errors become.

Exit codes: 0 done, 1 our fault, 2 the call or an input, 3 a gate asked for by `--fail-on`, 130
stopped by Ctrl-C. A command is a function (or, for a group, a `typer.Typer` named `app`) in the
module of its name; a module here imports nothing heavy at its top, so that `--help` is instant.
"""

from __future__ import annotations

import importlib
import os
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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


class _Root(TyperGroup):
    """The top-level group: whatever a command raises becomes a message and an exit code here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show_error("stopped; run the same command again to resume")
            raise typer.Exit(_INTERRUPTED) from None
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except Exception as error:
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


def _version(asked: bool) -> bool:
    if asked:
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
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    root.callback()(_callback)
    for name in _COMMANDS:
        module = importlib.import_module(f"persona_probe.cli.{name}")
        root.command(name)(getattr(module, name))
    for name in _GROUPS:
        module = importlib.import_module(f"persona_probe.cli.{name}")
        root.add_typer(module.app, name=name)
    return root


app = _build()


def main() -> None:
    """The entry point of `persona-probe`."""
    app(prog_name="persona-probe")
