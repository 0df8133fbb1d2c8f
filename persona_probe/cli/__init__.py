"""The shell's way in: `persona-probe COMMAND`. Nothing here loads torch until a command runs."""

from persona_probe.cli.app import app, main

__all__ = ["app", "main"]
