"""Python processes without the 2 to 6 seconds that imports take: forked from a server that has imported once.

`[*forked.python(LEVEL), "-m", MODULE, ...]` stands for `[sys.executable, "-m", MODULE, ...]`, also with `-c CODE` or a script.
What is started is a small program (fork_client.py) that has the child forked with its own arguments, folder, environment, group
and files, passes signals on, and ends as the child does; a child whose client is killed is killed.

LEVEL says what is imported already: `torch` alone, for children with switches that are read at import (CMT_*, TRITON_*), or the
`trainer` with all that it needs. A server lives as long as the process that asked for it, and never runs a backward pass, which
a fork would not survive.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
CLIENT = Path(__file__).with_name("fork_client.py")
LEVELS = {
    "torch": ("numpy", "torch", "pytest"),
    "trainer": ("sklearn.datasets", "torch._dynamo", "cmt_fast.cli", "bench.contender"),
}
SWITCHES = ("CMT_", "TRITON_")  # variables that are read when a module is imported


def python(level: str = "trainer") -> list[str]:
    """The command that stands for `python`."""
    return [sys.executable, "-I", "-S", str(CLIENT), _server(level)]


@functools.cache
def _server(level: str) -> str:
    """Start a level's server, the second as a child of the first; its address."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    start = [sys.executable] if level == "torch" else python("torch")
    server = subprocess.Popen(
        [*start, "-m", "tests.forked", str(folder / "socket"), level], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, text=True,
    )  # fmt: skip
    assert server.stdout and server.stdout.readline() == "ready\n", f"the {level} server ended with {server.wait()}"
    _kept.append(server)  # its stdin ends with this process, and it with that
    return str(folder / "socket")


_kept: list[subprocess.Popen] = []


# ------------------------------------------------------------------------------------------------------- the server


class Server:
    """Forks a child for every client."""

    def __init__(self, address: str, level: str) -> None:
        for name in LEVELS[level]:
            importlib.import_module(name)
        self.level, self.switches = level, switches(dict(os.environ))
        self.events = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen()
        self.events.register(self.listener, selectors.EVENT_READ, self.accept)
        self.events.register(sys.stdin, selectors.EVENT_READ, self.end)
        self.clients: dict[int, socket.socket] = {}  # by the child's process

    def serve(self) -> dict[str, Any]:
        """Returns in children alone, what each is to be."""
        print("ready", flush=True)
        while True:
            for key, _ in self.events.select():
                request = key.data()
                if request:
                    return request

    def accept(self) -> dict[str, Any] | None:
        client, _ = self.listener.accept()
        head, files, _, _ = socket.recv_fds(client, 8, 3)
        body = b""
        while len(body) < int(head):
            body += client.recv(int(head) - len(body))
        request = json.loads(body)
        pid = os.fork()
        if not pid:
            self.listener.close()
            self.events.close()
            for other in (client, *self.clients.values()):
                other.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            if self.level != "torch" and switches(request["environment"]) != self.switches:
                print("tests/forked.py: switches differ that were read at import: ask for `torch`", file=sys.stderr)
                os._exit(1)
            return request
        for file in files:
            os.close(file)
        self.clients[pid] = client
        done = os.pidfd_open(pid)
        self.events.register(client, selectors.EVENT_READ, functools.partial(os.kill, pid, signal.SIGKILL))
        self.events.register(done, selectors.EVENT_READ, functools.partial(self.reap, pid, done))
        client.sendall(f"{pid:8}".encode())
        return None

    def reap(self, pid: int, done: int) -> None:
        """Tell the client how its child ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client = self.clients.pop(pid)
        for file in (client, done):
            self.events.unregister(file)
        os.close(done)
        with contextlib.suppress(OSError):  # it was killed
            client.sendall(f"{code:8}".encode())
        client.close()

    def end(self) -> NoReturn:
        """The process that asked for the server is gone."""
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def switches(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(SWITCHES)}


def become(request: dict[str, Any]) -> NoReturn:
    """Do what `python ARGUMENTS` would do in a fresh process, and end as it does, but that modules are not taken apart."""
    code = 1
    with contextlib.suppress(OSError):  # a group of another session
        os.setpgid(0, request["group"])
    try:
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        _run(*request["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    ctypes.CDLL(None).exit(code & 0xFF)  # libraries see the end of the process
    os._exit(code & 0xFF)


def _run(what: str, *arguments: str) -> None:
    """`-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`; `-u` before it is for those who use files by number, and ignored."""
    if what == "-u":
        return _run(*arguments)
    first = os.getcwd() if what == "-m" else "" if what == "-c" else str(Path(what).parent)
    more = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in sys.path]
    sys.path[:] = [first, *more, *sys.path[1:]]
    if what == "-m":
        sys.argv = [*arguments]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = [what, *arguments[what == "-c" :]]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    text, name = (arguments[0], "<string>") if what == "-c" else (Path(what).read_text(), what)
    if what != "-c":
        module.__file__ = what
    exec(compile(text, name, "exec"), module.__dict__)


if __name__ == "__main__":
    become(Server(*sys.argv[1:]).serve())
