"""One way to take a training step, ours or the published codes': made, fitted into memory, timed.

`bench step` holds several in one process and lets them take turns; on a GPU each lives in a worker (harness/worker.py), which
`answer`s: load, fit, turns.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.harness.worker import out_of_memory
from bench.training import baseline, runs
from bench.training.networks import saved_bytes
from cmt_fast.engine import compile as compiled

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
RARELY = 4  # of so many turns, one for a round of trajectories and for what is slow and known to lose
SLACK_BYTES = 2**26  # that a process may hold beside what it held before a step ran out of memory


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """ms of one call, and ms until it returned: on a GPU work is still under way then."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - start),) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    call()
    host = 1e3 * (time.perf_counter() - start)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last), host


def held_bytes(device: str) -> int:
    """Bytes of live tensors on the GPU; 0 on a CPU, which does not say."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


class Contender:
    """One way to take a step: what is called, what a round of trajectories adds to every step, and what was measured."""

    def __init__(self, how: str, precision: str, step: Callable, net: torch.nn.Module, teacher: float = 0.0) -> None:
        self.how, self.precision, self.step, self.net, self.teacher = how, precision, step, net, teacher
        self.rare = False
        self.graph = getattr(step.stage, "cuda_graph", False) is True  # whether it is replayed
        stream = getattr(step.stage, "precision", "") == "bf16-stream"
        self.more = [name for name, on in (("graph", self.graph), ("stream", stream)) if on]
        self.ms: dict[int, float] = {}  # by turn
        self.host_ms: list[float] = []
        self.rounds_ms: list[float] = []
        self.peak_gb: float | None = None
        self.saved: int | None = None
        self.compile_s: float | None = None
        self.guarded: str | None = None

    @property
    def pool(self) -> Any:
        return getattr(self.step, "pool", None)

    def warm(self, device: str, alone: bool = False) -> None:
        """First calls, with their memory. alone: nothing else is in this process, so its peak is this one's."""
        if self.pool:
            self.step.fill()
        self.saved = saved_bytes(self.step.loss, self.net)
        for _ in range(4 if self.graph else 1):  # the first is eager, two are spent on proofs
            self.step()
        if device != "cuda":
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if self.pool:
            self.step.fill()
        self.step()
        torch.cuda.synchronize()
        weights = sum(p.nbytes for p in self.net.parameters())
        held = (4 + len(self.step.stage.ema)) * weights + (weights if self.teacher else 0)
        peak = torch.cuda.max_memory_allocated()
        self.peak_gb = (peak if alone else held + peak - before) * 1e-9
        if self.graph:  # whose memory is reserved and not allocated
            self.peak_gb = torch.cuda.max_memory_reserved() * 1e-9 if alone else None

    def compile(self, name: str) -> None:
        """The first step of a compiled stage, timed, then its guard. Raises CompileError."""
        if self.pool:
            self.step.fill()
        begun = time.perf_counter()
        self.step()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.compile_s = time.perf_counter() - begun
        compiled.guard(self.step.engine, self.step.loss, name)
        self.guarded = "value and tangent agree with the eager network's"

    def turn(self, i: int, device: str) -> None:
        """Time one step, and now and then a round."""
        if self.rare and i % RARELY:
            return
        if self.pool and i % RARELY == 0:
            self.rounds_ms.append(timed(self.step.fill, device)[0])
        ms, host = timed(self.step, device)
        self.ms[i] = ms + (self.rounds_ms[-1] / self.pool.steps if self.pool else 0.0)
        self.host_ms.append(host)


def ours(
    name: str, m: runs.Model, work: runs.Bench, how: str, precision: str, points: int | None, share: Any = None,
    more: Sequence[str] = (),
) -> Contender:  # fmt: skip
    """The trainer's step. share: a step whose buffers it takes over; more: as of runs.stage_of."""
    step = runs.Ours(work, name, runs.stage_of(work, name, m, precision, how == "compiled", points, more), share)
    calls = step.pool.teacher_forwards if step.pool else float(name == "ECD")
    return Contender(how, precision, step, step.engine.net, calls)


def theirs(name: str, m: runs.Model, work: runs.Bench, precision: str) -> Contender:
    """The published codes' step."""
    stage = runs.stage_of(work, name, m, "fp32", False, None)
    teaches = name.startswith("CMT") or name == "ECD"
    teacher = torch.nn.Identity()
    if teaches:
        teacher = baseline.plain(work.network("teacher")).requires_grad_(False).eval()
    net = baseline.plain(work.build()).to(work.device)
    data = baseline.Rows(work.data.x.to(work.device), work.data.labels.to(work.device), work.data.classes)
    return Contender("peer", precision, baseline.Step(stage, net, teacher, data, precision), net, float(teaches))


# ------------------------------------------------------------------------------------------------- in a worker


def answer(state: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
    """load: make the contender of an objective. fit: one batch, or what is left of it. turns: times of some steps."""
    return {"load": load, "fit": fit, "turns": turns}[message.pop("do")](state, **message)


def load(
    state: dict[str, Any], objective: str, model: list, how: str, precision: str, device: str, points: int | None,
    more: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Its networks and state; what was there goes first. still_gb: what did not go."""
    state.clear()
    free(device)
    torch._dynamo.reset()
    left, begun = held_bytes(device), time.perf_counter()
    m = runs.Model(*model)
    work = runs.workspace(objective, m, device)
    if how == "peer":
        one, work.teacher = theirs(objective, m, work, precision), None  # it has its own copy
    else:
        one = ours(objective, m, work, how, precision, points, more=more)
    free(device)
    state |= {"one": one, "name": objective, "m": m, "work": work, "device": device, "held": held_bytes(device)}
    return {"still_gb": left * 1e-9, "held_gb": state["held"] * 1e-9, "load_s": time.perf_counter() - begun}


def free(device: str) -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def fit(state: dict[str, Any], batch: int, points: int | None = None) -> dict[str, Any]:
    """Take steps of `batch` rows, or of half, a quarter, ... of them where memory runs out.

    `failed` with `batch` where what ran out cannot be freed: that batch then needs a fresh process.
    """
    one, tried = state["one"], []
    while True:
        why = attempt(state, batch, points)
        if why is None:
            return {"batch": batch, "tried": tried, "peak_gb": one.peak_gb, "saved": one.saved,
                    "teacher": one.teacher, "compile_s": one.compile_s, "guarded": one.guarded, "more": one.more}  # fmt: skip
        tried.append(batch)
        release(one)
        free(state["device"])
        batch //= 2
        if batch < (16 if state["name"].startswith("CMT") else 1):
            return {"failed": f"no batch fits: {why}", "memory": True, "usable": False}
        if held_bytes(state["device"]) > state["held"] + SLACK_BYTES:
            return {"failed": why, "memory": True, "usable": False, "batch": batch}


def attempt(state: dict[str, Any], batch: int, points: int | None) -> str | None:
    """None if steps of `batch` rows fit; else what the allocator said. The exception, with all that its frames hold, is
    gone when this returns."""
    one, m = state["one"], state["m"]._replace(batch=batch)
    try:
        stage = runs.stage_of(state["work"], state["name"], m, one.precision, one.how == "compiled", points, one.more)
        if one.how == "peer":
            one.step.stage = dataclasses.replace(stage, precision="fp32")
        else:
            one.step.take(stage)
            one.teacher = one.step.pool.teacher_forwards if one.pool else one.teacher
        if one.how == "compiled":
            one.compile(state["name"])
        one.warm(state["device"], alone=True)
        one.ms, one.host_ms, one.rounds_ms = {}, [], []
        state["batch"] = batch
        return None
    except Exception as error:
        if not out_of_memory(error):
            raise
        return " ".join(str(error).split())[:200]


def release(one: Contender) -> None:
    """Drop what a step that failed left: gradients, rows, rounds of trajectories."""
    if one.how == "peer":
        one.step.optimizer.zero_grad(set_to_none=True)
    else:
        one.step.engine.g.zero_()
        one.step.source = one.step.pool = one.step.gradient = None


def turns(state: dict[str, Any], least: int, most: int, seconds: float, square: int) -> dict[str, Any]:
    """Times of steps, a square matmul of the step's precision after each: ms by turn, of the host, of rounds, of matmuls."""
    one, device = state["one"], state["device"]
    if "square" not in state:
        state["square"] = torch.randn(square, square, device=device).to(PRECISIONS[one.precision])
    a, squares, first, end = state["square"], [], len(one.ms), time.perf_counter() + seconds
    timed(lambda: a @ a, device)
    timed(one.step, device)  # it allocates what the end of the last round gave back
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        one.turn(first + i, device)
        squares.append(timed(lambda: a @ a, device)[0])
    free(device)  # another process may want it while this one waits
    return {"ms": list(one.ms.values())[first:], "host_ms": one.host_ms[first:], "rounds_ms": one.rounds_ms,
            "square_ms": squares, "pool_steps": one.pool.steps if one.pool else None}  # fmt: skip
