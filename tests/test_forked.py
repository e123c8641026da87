"""The server that forks test processes outlives its children and their clients, in whatever order they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.fixtures import forked


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]


def test_a_child_and_its_client_that_end_together_do_not_end_the_server() -> None:
    """Both events in one round, the child's first: the client's then speaks of a process that is no more."""
    command = forked.python("torch")
    server = forked._kept[0].pid  # the level `torch` is started before all others
    code = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    client = subprocess.Popen([*command, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin and client.stdout
    child = int(client.stdout.readline())
    os.kill(server, signal.SIGSTOP)
    try:
        client.stdin.close()
        end = time.monotonic() + 60
        while state(child) != "Z":
            assert time.monotonic() < end
            time.sleep(0.01)
        client.kill()
        client.wait()
    finally:
        os.kill(server, signal.SIGCONT)
    client.stdout.close()
    assert_served(command)


@pytest.mark.parametrize("said", [b"", b"      10", b"      10{"], ids=["nothing", "a length", "half a request"])
def test_a_client_that_ends_before_it_has_asked_does_not_end_the_server(said: bytes) -> None:
    command = forked.python("torch")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(command[-1])
        if said:
            client.sendall(said)
    assert_served(command)


def assert_served(command: list[str]) -> None:
    again = subprocess.run([*command, "-c", "print('served')"], capture_output=True, text=True, timeout=60)
    assert (again.returncode, again.stdout) == (0, "served\n"), again.stderr
