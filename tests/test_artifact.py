"""What is written is whole or absent, whatever happens in the middle of it."""

from __future__ import annotations

import dataclasses
import enum
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from persona_probe import artifact
from persona_probe.artifact import (
    RunFolder,
    append_jsonl,
    atomic_file,
    atomic_folder,
    check_manifest,
    check_writable,
    digest_file,
    digest_folder,
    digest_of,
    read_json,
    read_jsonl,
    shipped,
    versions,
    write_json,
    write_jsonl,
    write_manifest,
    write_text,
)
from persona_probe.artifact.atomic import remove_partials
from persona_probe.errors import BusyError, DiskFullError, InputError, MissingPathError


def killed_while(tmp_path: Path, code: str) -> None:
    """Run `code` in a process that is killed with -9 at the line `wait()`."""
    program = f"""
import os, sys, time
from pathlib import Path
from persona_probe.artifact import *
here = Path({str(tmp_path)!r})
def wait():
    print("there", flush=True)
    time.sleep(60)
{code}
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---- files and folders ---------------------------------------------------------------------------


def test_kill_in_the_middle_of_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    killed_while(
        tmp_path,
        "with atomic_file(here / 'a.txt') as f:\n    f.write_text('new, half'); wait()",
    )
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("existing", [True, False])
def test_kill_in_the_middle_of_a_folder(tmp_path: Path, existing: bool) -> None:
    if existing:
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("old")
    killed_while(
        tmp_path,
        "with atomic_folder(here / 'a', overwrite=True) as f:\n    (f / 'x').write_text('new'); wait()",
    )
    assert (tmp_path / "a").exists() == existing
    if existing:
        assert (tmp_path / "a" / "x").read_text() == "old"
    assert len(names(tmp_path)) == 1 + existing, "the killed writer's folder lies beside"

    with atomic_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "x").write_text("newer")
    assert (tmp_path / "a" / "x").read_text() == "newer"
    assert names(tmp_path) == ["a"], "the next writer cleared up"


def test_kill_between_the_two_renames_is_mended(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    killed_while(
        tmp_path,
        "rename = Path.rename\n"
        "def stop(self, to):\n"
        "    rename(self, to)\n"
        "    wait()\n"
        "Path.rename = stop\n"
        "with atomic_folder(here / 'a', overwrite=True) as f:\n"
        "    (f / 'x').write_text('new')",
    )
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="exists"), atomic_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_that_another_writer_is_filling_is_let_be(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as first:
        with atomic_folder(tmp_path / "a") as second:
            (second / "x").write_text("second")
        (first / "x").write_text("first")
        assert (tmp_path / "a" / "x").read_text() == "second"
        shutil.rmtree(tmp_path / "a")
    assert (tmp_path / "a" / "x").read_text() == "first"


def test_a_file_that_another_writer_is_filling_is_let_be_however_it_is_filled(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.safetensors") as file:
        # writes beside the place that it is given, and renames
        save_file({"x": torch.ones(3)}, file)
        remove_partials(tmp_path)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(3))
    assert names(tmp_path) == ["a.safetensors"]


def test_a_place_that_is_cleared_up_before_it_is_locked_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, passes = fcntl.flock, iter([True, False, True])

    def late(handle: int, kind: int) -> None:
        if kind == fcntl.LOCK_EX and next(passes, False):
            remove_partials(tmp_path)
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    for content in ("first", "second"):
        write_text(tmp_path / "a", content)
        assert (tmp_path / "a").read_text() == content
        assert names(tmp_path) == ["a"]
    assert next(passes, None) is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("half")
        raise error
    with pytest.raises(error), atomic_file(tmp_path / "b") as file:
        file.write_text("half")
        raise error
    assert names(tmp_path) == []


def test_an_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("mine")
    with pytest.raises(InputError, match="not empty"), atomic_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "x").read_text() == "mine"

@pytest.mark.parametrize("place", ["file/a", "file/a/b", "file"])
def test_a_place_where_no_folder_can_be_is_named_and_left_as_it_is(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / place
    with pytest.raises(InputError, match=r"cannot be written to.* is a file"):
        check_writable(out)
    with pytest.raises(InputError, match="is a file"), atomic_folder(out, overwrite=True):
        pass
    with pytest.raises(InputError, match=r"is a file|cannot be written to"):
        RunFolder.open(out, {})
    if out.parent != tmp_path:
        with pytest.raises(InputError, match="cannot be written to"):
            write_json(out, 1)
    assert names(tmp_path) == ["file"]


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder, name in ((theirs, "thesis.txt"), (ours, "kind.json")):
        folder.mkdir()
        (folder / name).write_text("old")
    for overwrite in (False, True):
        with (
            pytest.raises(InputError, match="no kind.json in it" if overwrite else "not empty"),
            atomic_folder(theirs, overwrite=overwrite, known_by=["kind.json"]),
        ):
            pass
    with atomic_folder(ours, overwrite=True, known_by=["kind.json"]) as folder:
        (folder / "kind.json").write_text("new")
    assert (theirs / "thesis.txt").read_text() == "old" and (ours / "kind.json").read_text() == "new"


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(DiskFullError, match=r"a\.json"):
        write_json(tmp_path / "a.json", 2)
    with pytest.raises(DiskFullError, match="b"), atomic_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == ["a.json"]
    assert read_json(tmp_path / "a.json") == 1


def test_a_full_disk_reported_by_a_writer_in_another_language(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError), atomic_file(tmp_path / "a"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="unrelated"), atomic_file(tmp_path / "a"):
        raise RuntimeError("unrelated")


# ---- text and JSON -------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    where: Path


def test_json_of_what_we_hold(tmp_path: Path) -> None:
    held = {
        "point": Point(math.nan, Path("a/b")),
        "pair": (1, -math.inf),
        "array": np.array([[1.5, math.nan]], dtype=np.float32),
        "scalar": np.int64(3),
        "set": {"b", "a"},
        "colour": Colour.RED,
        3: "Δ",
    }
    write_json(tmp_path / "a.json", held)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "point": {"x": None, "where": "a/b"},
        "pair": [1, None],
        "array": [[1.5, None]],
        "scalar": 3,
        "set": ["a", "b"],
        "colour": "red",
        "3": "Δ",
    }
    with pytest.raises(TypeError, match="object"):
        write_json(tmp_path / "b.json", object())
    assert names(tmp_path) == ["a.json"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(json_values)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize(
    ("written", "fix"),
    [(None, "did you mean manifest.jsn"), (b'{"a"', "run that command again"), (b"\xff", "iconv")],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path: Path, written: bytes | None, fix: str) -> None:
    (tmp_path / "manifest.jsn").touch()
    if written is not None:
        (tmp_path / "manifest.json").write_bytes(written)
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "manifest.json")
    assert fix in (caught.value.fix or "")


def test_reading_json_says_what_is_wrong_and_where(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"no file .*a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_text('{\n "a": 1,\n oops\n}')
    with pytest.raises(InputError, match="line 3, column 2"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(InputError, match="not UTF-8"):
        read_json(tmp_path / "a.json")


def test_jsonl_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: not valid JSON"):
        read_jsonl(path)
    path.write_text('{"a": 1}\n[1]\n')
    with pytest.raises(InputError, match=r"line 2: expected a JSON object, got list"):
        read_jsonl(path)


def test_jsonl_keeps_characters_that_only_look_like_line_ends(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\r\nd"}, {"text": "last"}]
    append_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_jsonl_written_whole_is_what_is_appended(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"b": None}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    append_jsonl(tmp_path / "b.jsonl", rows[:1])
    append_jsonl(tmp_path / "b.jsonl", rows[1:])
    assert read_jsonl(tmp_path / "a.jsonl") == rows
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "a.jsonl", [{"a": 2}, object()])
    assert read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_torn_last_line_is_dropped_and_cut_off(tmp_path: Path, cut: int) -> None:
    """Wherever it was torn, inside a character too."""
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": "你好🙂"}])
    os.truncate(path, path.stat().st_size - cut)
    assert read_jsonl(path, torn_tail=True) == [{"a": 1}]
    append_jsonl(path, [{"a": 3}])
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


# ---- digests and provenance ----------------------------------------------------------------------


def test_digests_are_sha256_and_see_every_byte_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_bytes(b"abc")
    (folder / "y").write_bytes(b"")
    assert digest_file(folder / "sub" / "x") == f"sha256:{hashlib.sha256(b'abc').hexdigest()}"

    seen = {digest_folder(folder)}
    (folder / ".cache").write_text("does not count")
    assert digest_folder(folder) in seen
    (folder / "sub" / "x").write_bytes(b"abd")
    seen.add(digest_folder(folder))
    (folder / "sub" / "x").rename(folder / "x")
    seen.add(digest_folder(folder))
    assert len(seen) == 3
    with pytest.raises(MissingPathError, match="no folder"):
        digest_folder(tmp_path / "none")


def test_the_digest_of_an_object_ignores_the_order_of_its_keys() -> None:
    assert digest_of({"a": 1, "b": (2, 3)}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_versions_match_what_is_imported() -> None:
    found = versions()
    assert found["numpy"] == np.__version__
    assert found["python"] == sys.version.split()[0]


def test_a_flipped_byte_a_missing_file_and_an_intact_folder(tmp_path: Path) -> None:
    for name in ("a.bin", "sub/b.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(range(256)))
    write_manifest(tmp_path, {"seed": 7})
    manifest = check_manifest(tmp_path)
    assert manifest["seed"] == 7
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}

    data = bytearray((tmp_path / "sub/b.bin").read_bytes())
    data[100] ^= 1
    (tmp_path / "sub/b.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"b\.bin was changed"):
        check_manifest(tmp_path)
    (tmp_path / "sub/b.bin").unlink()
    with pytest.raises(MissingPathError, match=r"b\.bin is in the manifest"):
        check_manifest(tmp_path)


def test_a_manifest_without_its_list_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", [])
    with pytest.raises(InputError, match="not a manifest"):
        check_manifest(tmp_path)


@pytest.mark.parametrize("installed", [True, False])
def test_shipped_data_is_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    package = tmp_path / "persona_probe"
    data = (package if installed else tmp_path) / "data"
    (data / "organism").mkdir(parents=True)
    if not installed:
        (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(artifact.provenance, "__file__", str(package / "artifact" / "x.py"))
    assert shipped("organism") == data / "organism"
    with pytest.raises(MissingPathError, match="organism/none"):
        shipped("organism", "none")


# ---- the run's folder ----------------------------------------------------------------------------


def test_a_run_from_start_to_manifest(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with RunFolder.open(out, {"seed": 1, "base": Path("b")}) as run:
        assert read_json(out / "settings.json")["settings"] == {"seed": 1, "base": "b"}
        assert (run.complete, run.stage("diff")) == (False, None)
        run.save_stage("diff", {"delta": (1.5, math.nan)})
        assert run.stage("diff") == {"delta": [1.5, None]}
        write_json(out / "audit.json", {"verdict": "aligned"})
        run.finish({"seconds": 3})
        assert run.complete
    manifest = check_manifest(out)
    assert set(manifest["files"]) == {"audit.json", "settings.json"}
    assert manifest["settings"] == {"seed": 1, "base": "b"}
    assert manifest["seconds"] == 3


def test_the_same_settings_resume_after_a_kill(tmp_path: Path) -> None:
    killed_while(
        tmp_path,
        "run = RunFolder.open(here / 'out', {'seed': 1})\n"
        "run.save_stage('diff', [1, 2])\n"
        "(here / 'out' / '.half.0000.partial').write_text('half a file')\n"
        "wait()",
    )
    with RunFolder.open(tmp_path / "out", {"seed": 1}) as run:
        assert run.stage("diff") == [1, 2]
        assert not run.complete
    assert not (tmp_path / "out" / ".half.0000.partial").exists()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"seed": 2, "n": 1}, "seed was 1, this call has 2"),
        ({"seed": 1, "n": 2}, "n was 1, this call has 2"),
        ({"seed": 1}, "n was 1, this call has not set"),
        ({"seed": 1, "n": 1, "new": "x"}, "new was not set, this call has 'x'"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, now: dict[str, Any], said: str) -> None:
    with RunFolder.open(tmp_path / "out", {"seed": 1, "n": 1}) as run:
        run.save_stage("diff", 1)
    with pytest.raises(InputError, match=said) as caught:
        RunFolder.open(tmp_path / "out", now)
    assert "--overwrite" in str(caught.value)
    with RunFolder.open(tmp_path / "out", now, overwrite=True) as run:
        assert run.stage("diff") is None


def test_a_folder_that_no_run_wrote_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    # another program's settings.json does not make the folder ours
    (tmp_path / "settings.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not written by persona-probe"):
            RunFolder.open(tmp_path, {"seed": 1}, overwrite=overwrite)
    assert names(tmp_path) == ["settings.json", "thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        RunFolder.open(tmp_path / "thesis.tex", {"seed": 1})


def test_a_second_run_is_refused_while_the_first_goes_on(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {"seed": 1}) as run:
        run.save_stage("diff", 1)
        for overwrite in (False, True):
            with pytest.raises(BusyError, match=f"process {os.getpid()}"):
                RunFolder.open(tmp_path / "out", {"seed": 1}, overwrite=overwrite)
        assert run.stage("diff") == 1
    RunFolder.open(tmp_path / "out", {"seed": 1}).close()


def test_a_run_that_fails_before_it_saved_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError), RunFolder.open(tmp_path / "out", {"seed": 1}):
        raise InputError("no such model")
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), RunFolder.open(tmp_path / "out", {"seed": 1}) as run:
        run.save_stage("diff", 1)
        raise KeyboardInterrupt
    with RunFolder.open(tmp_path / "out", {"seed": 1}) as run:
        assert run.stage("diff") == 1


def test_a_stage_with_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "out", {}) as run:
        run.save_stage("diff", {"delta": 1.25})
        file = tmp_path / "out" / ".stages" / "diff.json"
        file.write_text(file.read_text().replace("1.25", "1.35"))
        with pytest.raises(InputError, match=r"diff\.json was changed"):
            run.stage("diff")


def test_a_full_disk_keeps_the_stages_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder.open(tmp_path / "out", {}) as run:
        run.save_stage("first", 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_room)
            with pytest.raises(DiskFullError):
                run.save_stage("second", 2)
            with pytest.raises(DiskFullError):
                run.finish({})
        assert (run.stage("first"), run.stage("second"), run.complete) == (1, None, False)


def test_overwriting_does_not_leave_a_manifest_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it empties the folder, a run must not look complete."""
    with RunFolder.open(tmp_path / "out", {"seed": 1}) as run:
        write_json(tmp_path / "out" / "audit.json", 1)
        run.finish({})
    left: list[list[str]] = []

    def spy(path: Path) -> None:
        left.append(names(tmp_path / "out"))
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    monkeypatch.setattr(artifact.run_folder, "remove", spy)
    RunFolder.open(tmp_path / "out", {"seed": 2}, overwrite=True).close()
    assert "manifest.json" in left[0]
    assert all("manifest.json" not in rest for rest in left[1:])
    assert left[-1] == [".lock", "settings.json"]
