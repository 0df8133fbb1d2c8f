"""The shell answers at once, and what goes wrong becomes a message and an exit code."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from persona_probe import errors
from persona_probe.cli.app import app

HEAVY = [
    "torch",
    "transformers",
    "numpy",
    "polars",
    "plotly",
    "sae_lens",
    "transformer_lens",
    "peft",
]


def loaded_after(code: str) -> list[str]:
    """Which of the heavy packages a fresh process has loaded after running `code`."""
    program = f"import json, sys\n{code}\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_help_answers_in_half_a_second() -> None:
    def seconds() -> float:
        """Processor time of one call, which a busy machine does not stretch as it does the clock."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "persona_probe.cli", "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert "doctor" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # two threads that share a core stretch even that: one call in peace is enough
    taken: list[float] = []
    while len(taken) < 12 and min(taken, default=1.0) >= 0.5:
        taken.append(seconds())
    assert min(taken) < 0.5, taken


@pytest.mark.parametrize(
    "code",
    [
        "import persona_probe; dir(persona_probe)",
        "import persona_probe.cli",
        "from typer.testing import CliRunner; from persona_probe.cli.app import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
    ],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded_after(code) == []


def test_every_command_explains_itself() -> None:
    for command in typer.main.get_group(app).commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize("words", [["--help"], ["audit", "--help"], ["--version"], ["doctor"]])
def test_a_reader_who_has_gone_is_no_error(words: list[str]) -> None:
    """As `head -1` when it has its line."""
    program = (
        "from persona_probe.cli import console, doctor, main\n"
        "def showing():\n    console.show_json({'a': 1})\n"
        "doctor.doctor = showing\n"
        "main()\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.split()[0] == "persona-probe"


def test_a_wrong_call_exits_with_2() -> None:
    assert CliRunner().invoke(app, ["no-such-command"]).exit_code == 2
    assert CliRunner().invoke(app, ["doctor", "--no-such-flag"]).exit_code == 2


def run_raising(error: str, debug: str = "0") -> subprocess.CompletedProcess[str]:
    """A command that raises `error`, put in the place of `doctor`, in a process of its own."""
    program = (
        "import signal, sys\n"
        "from persona_probe.errors import *\n"
        "from persona_probe.cli import doctor, main\n"
        "def interrupted():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        return 'swallowed'\n"
        "def raising():\n"
        f"    raise {error}\n"
        "doctor.doctor = raising\n"
        "sys.argv = ['persona-probe', 'doctor']\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PERSONA_PROBE_DEBUG": debug},
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("InputError('bad flag')", 2, "error: bad flag"),
        ("MissingPathError('no [folder]', fix='make it')", 2, "no [folder]\n  fix: make it"),
        ("MissingExtraError.of('trl', 'train')", 2, "next: pip install 'persona-probe[train]'"),
        ("BusyError('in use')", 2, "error: in use"),
        ("NotFiredError('never reached')", 1, "error: never reached"),
        ("NothingSelectedError('no token')", 2, "error: no token"),
        ("DiskFullError('full')", 1, "error: full"),
        ("ZeroDivisionError('oops')", 1, "internal error: ZeroDivisionError: oops"),
        ("KeyboardInterrupt", 130, "stopped; run the same command again to resume"),
        ("SystemExit(3)", 3, ""),
        ("InputError(str(interrupted()))", 130, "stopped; run the same command again to resume"),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_code(error: str, code: int, said: str) -> None:
    done = run_raising(error)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_ctrl_c_while_the_shell_is_still_loading_is_no_traceback() -> None:
    program = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'persona_probe.cli.app':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from persona_probe.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_freed_memory_is_kept_where_the_library_can() -> None:
    program = "from persona_probe.cli.allocator import keep_freed_memory as keep; print(keep())"
    for settings in ({}, {"MALLOC_TRIM_THRESHOLD_": "4096"}):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, **settings},
        )
        told = platform.libc_ver()[0] == "glibc" and not settings
        assert done.stdout == f"{told}\n"


def test_in_a_log_progress_is_a_line_now_and_then() -> None:
    program = (
        "from persona_probe.cli import console\n"
        "for pause in (60, 0):\n"
        "    console.PAUSE = pause\n"
        "    with console.telling() as told:\n"
        "        told(f'step 1 [of 2], {pause}')\n"
        "        told(f'step 2 [of 2], {pause}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "step 1 [of 2], 0\nstep 2 [of 2], 0\n")


@pytest.mark.parametrize("error", ["InputError('bad flag')", "ZeroDivisionError('oops')"])
def test_debug_shows_the_traceback(error: str) -> None:
    done = run_raising(error, debug="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_every_error_has_its_exit_code() -> None:
    from persona_probe.cli.app import exit_code

    assert exit_code(errors.UnknownSiteError("x")) == 2
    assert exit_code(errors.JudgeError("x")) == 2
    assert exit_code(errors.PersonaProbeError("x")) == 1
