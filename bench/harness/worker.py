"""A process that measures on request: what crashes, hangs or runs out of memory in it takes nothing else along.

The parent asks by a line of JSON and has one line back (`Worker.ask`); the child is `python -m bench.harness.worker MODULE`,
which answers by `MODULE.answer(state, message)`. It stays in its parent's process group, so that who stops a bench stops
its workers, and ends when its parent does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.harness.results_file import ROOT


class Died(RuntimeError):
    """The process ended before it answered. signal: the number of the signal that ended it, else None."""

    def __init__(self, code: int) -> None:
        self.signal = -code if code < 0 else code - 128 if code > 128 else None
        super().__init__(f"killed by {signal_name(self.signal)}" if self.signal else f"ended with exit code {code}")


class Late(RuntimeError):
    """No answer within the time given; the process was killed."""


class Refused(RuntimeError):
    """The process answered that it could not. memory: for want of memory; usable: whether it can be asked again."""

    def __init__(self, reply: dict[str, Any]) -> None:
        self.reply = reply
        self.memory, self.usable = bool(reply.get("memory")), bool(reply.get("usable", True))
        super().__init__(" ".join(str(reply["failed"]).split())[:300])


def signal_name(number: int) -> str:
    """SIGKILL for 9."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def environment() -> dict[str, str]:
    """This process's, with the sources of this checkout in front."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Worker:
    """A process that answers for `module`. prefix: a command that runs it (a sanitizer)."""

    def __init__(self, module: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        command = [*prefix, *self.python(), module]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | (env or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @staticmethod
    def python() -> list[str]:
        return [sys.executable, "-m", "bench.harness.worker"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.replies.put(line)
        self.replies.put(None)

    def ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer. Raises Died, Late or Refused."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        try:
            line = self.replies.get(timeout=max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))
        except queue.Empty:
            self.kill()
            raise Late(f"no answer in {timeout_s:.0f} s") from None
        if line is None:
            raise Died(self.process.wait())
        reply = json.loads(line)
        if "failed" in reply:
            raise Refused(reply)
        return reply

    def kill(self) -> None:
        """End it now; what it started for itself sees its stdin end."""
        self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let it end by itself, or end it."""
        with contextlib.suppress(BrokenPipeError, OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, of whatever kind, is what was wanting."""
    text = str(error).lower()
    lacking = ("out of memory", "can't allocate memory", "alloc_failed", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in lacking)


def usable() -> bool:
    """Whether CUDA still works here: after an illegal access nothing does."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def serve(module: str) -> None:
    """Answer lines of stdin until it ends. What anything else prints goes to stderr."""
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer, state = importlib.import_module(module).answer, {}
    for line in sys.stdin:
        try:
            content = answer(state, json.loads(line))
        except Exception as error:  # whatever it is goes to who asked
            content = {"failed": f"{type(error).__name__}: {error}", "memory": out_of_memory(error)}
            content["usable"] = usable()
        reply.write(json.dumps(content | {"at": time.time()}) + "\n")
        reply.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    serve(sys.argv[1])
