"""Signals to what trains and what does not, in processes that import no torch; `python -m bench signals` has whole commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmt_fast.runtime import exits, signals
from tests.fixtures import forked

ROOT = Path(__file__).parents[2]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
HEAD = f"""
import ctypes, os, signal, sys, time
signal.signal({int(INT)}, signal.default_int_handler)  # a test in the background begins with it ignored, and
signal.signal({int(HUP)}, signal.SIG_DFL)  # one under nohup with this
from cmt_fast.runtime import signals
def in_c(seconds, first=lambda: None):
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.KINDS)  # so that the call is not cut short
    first()
    ctypes.CDLL(None).usleep(int(seconds * 1e6))
def ready():
    print("ready", flush=True)
def wait(seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
"""


def ended(code: str, *numbers: int, pause_s: float = 0.1) -> tuple[int, str, float]:
    """Exit code, what was said, and seconds from the first signal to the end, of a process that gets them when it is ready."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    for i, number in enumerate(numbers):
        time.sleep(pause_s if i else 0.0)
        process.send_signal(number)
    said = process.communicate(timeout=30)[0]
    assert "Traceback" not in said, said
    return process.returncode, said, time.monotonic() - begun


HEARD = """
try:
    with signals.heard():
        try:
            {}
        finally:
            print("closed", flush=True)
except KeyboardInterrupt as error:
    sys.exit(signals.code_of(error))
"""


@pytest.mark.parametrize("number", signals.KINDS)
def test_the_first_signal_closes_what_is_open(number):
    code, said, _ = ended(HEARD.format("ready(); wait()"), number)
    assert (code, said) == (exits.SIGNAL + number, "closed\n")


def test_a_second_signal_ends_at_once_what_is_no_training():
    """Where the main thread is in a call that does not return too; a first one after its patience."""
    stuck = "in_c(20, ready)"  # a signal right after ready() would find the main thread in Python
    code, said, seconds = ended(HEARD.format(stuck), INT, INT)
    assert code == exits.SIGNAL + INT and seconds < 5 and said == "cmt: interrupted\n"
    code, said, seconds = ended(HEARD.format(f"signals.PATIENCE_S = 0.3; {stuck}"), TERM)
    assert code == exits.SIGNAL + TERM and seconds < 5 and said == "cmt: ended by SIGTERM\n"
    slow = "\n".join(["try:", "                ready(); wait()", "            except KeyboardInterrupt: wait()"])
    code, _, seconds = ended(HEARD.format(slow), INT, TERM)  # as it closes what is open
    assert code == exits.SIGNAL + TERM and seconds < 5


def test_an_interrupt_that_comes_up_in_a_finalizer_is_not_lost():
    lost = "exec('class A:\\n def __del__(self): ready(); wait(5)\\nA()\\nwait()')"
    code, said, seconds = ended(HEARD.format(lost), INT)
    assert code == exits.SIGNAL + INT and seconds < 4 and said == "cmt: interrupted\n"


NOTED = """
with signals.heard(), signals.noted() as asked:
    ready(); wait(0.6)
    print(*map(int, asked), flush=True)
    import types
    import cmt_fast.runtime as runtime  # one process, without torch
    sys.modules["cmt_fast.runtime.distributed"] = runtime.distributed = types.SimpleNamespace(largest=lambda n: n)
    try:
        signals.look()
        print("goes on")
    except signals.Stopped as stopped:
        print(stopped.code, stopped.left)
"""


def test_what_trains_notes_them_and_stops_where_it_looks():
    code, said, _ = ended(NOTED, INT, TERM, HUP)
    noted = "cmt: SIGINT: stops where nothing is lost"
    assert code == 0 and said.splitlines() == [noted, f"{int(INT)} {int(TERM)} {int(HUP)}", "130 nothing is lost"]
    signals.look()  # nothing outside of `noted`


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    code, said, _ = ended("signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + NOTED, HUP)
    assert code == 0 and said.splitlines() == ["", "goes on"]


def test_a_forked_childs_signals_are_its_own():
    """They share the file that the system's handler writes to until the child lets go of it."""
    child = "for _ in range(3): signal.signal(15, signal.SIG_IGN); os.kill(os.getpid(), 15)"
    fork = f"exec('if not os.fork():\\n {child}\\n os._exit(0)\\nready(); os.wait(); wait(0.3)')"
    assert ended(HEARD.format(fork.replace("signal.SIG_IGN", "lambda *_: None")))[:2] == (0, "closed\n")


@pytest.mark.parametrize("after_s", [0.03, 0.1, 0.3])
def test_a_command_that_is_interrupted_as_it_starts_says_no_traceback(after_s):
    """By our first line on; what the interpreter does before that is not ours."""
    code = "import runpy, threading; sys.argv = ['cmt', 'train', 'digits', '--dry-run']; ready()\n"
    start = "import sys; sys.path.insert(0, ''); runpy.run_module('cmt_fast', run_name='__main__')"
    timer = f"threading.Timer({after_s}, lambda: os.kill(os.getpid(), {int(INT)})).start()\n"
    code, said, _ = ended(code + timer + start)
    assert code == exits.SIGNAL + INT and said in ("", "cmt: interrupted\n")


def test_signals_end_commands_as_they_should(tmp_path):
    """A stop in an evaluation, twice: a sample of what the bench sends, with the run's end held against one undisturbed."""
    command = ["-m", "bench", "signals", "--only", "evaluation: SIGHUP then SIGTERM", "--out", str(tmp_path / "x.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([*forked.python(), *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["cases"] == 1 and found["rows"][0]["codes"] == [exits.SIGNAL + HUP]


def test_the_page_has_every_exit_code():
    page = (ROOT / "docs" / "stopping.md").read_text("utf-8")
    rows = [
        line.split("|")[1:3]
        for line in page.splitlines()
        if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    told = {name.strip().strip("`"): int(code) for code, name in rows if "+" not in name}
    assert told == {k: v for k, v in vars(exits).items() if k.isupper() and k != "SIGNAL"}
    ours = {int(code) for code, name in rows if "+" in name}
    assert ours == {exits.SIGNAL + n for n in (*signals.KINDS, signal.SIGPIPE)}
