"""Where a command speaks: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from persona_probe.errors import PersonaProbeError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
PAUSE = 30.0


def show_json(obj: object) -> None:
    """One JSON value on stdout (see `artifact.plain`), and nothing else, for `--json`."""
    from persona_probe.artifact import plain

    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False)
    # rich would wrap the lines at the terminal's width
    out.file.write(text + "\n")
    out.file.flush()  # a reader who has gone is noticed here, and not at the interpreter's end


def show_error(text: str) -> None:
    """`text` on stderr, as it is: a path with brackets in it is not markup."""
    err.print(text, markup=False, soft_wrap=True)


@contextmanager
def telling() -> Generator[Callable[[str], None], None, None]:
    """Yields what is told how far a long command is: a line that changes on a terminal; elsewhere, as in the
    log of a server, a line at most every `PAUSE` seconds.
    """
    if err.is_terminal:
        with err.status("starting") as status:
            yield lambda text: status.update(escape(text))
        return
    said = time.monotonic()

    def told(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= PAUSE:
            said = time.monotonic()
            show_error(text)

    yield told


def size(n_bytes: int | float) -> str:
    """`n_bytes` as people read it: `"2.0 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def show_share_done(share: object, unfinished: PersonaProbeError, as_json: bool) -> None:
    """Say that this process did its share, and how much others have left."""
    if as_json:
        show_json({"share": str(share), "unfinished": unfinished.message})
    else:
        out.print(f"share {share} is done; {unfinished.message}", markup=False, soft_wrap=True)
