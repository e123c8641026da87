"""The process that reads a pickle: limits on memory, time, files and processes, and an audit hook that ends it at once.

inert.py already runs nothing of the file; this is the second wall. The child imports the standard library and NumPy, then
gives away what it does not need: every audited event (a file opened, a module imported, code compiled, a socket, a
process) besides reading the one file and writing the two results kills it before the event happens.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from cmt_fast.safe_pickle import pickles
from cmt_fast.safe_pickle.opcodes import Refused, shown

MAX_BYTES = 64 << 30  # EDM2-XXL's 1.5 billion numbers of two bytes make 3 GB
REFUSED, TRIED = 3, 77  # exit codes of the child
RESULTS = ("tensors.safetensors", "about.json")
# events of reading and writing itself; "open" is looked at more closely
HARMLESS = {"mmap.__new__", "builtins.id", "object.__getattr__", "sys._getframe"}
PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]; from cmt_fast.safe_pickle import sandbox; sandbox.child(*sys.argv[1:4])"
)


def read(path: Path, out: Path, seconds: int | None = None) -> dict[str, Any]:
    """Read the pickle `path` in a child: RESULTS[0] in the folder `out` gets its tensors; returns its plain data.

    seconds: of CPU time, by default a minute and more for large files. Raises Refused in one line.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise Refused(f"its {size} bytes are more than the {MAX_BYTES} of the largest file that is read")
    seconds = seconds or 60 + size // 20_000_000
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    command = [sys.executable, "-I", "-c", PROGRAM, str(path.resolve()), str(out.resolve()), str(seconds)]
    command += [str(Path(p).resolve()) for p in sys.path if p]
    try:
        done = subprocess.run(
            command,
            env=keep | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=3 * seconds + 60,
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"it was not read within {3 * seconds + 60} seconds") from None
    said = shown(done.stderr.decode("utf-8", "replace").strip(), 300)
    if done.returncode in (REFUSED, TRIED):
        raise Refused(said)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise Refused(f"it needs more than {seconds} s of CPU time or more memory than a file of its size does")
    if done.returncode:
        raise Refused(f"the process that reads it ended with code {done.returncode} ({said})")
    return json.loads((out / RESULTS[1]).read_text("utf-8"))


def child(path: str, out: str, seconds: str) -> None:
    """The child's whole life; never returns."""
    code = 0
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _limit(size, int(seconds))
            sys.addaudithook(_guard({os.path.join(out, name) for name in RESULTS}))
            if not size:
                raise Refused("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                tensors, about = pickles.read(data, size)
                pickles.write(tensors, os.path.join(out, RESULTS[0]))
            with open(os.path.join(out, RESULTS[1]), "wb") as summary:
                summary.write(json.dumps(about).encode())
    except Refused as error:
        code = _say(str(error), REFUSED)
    except MemoryError:
        code = _say("it asks for more memory than a file of its size needs", REFUSED)
    except OSError as error:
        code = _say(f"its tensors could not be written ({error.strerror})", REFUSED)
    os._exit(code)


def _say(line: str, code: int) -> int:
    os.write(2, line.encode("utf-8", "replace"))
    return code


def _guard(files: set[str]):
    """An audit hook that ends the process at the first event that reading a checkpoint does not need."""

    def hook(event: str, arguments: tuple) -> None:
        if event in HARMLESS or (event == "open" and arguments[0] in files):
            return
        os.write(2, f"reading it tried the event {event!r}; the process was ended before it".encode())
        os._exit(TRIED)

    return hook


def _limit(size: int, seconds: int) -> None:
    """No more memory, time, files or processes than a file of `size` bytes needs; no network where the kernel allows that."""
    try:
        import resource
    except ImportError:  # Windows: the audit hook alone
        return
    now = 1 << 30
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as statm:
        now = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = {
        "RLIMIT_AS": now + 3 * size + (512 << 20),
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": 3 * size + (64 << 20),
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, limit in limits.items():
        if hasattr(resource, name):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(getattr(resource, name), (limit, limit))
    if hasattr(os, "unshare"):  # Python 3.12 on Linux
        with contextlib.suppress(OSError):
            os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
