"""Meters: a device's time and energy, by what the device was held for. What becomes of it is the bill (bills.py).

    startup      networks, teachers, compilation, checkpoints read; what the process did before its first stage
    train        steps, their teacher's single steps too
    teacher      rollouts of trajectories
    evaluation   figures, grids and snapshots in the course of training; `cmt report` is no stage's and is not billed
    checkpoint   writing them
    stalled      no progress: the device waited for rows, or a kill took what had been done since the last checkpoint

GPU-seconds are seconds times GPUs held; without a GPU core-seconds are counted, seconds times torch's threads. Energy is
NVML's counter of the whole board since its driver was loaded (another program on the same GPU is in it; the rest of the
machine is not), and null where it is unknown, never 0.

A `Meter` counts one process. It asks the clock and the counter where the loop waits for the device anyway, and that
stretch belongs to one phase, to the clock's precision; the counter itself is refreshed every 20 to 100 ms, so the energy
of a stretch shorter than a second is noise, though the sum is not. Parts inside a stretch, rollouts and waiting for rows,
are timed by CUDA events, which wait for nothing, and get their share of the stretch's energy by time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from time import process_time
from typing import Any, NamedTuple

import torch

from cmt_fast.runtime import distributed
from cmt_fast.usage.bills import PHASES, Amount


class Own(NamedTuple):
    """What one process spent: seconds on the wall, processor seconds of all its threads, joules or None where none is known."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    joules: float | None = None

    def plus(self, wall_s: float, cpu_s: float, joules: float | None) -> Own:
        """With more of it."""
        known = [j for j in (self.joules, joules) if j is not None]
        return Own(self.wall_s + wall_s, self.cpu_s + cpu_s, sum(known) if known else None)


class Counter:
    """NVML's energy counter of the GPU that torch calls `device`, found by its UUID. reason: why there is none."""

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], int] | None = None
        self.reason = "no GPU: NVML counts the energy of GPUs alone"
        if device.type == "cuda":
            self.reason = self._open(str(torch.cuda.get_device_properties(device).uuid))

    def _open(self, uuid: str) -> str:
        try:
            import pynvml
        except ImportError:
            return "nvidia-ml-py is not installed: pip install 'cmt-fast[energy]'"
        self._error = pynvml.NVMLError
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            if self._sliced(pynvml, handle):
                return "the GPU is cut into MIG instances, and its energy counter is of all of them together"
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError as error:
            return f"NVML does not count the energy of GPU {uuid}: {error}"
        self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return ""

    @staticmethod
    def _sliced(pynvml: Any, handle: Any) -> bool:
        """CUDA may give an instance its GPU's UUID: only the GPU's mode says so."""
        try:
            return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
        except pynvml.NVMLError:  # a GPU that cannot be cut
            return False

    def read(self) -> int | None:
        """mJ since the driver was loaded; None where it cannot be asked this time."""
        if self._read is None:
            return None
        try:
            return int(self._read())
        except self._error as error:
            self.reason = f"NVML failed at times: {error}"
            return None


class Stream:
    """Marks in a GPU's queue of work: they cost no waiting, and the time between two is the device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Until all that was queued is done."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Seconds, once `wait` has returned."""
        return 1e-3 * start.elapsed_time(stop)


class Clock:
    """The same marks where work is done at once: a clock's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.mark = clock

    def wait(self) -> None:
        """Nothing is queued."""

    def between(self, start: float, stop: float) -> float:
        return stop - start


class Meter:
    """What one process spends, stretch by stretch, from `begun` (Unix time) on. held: GPUs, or cores, of this process.

    own: phase -> all that it has spent so far, over all stages; a part of a stretch has the stretch's processor seconds by time.
    """

    def __init__(
        self, unit: str, held: int, counter: Any, clock: Callable[[], float] | None = None,
        now: Callable[[], float] | None = None, marks: Any = None,
    ) -> None:  # fmt: skip
        """clock: seconds that only go forward; now: Unix time; marks: a Stream or, by default, the clock's."""
        self.unit, self.held, self.counter = unit, held, counter
        self.clock, self.now = clock or time.perf_counter, now or time.time
        self.marks = marks or Clock(self.clock)
        self.own: dict[str, Own] = {}
        self._spent: dict[str, Amount] = {}
        self._parts: list[tuple[str, Any, Any, int]] = []
        self._open: list[int] = []
        self._start, self._energy, self.until = self.clock(), self.counter.read(), self.now()
        self._cpu = process_time()
        self.begun = self.until

    @classmethod
    def of(cls, device: torch.device) -> Meter:
        """The meter of this process on its device."""
        if device.type == "cuda":
            return cls("gpu", 1, Counter(device), marks=Stream(device))
        return cls("core", torch.get_num_threads(), Counter(device))

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A part of the stretch that belongs to another phase; parts may hold parts."""
        index, parent = len(self._parts), self._open[-1] if self._open else -1
        start = self.marks.mark()
        self._parts.append((phase, start, start, parent))
        self._open.append(index)
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            self._open.pop()
            self._parts[index] = (phase, start, self.marks.mark(), parent)

    def lap(self, phase: str) -> float:
        """End a stretch that was `phase`, its parts apart; waits for the device. Returns the stretch's seconds."""
        assert not self._open, "a stretch ends inside a part of it"
        self.marks.wait()
        end, energy, self.until = self.clock(), self.counter.read(), self.now()
        seconds, before, cpu = end - self._start, self._energy, process_time()
        spent_cpu, self._cpu = cpu - self._cpu, cpu
        self._start, self._energy = end, energy
        # a counter that went back was set to zero in between, and nobody knows where it had come to
        joules = None if energy is None or before is None or energy < before else (energy - before) / 1000
        parts = self._own_seconds()
        scale = min(1.0, seconds / whole) if (whole := sum(parts.values())) else 1.0
        rest, rest_joules = seconds, joules
        for part, own in parts.items():
            own *= scale
            share = None if joules is None else joules * own / seconds if seconds else 0.0
            rest -= own
            rest_joules = None if rest_joules is None or share is None else rest_joules - share
            self._add(part, own, share, spent_cpu * own / seconds if seconds else 0.0)
        left = max(0.0, rest)
        cpu_left = spent_cpu * left / seconds if seconds else spent_cpu
        self._add(phase, left, rest_joules if rest_joules is None else max(0.0, rest_joules), cpu_left)
        return seconds

    def _own_seconds(self) -> dict[str, float]:
        """phase -> seconds in its parts without the parts in them."""
        spans = [self.marks.between(start, stop) for _, start, stop, _ in self._parts]
        own: dict[str, float] = {}
        for (phase, _, _, parent), span in zip(self._parts, spans):
            own[phase] = own.get(phase, 0.0) + span
            if parent >= 0:
                own[self._parts[parent][0]] -= span
        self._parts.clear()
        return {phase: max(0.0, seconds) for phase, seconds in own.items()}

    def _add(self, phase: str, seconds: float, joules: float | None, cpu_s: float) -> None:
        self.own[phase] = self.own.get(phase, Own()).plus(seconds, cpu_s, joules)
        if seconds or joules:
            spent = seconds * self.held
            amount = Amount(spent, joules, spent if joules is None else 0.0)
            self._spent[phase] = self._spent.get(phase, Amount()).plus(amount)

    def take(self) -> tuple[dict[str, Amount], int]:
        """What all ranks spent since they were last asked, and what they hold. A collective call."""
        flat = [float(self.held)]
        for phase in PHASES:
            seconds, joules, unmeasured = self._spent.get(phase, Amount())
            flat += [seconds, math.nan if joules is None else joules, unmeasured]
        self._spent, spent = {}, {}
        ranks = distributed.every_rank(flat)
        for i, phase in enumerate(PHASES):
            total = Amount()
            for rank in ranks:
                seconds, joules, unmeasured = rank[3 * i + 1 : 3 * i + 4]
                total = total.plus(Amount(seconds, None if math.isnan(joules) else joules, unmeasured))
            if total != Amount():
                spent[phase] = total
        return spent, round(sum(rank[0] for rank in ranks))
