"""Memory that a step on a CPU has freed stays with the process for the next step.

By default glibc gives the top of its heap back to the system after every step, and large blocks at once; the next step gets
them again page by page, each zeroed by the kernel. Nothing about numbers changes: torch aligns every tensor itself.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt, malloc.h
KEPT_BYTES = 2**31 - 1  # at most so much free memory at the heap's top is kept: an int's largest


def keep_freed() -> bool:
    """Let this process keep freed memory. False where the C library is not glibc: nothing is changed there."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
