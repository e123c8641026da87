"""Timing by turns, medians and ratios; a machine's measured roof."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch


class Deadline:
    """So many minutes from now; None: no end."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left_s <= 0


@functools.cache
def _flush(device: str) -> torch.Tensor:
    """More than any card's L2 cache holds."""
    return torch.empty(Timer.BYTES, dtype=torch.int8, device=device)


class Timer:
    """ms of one call of `call`: of the wall clock on a CPU; on a GPU of its kernels alone, from a cold L2 cache.

    The GPU is first given a write of 256 MiB, which leaves nothing of the call in its L2 cache, and then a wait until the
    host has issued the whole call: so kernels run one after another from the first event to the last, and no launch is in
    the time. The wait is half as long again as the host took; a call that outlasts it is timed again with a longer one.
    Where that never suffices (a call that waits for the GPU itself) `host_bound` says so. host_ms: what issuing took.
    """

    SHORTEST_MS, LONGEST_MS, CYCLES_MS = 0.1, 60.0, 2_000_000  # of the wait; at no card's clock is it shorter
    BYTES = 2**28

    def __init__(self, call: Callable[[], Any], device: str) -> None:
        self.call, self.gpu, self.wait_ms = call, device == "cuda", self.SHORTEST_MS
        self.host_ms: list[float] = []
        self.host_bound = False
        self.flush = _flush(device) if self.gpu else None

    def __call__(self) -> float:
        if not self.gpu:
            start = time.perf_counter()
            self.call()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(4):
            waited = self.wait_ms
            ms, host = self._queued()
            if host <= waited or waited >= self.LONGEST_MS:
                break
            self.wait_ms = min(1.5 * host, self.LONGEST_MS)
        self.host_bound |= host > waited
        self.host_ms.append(host)
        return ms

    def _queued(self) -> tuple[float, float]:
        """ms between the events, and ms that the host took to issue the call."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.zero_()
        torch.cuda._sleep(int(self.wait_ms * self.CYCLES_MS))
        begun = time.perf_counter()
        first.record()
        self.call()
        last.record()
        host = 1e3 * (time.perf_counter() - begun)
        torch.cuda.synchronize()
        return first.elapsed_time(last), host


def turns(
    calls: dict[str, Callable[[], Any]],
    device: str,
    seconds: float,
    least: int = 5,
    most: int = 500,
    timers: dict[str, Timer] | None = None,
) -> dict[str, list[float]]:
    """Time the calls in turns, so that a drift of the machine meets all of them: ms of each turn of each call."""
    timers = timers or {name: Timer(call, device) for name, call in calls.items()}
    for timer in timers.values():
        timer(), timer()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.quantile(torch.tensor(values, dtype=torch.float64), p).tolist())


def interleave(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float, least: int = 5, most: int = 500
) -> dict[str, dict[str, Any]]:
    """p20, p50, p80 in ms of each call, timed in turns; on a GPU what the host took to issue it, kept apart."""
    timers = {name: Timer(call, device) for name, call in calls.items()}
    times = turns(calls, device, seconds, least, most, timers)
    out = {name: dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles(t))) for name, t in times.items()}
    if device == "cuda":
        for name, timer in timers.items():
            out[name] |= {"host_ms": quantiles(timer.host_ms)[1], "host_bound": timer.host_bound}
    return out


def spread(rows: list[dict[str, Any]]) -> float | None:
    """The median over rows of (p80 - p20) / p50: how far a figure of this bench is to be trusted."""
    found = [(r["p80_ms"] - r["p20_ms"]) / r["p50_ms"] for r in rows if r.get("p50_ms")]
    return quantiles(found)[1] if found else None


def roof(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at its best: GB/s of a copy (read plus written) or a sum, GFLOP/s of a square matmul."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    calls = {"copy": lambda: target.copy_(source), "sum": lambda: source.sum(), "matmul": lambda: a @ a}
    ms = {name: t["p20_ms"] for name, t in interleave(calls, device, seconds=0.5).items()}
    gb_s = max(2 * source.nbytes / ms["copy"], source.nbytes / ms["sum"]) * 1e-6
    return {"gb_s": gb_s, "gflop_s": 2 * n**3 / ms["matmul"] * 1e-6}
