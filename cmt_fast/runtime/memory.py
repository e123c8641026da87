"""Memory: how much can still be had, what a step on a CPU has freed stays with the process, and what it means that it ends.

By default glibc gives the top of its heap back to the system after every step, and large blocks at once; the next step gets
them again page by page, each zeroed by the kernel. Nothing about numbers changes: torch aligns every tensor itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import re
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, malloc.h
CGROUP = Path("/sys/fs/cgroup")
KEPT_BYTES = 2**31 - 1  # at most so much free memory at the heap's top is kept: an int's largest


def room() -> int:
    """Bytes of host memory that can still be had: what the system says is available, within the process's control group."""
    found = [_number(Path("/proc/meminfo"), "MemAvailable:") * 1024]
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most, now = (_number(CGROUP / name) for name in (limit, used))
        if most:  # pages of files are given back when memory is asked for
            found.append(most - now + sum(_number(CGROUP / stat, key) for key in ("inactive_file", "active_file")))
    return max(0, min(n for n in found if n)) if any(found) else 0


def _number(path: Path, key: str = "") -> int:
    """The number of a file of the kernel's, or of its line that begins with a key; 0 where there is none."""
    try:
        words = path.read_text("utf-8").split()
        return int(words[words.index(key) + 1] if key else words[0])
    except (OSError, ValueError, IndexError):
        return 0


def keep_freed() -> bool:
    """Let this process keep freed memory. False where the C library is not glibc: nothing is changed there."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


class OutOfMemory(RuntimeError):
    """A stage that the memory of its device, or of its host, does not hold. stage: its name; moment: what was going on."""

    def __init__(self, stage: str, moment: str, why: str) -> None:
        super().__init__(f"{stage}: out of memory in {moment}: {why}")
        self.stage, self.moment, self.why = stage, moment, why


# functions of train/ that are on the stack where memory ends, and what they are to a reader, the innermost first
MOMENTS = {"observe": "an evaluation", "_checkpoint": "a save", "draw": "drawing its rows", "_one": "a step"}
# what libraries say who have no type for it
SAID = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "std::bad_alloc",
)  # fmt: skip


def ran_out(error: BaseException) -> str | None:
    """What an error says where it means that memory has ended, CUDA's or the host's, in one short line; None for others."""
    own = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not own and not isinstance(error, (RuntimeError, OSError)):
        return None
    text = " ".join(str(error).split())
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not own and not refused and not any(said.lower() in text.lower() for said in SAID):
        return None
    asked = re.search(r"you tried to allocate (\d+) bytes", text)
    if asked:
        return f"the host refused {int(asked[1]) / 1e9:.4g} GB"
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)(?:\. (GPU \S+ has a total capacity .*? is free))?", text)
    if asked:
        return f"the device refused {asked[1]}{f' ({asked[2]})' if asked[2] else ''}"
    return text[:160] or type(error).__name__


@contextlib.contextmanager
def named(stage: str) -> Iterator[None]:
    """Where memory ends inside, say of which stage and in what. Raises OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        why = None if isinstance(error, OutOfMemory) else ran_out(error)
        if why is None:
            raise
        calls = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        moment = next((text for name, text in MOMENTS.items() if name in calls), "its start")
        raise OutOfMemory(stage, moment, why) from error


def most(device: torch.device, processes: int) -> int:
    """Bytes that this process could have: what is free and what it has; `processes` of a host share what is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    own = _number(Path("/proc/self/status"), "VmRSS:") * 1024
    return own + room() // processes


def peak(device: torch.device) -> int:
    """The most bytes that this process has held on its device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
