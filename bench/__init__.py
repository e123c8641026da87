"""Measurements: `python -m bench`. What every bench shares: the clock, the machine's name and roof, the result file."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from cmt_kernels import assembler

ROOT = Path(__file__).parent.parent
CARDS = ("h100", "h200", "a100")


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this tree: what a carried copy says of itself (CMT_COMMIT; COMMIT, by bench/kit.py), else what git says."""
    carried = ROOT / "COMMIT"
    said = os.environ.get("CMT_COMMIT") or (carried.read_text() if carried.exists() else "")
    if not said and shutil.which("git"):
        described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
        said = subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout
    return said.strip() or None


def about(device: str) -> dict[str, Any]:
    """What a number is worthless without."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "assembler": str(assembler.choose(assembler.card())) if device == "cuda" else None,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(device: str, name: str) -> str:
    """The folder of a device's results: "cpu", "h100" for every H100, another card by its whole name."""
    if device == "cpu":
        return "cpu"
    return next((c for c in CARDS if c in name.lower()), re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))


def write_json(path: Path, content: Any) -> None:
    """Replace a file as a whole: who is killed meanwhile leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    scratch.replace(path)


def save(kind: str, device: str, results: dict[str, Any], path: Path | None = None) -> Path:
    """Write results as JSON: to the path given, else $OUT/<kind>.json where OUT is set, else
    bench/results/<device>/<date>-<kind>.json."""
    if path is None and os.environ.get("OUT"):
        path = Path(os.environ["OUT"]) / f"{kind}.json"
    elif path is None:
        folder = ROOT / "bench" / "results" / slug(device, results["device"])
        path = folder / f"{results['date'][:16].replace(':', '')}-{kind}.json"
    write_json(path, results)
    return path


class Results:
    """A result file that is whole on disk after every row, so that a bench that is killed leaves what it measured.

    `not_measured` names what it was asked for and has not come to: all of it at first, so that it holds whenever it ends.
    """

    def __init__(self, kind: str, device: str, path: Path | None = None, **more: Any) -> None:
        self.data: dict[str, Any] = about(device) | more | {"not_measured": [], "rows": []}
        self.path = save(kind, device, self.data, path)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.write()

    def add(self, *rows: dict[str, Any]) -> None:
        """Append rows."""
        self.data["rows"] += rows
        self.write()

    def plan(self, names: Iterable[str]) -> None:
        """What is to be measured."""
        self.data["not_measured"] += names
        self.write()

    def done(self, name: str) -> None:
        """It was measured, or has a row that says why it cannot be."""
        if name in self.data["not_measured"]:
            self.data["not_measured"].remove(name)
            self.write()

    def skip(self, name: str, why: str = "") -> None:
        """Say that something is not measured, here and in the file."""
        text = f"{name}: {why}" if why else name
        print(f"not measured: {text}", flush=True)
        missing = self.data["not_measured"]
        self.data["not_measured"] = [x for x in missing if x != name] + [text]
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)


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
