"""The shell command of an audit, for its report: whoever runs it gets the same figures."""

from __future__ import annotations

import shlex
from dataclasses import fields

from persona_probe.auditing.settings import AuditRequest, AuditSettings

_FLAG_OF = {"sites": "site", "triggers": "trigger"}
_WITHOUT_FLAG = ("screen",)


def command_lines(request: AuditRequest, *, device: str | None = None, dtype: str | None = None) -> list[str]:
    """`persona-probe audit` with every flag that differs from its default, paths as they were given.

    Settings that Python alone can give are on lines of their own.
    """
    words = ["persona-probe", "audit", "--base", request.base, "--tuned", request.tuned]
    words += ["--questions", request.questions, "--judge", request.judge]
    for flag, paths in (("--sae", request.sae), ("--benign", request.benign)):
        for path in paths:
            words += [flag, path]
    for flag, path in (("--samples-base", request.samples_base), ("--samples-tuned", request.samples_tuned)):
        words += [] if path is None else [flag, path]
    notes: list[str] = []
    default = AuditSettings()
    for name in (field.name for field in fields(AuditSettings)):
        given = getattr(request.settings, name)
        if given == getattr(default, name):
            continue
        if name in _WITHOUT_FLAG or given == ():
            notes.append(f"# with AuditSettings({name}={given!r}), from Python")
            continue
        flag = f"--{_FLAG_OF.get(name, name).replace('_', '-')}"
        for value in given if isinstance(given, tuple) else (given,):
            words += [flag, value]
    for flag, value in (("--device", device), ("--dtype", dtype)):
        if value is not None:
            words += [flag, value]
    return [shlex.join(map(str, words)), *notes]
