"""Where a command speaks: a stdout of another encoding, closed, full, or that nobody reads, and odd surroundings."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cmt_kernels import remembered

from cmt_fast.render import templates
from cmt_fast.runtime import exits, streams

SHELL = "import sys; from cmt_fast.cli import main; sys.exit(main(sys.argv[1:]))"


def shell(line: str, **more: str) -> subprocess.CompletedProcess:
    """A line of a shell, in which $CMT is the command."""
    command = f'CMT() {{ "{sys.executable}" -c "{SHELL}" "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **more}, timeout=120
    )


def test_ascii_takes_every_word_somehow():
    out = shell("CMT recipes ls; CMT eval --help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert out.returncode == 0 and "Frechet" in out.stdout and not out.stderr
    out = shell("CMT keys nöne.such", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert out.returncode == 2 and "none.such" in out.stderr


def test_a_closed_stdout_ends_nothing_and_its_number_goes_to_no_file(tmp_path):
    out = shell(f"CMT recipes ls >&- && CMT recipes copy digits {tmp_path}/a.yaml >&- 2>&- <&-")
    assert (out.returncode, out.stderr) == (0, "") and (tmp_path / "a.yaml").read_bytes().startswith(b"#")
    opened = f"print(open('{tmp_path}/f', 'w').fileno(), file=open('{tmp_path}/n', 'w'))"
    program = f"from cmt_fast.runtime import streams; streams.ready(); {opened}"
    assert shell(f'"{sys.executable}" -c "{program}" >&- 2>&-').returncode == 0
    assert int((tmp_path / "n").read_text()) > 2


def test_progress_into_a_full_disk_is_left_out_and_the_rest_still_comes():
    with open("/dev/full", "w", encoding="utf-8") as full:
        streams.put("a line that a full disk does not take", full)
        full.flush()  # nothing of it is left to fail
    closed = io.StringIO()
    closed.close()
    streams.put("x", closed)
    out = io.StringIO()
    streams.put("Fréchet", out)
    assert out.getvalue() == "Fréchet\n"
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError), open(write, "w") as pipe:
        try:
            streams.put("x", pipe)
        finally:
            os.dup2(os.open(os.devnull, os.O_WRONLY), write)


def test_what_is_data_and_not_progress_fails_on_a_full_disk():
    assert shell("CMT recipes show digits > /dev/full").returncode == exits.DISK_FULL
    table = templates.Table("a title", ["a"], [["1"]])
    with pytest.raises(OSError, match="No space"), open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        templates.show(table)
        full.flush()
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), streams.unless_lost():
        templates.show(table)  # as at the end of training
        sys.stdout.flush()


def test_a_user_whom_the_system_does_not_know_has_no_cache_and_needs_none(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    file = remembered.path("x.json")
    remembered.keep(file, "machine", "label", {})
    assert remembered.read(file, "machine") == {}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")  # a home that cannot be written
    remembered.keep(remembered.path("x.json"), "machine", "label", {})
    assert remembered.read(remembered.path("x.json"), "machine") == {}
