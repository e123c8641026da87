"""Host memory: how much can still be had, and what a step on a CPU has freed stays with the process for the next step.

By default glibc gives the top of its heap back to the system after every step, and large blocks at once; the next step gets
them again page by page, each zeroed by the kernel. Nothing about numbers changes: torch aligns every tensor itself.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

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
