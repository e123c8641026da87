"""What is faster on this processor: timed once, remembered, and compared before anything else is said about a CPU.

Which of two right formulas is faster on a CPU depends on its instructions, its caches and torch's build: bf16 products were
4.2 times as fast as fp32 on one processor and a tenth on another. So a question (`label`) is two calls: what torch does
without being asked (`usual`) and the `other`. They take turns, so that a load beside them meets both, and the answer is the
median of the rounds' ratios. It is kept in `~/.cache/cmt_fast/processor.json` under the processor's model and instructions,
torch's version and its threads; what stands there and is no ratio is timed again.

Both calls are right, they differ in last bits. So `other` is taken only where it is faster by `WORTH`, which noise does not
decide, and whoever needs one set of bits on every machine sets `CMT_PROCESSOR=usual`: then nothing is timed.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cmt_kernels import remembered

FILE = "processor.json"
ROUNDS = 15
WORTH = 1.15  # how many times as fast the other must be
USUAL = "usual"

_known: dict[tuple[str, str], float] = {}  # (machine, label) -> ratio, of this process


def model() -> str:
    """The processor's name."""
    return _line("model name") or platform.processor() or platform.machine()


def machine() -> str:
    """What a ratio is true for: the processor, its instructions, torch and its threads."""
    flags = hashlib.sha256(_line("flags").encode()).hexdigest()[:12]
    able = torch.backends.cpu.get_cpu_capability()
    return f"{model()}, {able}, flags {flags}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _line(name: str) -> str:
    """The first line of this name in /proc/cpuinfo, empty where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, text = line.partition(":")
            if key.strip() == name:
                return text.strip()
    except OSError:
        pass
    return ""


def timed() -> bool:
    """Whether anything may be timed. Raises ValueError for a `CMT_PROCESSOR` that is not known."""
    asked = os.environ.get("CMT_PROCESSOR") or None
    if asked not in (None, USUAL):
        raise ValueError(f"CMT_PROCESSOR names {asked!r}; the choice is {USUAL}")
    return asked is None


def ratio(label: str, usual: Callable[[], object], other: Callable[[], object]) -> float:
    """The usual call's time over the other's, above 1 where the other is faster: remembered, or timed now and kept."""
    here, file = machine(), remembered.path(FILE)
    if (here, label) not in _known:
        found = remembered.read(file, here).get(label, {}).get("ratio")
        if not _sound(found):
            found = measure(usual, other)
            remembered.keep(file, here, label, {"ratio": found})
        _known[here, label] = float(found)
    return _known[here, label]


def measure(
    usual: Callable[[], object], other: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """The median over ROUNDS of the usual call's time over the other's, each first in every second round."""
    ratios = []
    for i in range(-2, ROUNDS):  # two rounds to warm up
        spent = {}
        for call in (usual, other) if i % 2 else (other, usual):
            start = clock()
            call()
            spent[call] = clock() - start
        if i >= 0:
            ratios.append(spent[usual] / max(spent[other], 1e-9))
    return statistics.median(ratios)


def _sound(found: object) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found < math.inf
