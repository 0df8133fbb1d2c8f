"""The shell's way in: `persona-probe COMMAND`. Nothing here loads torch until a command runs."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point of `persona-probe`."""
    try:
        from persona_probe.cli.allocator import keep_freed_memory
        from persona_probe.cli.app import app

        keep_freed_memory()
        app(prog_name="persona-probe")
    except KeyboardInterrupt:  # before there was a command to catch it
        sys.stderr.write("stopped\n")
        sys.exit(130)
