"""Signals that ask a process to stop: SIGTERM, SIGINT, SIGUSR1, SIGHUP.

Training, and samples on their way to disk, note a signal (`noted`) and answer it where nothing is lost: after a step, and at
every `look` between the batches of an evaluation or the parts of a round of rollouts. There a second signal changes nothing.

Everything else (`heard`, around every command) has nothing to save. The first signal is raised as a KeyboardInterrupt, so that
what is open is closed; the second ends the process at once, and so does the first after PATIENCE_S seconds: a handler of
Python's waits for the call that the main thread is in, which may be one to a rank that is dead. So one thread hears of signals
by the file that the system's own handler writes to (`signal.set_wakeup_fd`). Until a command is at work (`starting`) the first
ends it at once: an exception within an import would leave half a module.

Nothing here imports torch when it is imported: `cmt --help` hears signals too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from cmt_fast.runtime import exits, once

KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE_S = 10.0  # from a signal that nobody noted to the end
BEREFT_S = 10.0  # from torchrun's SIGTERM, where another rank has told its error, to the end of one that trains

_ending = threading.Lock()  # taken by who ends the process
_noting: list[list[int]] = []  # of `noted`, innermost last
_hearing: _Hearing | None = None  # of the command that this process runs


class Stopped(SystemExit):
    """The process was asked to stop, and did so where nothing is lost. Exit code 128 + signal.

    left: what is said of that.
    """

    def __init__(self, code: int, left: str = "a checkpoint is on disk") -> None:
        super().__init__(code)
        self.left = left


class Interrupted(KeyboardInterrupt):
    """A signal that nobody noted."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def code_of(error: KeyboardInterrupt) -> int:
    """The exit code of a process that ends by it."""
    return exits.SIGNAL + getattr(error, "number", signal.SIGINT)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Inside: signals are noted in the list instead of ending the process. Those that were ignored stay so: SIGHUP under nohup,
    SIGINT of what a script has put in the background."""
    asked: list[int] = []
    kinds = [kind for kind in KINDS if signal.getsignal(kind) != signal.SIG_IGN]

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _no_terminal()
        asked.append(number)
        if len(asked) == 1 and once.rank() == 0:
            _write(f"cmt: {_name(number)}: stops where nothing is lost\n")

    before = {kind: signal.signal(kind, note) for kind in kinds}
    _noting.append(asked)
    try:
        yield asked
    finally:
        _noting.pop()
        for kind, handler in before.items():
            signal.signal(kind, handler)


def wanted() -> bool:
    """Whether this process was asked to stop inside of `noted`: for what one rank does while the others wait for it, who then
    breaks off and lets a `look` of all of them follow."""
    return bool(_noting and _noting[-1])


def look() -> None:
    """Raise Stopped, on all ranks alike, where one of them was asked to stop; nothing outside of `noted`.

    A collective call: between two batches of work that all ranks do in step, and that nothing is lost of.
    """
    if not _noting:
        return
    from cmt_fast.runtime import distributed

    stop = distributed.largest(_noting[-1][0] if _noting[-1] else 0)
    if stop:
        raise Stopped(exits.SIGNAL + stop, "nothing is lost")


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Inside, of a command: the first signal raises Interrupted, the second ends the process at once. Signals that are ignored
    stay so. Only in the main thread, and once: within another `heard` and in other threads it does nothing."""
    global _hearing
    if _hearing is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _hearing = _Hearing()
    try:
        yield
    finally:
        found, _hearing = _hearing, None
        found.end()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Inside: the first signal ends the command at once."""
    hearing = _hearing
    if hearing is None:
        yield
        return
    hearing.at_once = True
    try:
        yield
    finally:
        hearing.at_once = False


def unanswered() -> int:
    """A signal that this command was sent and that nobody noted; 0 for none: an error may be no more than its echo."""
    return _hearing.first if _hearing else 0


def last_words() -> None:
    """Of a process that is about to end: from now on every signal ends it, without a word of the interpreter's."""
    for kind in KINDS:
        if signal.getsignal(kind) != signal.SIG_IGN:
            signal.signal(kind, lambda number, _: os._exit(exits.SIGNAL + number))


class _Hearing:
    """The handlers of a command, and the thread that hears of signals while the main thread is in a call."""

    def __init__(self) -> None:
        self.first, self.at_once, self._ended = 0, True, threading.Event()
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        self._wakeup = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        kinds = [kind for kind in KINDS if signal.getsignal(kind) != signal.SIG_IGN]
        self._before = {kind: signal.signal(kind, self._handle) for kind in kinds}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
        threading.Thread(target=self._hear, name="signals", daemon=True).start()
        self.at_once = False  # an exception may be raised from here on

    def end(self) -> None:
        """Hear no more; the handlers are those of before."""
        self._ended.set()
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        os.close(self._writes)  # which the thread sees

    def forget(self) -> None:
        """Of a child that was forked: its signals are no business of its parent's."""
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        signal.set_wakeup_fd(-1)
        sys.unraisablehook = self._hook
        for file in (self._reads, self._writes):
            os.close(file)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _no_terminal()
        if number == signal.SIGTERM and once.told():
            os._exit(exits.DONE)
        if self.at_once or self.first:
            end_at_once(number)
        self.first = number
        raise Interrupted(number)

    def _lost(self, what: Any) -> None:
        """An Interrupted that came up where exceptions end, as in a finalizer."""
        if isinstance(what.exc_value, Interrupted):
            end_at_once(what.exc_value.number)
        self._hook(what)

    def _hear(self) -> None:
        """One byte a signal. Nothing is done here that the main thread does in time."""
        came = 0
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self._reads, 1):
                number = data[0]
                if number not in self._before:
                    continue
                if _noting:
                    if number == signal.SIGTERM:
                        threading.Thread(target=self._bereft, name="signals", daemon=True).start()
                    continue
                came += 1
                if came > 1 or self.at_once:
                    end_at_once(number)
                threading.Thread(target=self._late, args=(number,), name="signals", daemon=True).start()
        with contextlib.suppress(OSError):
            os.close(self._reads)

    def _late(self, number: int) -> None:
        if not self._ended.wait(PATIENCE_S):
            end_at_once(number)

    def _bereft(self) -> None:
        """torchrun ends what is left after a rank has failed: who is in a collective call then waits for one that is gone."""
        if not self._ended.wait(BEREFT_S) and once.told():
            os._exit(exits.DONE)


def _forked() -> None:
    global _hearing
    found, _hearing = _hearing, None
    if found:
        found.forget()


os.register_at_fork(after_in_child=_forked)


def end_at_once(number: int) -> None:
    """End the process: no exception, no finalizer, nothing of the interpreter's. One line by the first rank, and by the first of
    the threads that hear of the same signal."""
    if not _ending.acquire(blocking=False):
        time.sleep(1.0)  # which the other one ends
    elif once.rank() == 0:
        _write(f"{SHOWN_CURSOR if _terminal(2) else ''}cmt: {words(number)}\n")
    os._exit(exits.SIGNAL + number)


SHOWN_CURSOR = "\x1b[?25h"  # which a bar may have hidden


def words(number: int) -> str:
    """Of the line of a command that a signal ended."""
    return "interrupted" if number == signal.SIGINT else f"ended by {_name(number)}"


def _name(number: int) -> str:
    return signal.Signals(number).name


def _write(text: str) -> None:
    """To stderr, past Python's buffer, which whom the signal met may be writing to."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


_terminals = {file for file in (1, 2) if os.isatty(file)}  # as the process began


def _terminal(file: int) -> bool:
    return file in _terminals and os.isatty(file)


def _no_terminal() -> None:
    """Where the terminal was closed, what is printed from now on goes nowhere: written to it, it would be an error."""
    for file in _terminals:
        if not os.isatty(file):
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, file)
                os.close(nowhere)
