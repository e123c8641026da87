"""Measurements: `python -m bench`. What every bench shares: the clock, the machine's name and roof, the result file."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def device_name(device: str) -> str:
    """The name of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this tree: what a carried copy says of itself (bench/kit.py), else what git says."""
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip() or None
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip() or None


def about(device: str) -> dict[str, Any]:
    """What a number is worthless without."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(kind: str, device: str, results: dict[str, Any], path: Path | None = None) -> Path:
    """Write results as JSON: to the path given, else $OUT/<kind>.json where OUT is set, else
    bench/results/<device>/<date>-<kind>.json."""
    if path is None and os.environ.get("OUT"):
        path = Path(os.environ["OUT"]) / f"{kind}.json"
    elif path is None:
        slug = "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
        path = ROOT / "bench" / "results" / slug / f"{results['date'][:16].replace(':', '')}-{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """A function that times one call in ms. On a GPU: events, after a write that empties the L2 cache."""
    if device != "cuda":

        def seconds(call: Callable[[], Any]) -> float:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)

        return seconds

    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def events(call: Callable[[], Any]) -> float:
        flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    return events


def turns(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float, least: int = 5, most: int = 500
) -> dict[str, list[float]]:
    """Time the calls in turns, so that a drift of the machine meets all of them: ms of each turn of each call."""
    measure = clock(device)
    for call in calls.values():
        measure(call), measure(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            times[name].append(measure(call))
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.quantile(torch.tensor(values, dtype=torch.float64), p).tolist())


def interleave(
    calls: dict[str, Callable[[], Any]], device: str, seconds: float, least: int = 5, most: int = 500
) -> dict[str, dict[str, float]]:
    """p20, p50, p80 in ms of each call, timed in turns."""
    times = turns(calls, device, seconds, least, most)
    return {name: dict(zip(("p20_ms", "p50_ms", "p80_ms"), quantiles(t))) for name, t in times.items()}


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
