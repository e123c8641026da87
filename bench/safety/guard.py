"""An audit hook that says what reading a file did besides reading: executed, imported, wrote, started, connected.

Python reports such events to every hook before they happen, whoever asks for them, a library too. Inside `watched` each one
that reading needs not raises Forbidden, and is kept: an `except Exception` on the way cannot hide it. Code is executed
lawfully where a module of the machine is imported, late as most are here; a module's name out of the file that is read would
be one that is not on this machine, or a canary.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import sysconfig
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CANARY = "cmt_canary"  # a module that files name and nobody imports
NEVER = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.", "socket.", "urllib.",
    "http.", "ftplib.", "smtplib.", "telnetlib.", "webbrowser.", "pickle.find_class", "code.__new__", "ctypes.", "os.putenv",
    "os.unsetenv", "sys.addaudithook", "sys.settrace", "sys.setprofile", "setopencodehook",
)  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
           "os.utime", "shutil.", "tempfile.", "os.setxattr", "os.removexattr")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ROOT = Path(__file__).parents[2]
TRUSTED = tuple({str(ROOT), sys.prefix, sys.base_prefix, *filter(None, sysconfig.get_paths().values())})


class Forbidden(BaseException):
    """Reading a file did more than reading."""


class _Watch:
    """Whether events are looked at now, where writing is allowed, and what was seen."""

    on = False
    installed = False
    scratch = ""
    seen: list[str] = []


def verdict(event: str, arguments: tuple[Any, ...], scratch: str) -> str:
    """What is wrong with an event; "" for one that reading needs."""
    if event.startswith(NEVER):
        return event
    if event == "import" and str(arguments[0]).split(".")[0] == CANARY:
        return f"import of {arguments[0]}"
    if event == "exec" and not _lawful(arguments[0]):
        return f"exec of {getattr(arguments[0], 'co_filename', arguments[0])}"
    if event == "open" and _writes(arguments[1], arguments[2]) and not _inside(arguments[0], scratch):
        return f"open of {arguments[0]} for writing"
    if event.startswith(CHANGES):
        within = (
            event in ("os.remove", "os.rmdir") and arguments[-1] >= 0
        )  # a handle of the folder, as shutil.rmtree has one
        folder = os.readlink(f"/proc/self/fd/{arguments[-1]}") if within else ""
        if not all(_inside(os.path.join(folder, a), scratch) for a in arguments if isinstance(a, (str, Path))):
            return f"{event} of {arguments[0]}"
    return ""


def _lawful(code: Any) -> bool:
    """Whether it is the code of a module on this machine, on its way in by an import, or a type that our source writes down."""
    frame: Any = sys._getframe()
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            name = getattr(code, "co_filename", "")
            return name.startswith(("<", *TRUSTED))  # namedtuples and dataclasses write some of their own code
        if frame.f_code.co_name == "_evaluate" and frame.f_code.co_filename == typing.__file__:
            return frame.f_locals["self"].__forward_arg__ in _annotations()
        frame = frame.f_back
    return False


@functools.cache
def _annotations() -> set[str]:
    """Every annotation of the schema's classes as it is written: what `get_type_hints` evaluates."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("cmt_fast.")]
    held = [c for m in modules for c in vars(m).values() if isinstance(c, type)]
    return {text for c in held for text in vars(c).get("__annotations__", {}).values() if isinstance(text, str)}


def _writes(mode: Any, flags: Any) -> bool:
    return bool(set(str(mode or "")) & set("wax+")) or bool(isinstance(flags, int) and flags & WRITES)


def _inside(path: Any, scratch: str) -> bool:
    if isinstance(path, int):  # a handle: it was opened before
        return True
    return os.path.abspath(os.fsdecode(path)).startswith(scratch) if scratch else False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _Watch.on:
        return
    _Watch.on = False  # what is done to judge is not judged
    try:
        wrong = verdict(event, arguments, _Watch.scratch)
        if wrong:
            _Watch.seen.append(wrong)
            raise Forbidden(wrong)
    finally:
        _Watch.on = True


@contextlib.contextmanager
def watched(scratch: Path) -> Iterator[None]:
    """Inside: only files in `scratch` may be written or changed, and nothing may run. Raises Forbidden, at its end at last."""
    if not _Watch.installed:
        sys.addaudithook(_hook)  # for the life of the process; it does nothing outside
        _Watch.installed = True
    _Watch.scratch, _Watch.seen = os.path.abspath(scratch) + os.sep, []
    _Watch.on = True
    try:
        yield
    finally:
        _Watch.on = False
    if _Watch.seen:
        raise Forbidden(_Watch.seen[0])
