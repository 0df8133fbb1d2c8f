"""The errors a user can meet.

Every one says what was expected and what came; `fix` says what most likely puts it right and
`command` what to run next. Each also subclasses the builtin it refines, so `except ValueError` and
`except FileNotFoundError` catch what a caller expects them to.
"""

from __future__ import annotations

import errno


class PersonaProbeError(Exception):
    """The base of every error raised on purpose.

    `message` says what was expected and what came, `fix` (a sentence) the likely remedy, `command`
    (a shell or Python line) the next step. `str()` gives all three, one per line.
    """

    def __init__(self, message: str, *, fix: str | None = None, command: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.command = command

    def __str__(self) -> str:
        lines = [self.message]
        if self.fix is not None:
            lines.append(f"  fix: {self.fix}")
        if self.command is not None:
            lines.append(f"  next: {self.command}")
        return "\n".join(lines)


class InputError(PersonaProbeError, ValueError):
    """What was passed in (an argument, a file, a flag) is not what it must be."""


class MissingPathError(InputError, FileNotFoundError):
    """A file or folder that must exist does not."""


class UnknownSiteError(InputError, KeyError):
    """A hook name that the model does not have; the message lists the nearest that it has."""


class MismatchError(InputError):
    """Two things that do not belong together (base and tuned, dictionary and model)."""


class NonFiniteError(InputError):
    """A NaN or an infinity where a finite number is needed."""

    conversation: int | None = None
    """Which of the conversations that were read it came from, where it was one."""


class NotFiredError(PersonaProbeError, RuntimeError):
    """A hook was attached and the model ran, but the hook was never reached or edited nothing."""


class NothingSelectedError(NotFiredError, InputError):
    """The hooks were reached, and no token was at the positions asked for."""


class BusyError(PersonaProbeError, RuntimeError):
    """Another process holds the output folder."""


class DiskFullError(PersonaProbeError, OSError):
    """There is no room left to write; `errno` is `ENOSPC`."""

    def __init__(self, message: str, *, fix: str | None = None, command: str | None = None) -> None:
        super().__init__(message, fix=fix, command=command)
        self.errno = errno.ENOSPC


class JudgeError(PersonaProbeError, RuntimeError):
    """The judge could not be loaded, or gave no usable judgement at all."""


class MissingExtraError(PersonaProbeError, ImportError):
    """An optional package is absent; `command` is the exact `pip install` that adds it."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        """The error for `package`, which the extra `extra` in pyproject.toml brings."""
        return cls(f"{package} is not installed", command=f"pip install 'persona-probe[{extra}]'")
