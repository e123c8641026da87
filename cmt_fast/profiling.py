"""A few steps of a stage under torch's profiler: a trace to look at, and the step as a table of our ops.

    STAGE/profile/trace.json.gz   for chrome://tracing or Perfetto; ops are ranges `op NAME`, rollouts `teacher`
    STAGE/profile/table.md, .json

While it lasts every call of an op is a range and remembers which autograd nodes it made, so the time of a backward node is
its op's. FLOPs and bytes are the formulas of the op's own `cases.py` at the shapes of the calls; a backward is given FLOPs
where it is matmuls, twice the forward's, and no bytes. An op's roof is the longer of its FLOPs at the rate of a matmul and
its bytes at the rate of a copy, both measured in this process in the stage's precision. What fits in a cache can be above
the roof. Times are the device's: on a GPU of its kernels, on a CPU of the calls, inflated by the profiler's own work, most
where calls are short. The numbers that the stage computes are the same with and without.

Inside a compiled network there are no ops to see: its kernels have Inductor's names in the trace and one row in the table.
Where the teacher rolls out for a round of steps, the steps begin with a round and rollouts are spread over its steps.
"""

from __future__ import annotations

import contextlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cmt_kernels
import torch
from cmt_kernels.cases import cases_of
from cmt_kernels.dual import value
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from cmt_fast import templates
from cmt_fast.log import say
from cmt_fast.stages import Schedule
from cmt_fast.templates import Group, Section, Table

WAIT = 10  # steps before the first that is profiled
LOSSES = ("adamw_ema", "consistency_loss", "meanflow_loss", "path_point", "solver_step")  # called outside the network
MATMULS = ("attention", "conv2d", "linear")
NODE, RANGE = "autograd::engine::evaluate_function: ", "op "
COMPILED = ("Torch-Compiled Region", "CompiledFxGraph", "CompiledFunction")
DASH = "–"


class Call(NamedTuple):
    """One call of an op. nodes: the first autograd node it made and the first after it, counted in its thread."""

    op: str
    grad: bool
    nodes: tuple[int, int]
    case: Any
    itemsize: int


class Row(NamedTuple):
    """An op in one part of a step, per step. flops, nbytes: None where no formula says; roof: share of it reached."""

    part: str
    op: str
    calls: float
    ms: float
    share: float
    flops: float | None
    nbytes: float | None
    roof: float | None


class Profile:
    """Profiles `steps` steps of the first stage that it is given, once."""

    def __init__(self, steps: int = 4) -> None:
        self.steps, self.done = steps, False
        self._calls: list[Call] = []

    def over(
        self,
        left: range,
        plan: Schedule,
        round_: int,
        device: torch.device,
        precision: str,
        compiled: bool,
        folder: Path,
    ) -> Iterator[int]:
        """The steps that are left of a stage, with the profiler on for some of them; writes into folder/profile.

        round_: steps that a rollout is for. Where no run of steps is free of evaluations and checkpoints these are in it.
        """
        self.done = True
        steps = min(self.steps, len(left) - 1)
        if steps < 1:
            say("profile: fewer than two steps are left, nothing was profiled")
            yield from left
            return
        first = window(left, steps, round_, plan)
        yield from range(left.start, first - 1)
        cuda = device.type == "cuda"
        wait = torch.cuda.synchronize if cuda else lambda: None
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
        with contextlib.ExitStack() as ending:
            ops = LOSSES if compiled else cmt_kernels.OPS
            ending.enter_context(cmt_kernels.through(self._watched, device.type, ops))
            profiler = torch.profiler.profile(activities=activities, schedule=schedule, acc_events=True)
            ending.enter_context(profiler)
            yield first - 1  # warms the profiler up
            profiler.step()
            self._calls.clear()
            wait()
            clock = time.perf_counter()
            for step in range(first, first + steps):
                yield step
                if step + 1 < first + steps:
                    profiler.step()
            wait()
            seconds = time.perf_counter() - clock
        self._write(profiler, seconds, range(first, first + steps), round_, roof(device, precision), folder / "profile")
        yield from range(first + steps, left.stop)

    def _watched(self, op: str, function: Callable) -> Callable:
        case_of, node = cases_of(op).case_of, torch.autograd._get_sequence_nr

        def call(*arguments: Any) -> Any:
            before, grad = node(), torch.is_grad_enabled()
            with torch.profiler.record_function(RANGE + op):
                out = function(*arguments)
            after = node()
            y = out[0] if isinstance(out, tuple) and not hasattr(out, "tangent") else out
            self._calls.append(Call(op, grad, (before, after), case_of(*arguments), value(y).element_size()))
            return out

        return call

    def _write(
        self, profiler: Any, seconds: float, steps: range, round_: int, best: dict[str, float] | None, folder: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        rows, step_ms = table(profiler.events(), self._calls, seconds, len(steps), round_, best)
        self._calls.clear()
        shown = as_table(rows, steps, step_ms, round_, best)
        body = {
            "steps": [steps.start, steps.stop - 1],
            "step_ms": step_ms,
            "roof": best,
            "rows": [r._asdict() for r in rows],
        }
        (folder / "table.json").write_text(json.dumps(body, indent=1), "utf-8")
        page = templates.markdown("A step", [Section("", [], [Group([shown], wide=True)])])
        (folder / "table.md").write_text(page, "utf-8")
        templates.show(shown)
        say(str(folder / "trace.json.gz"))


def window(left: range, steps: int, round_: int, plan: Schedule) -> int:
    """The first step to profile: after WAIT, at a round's begin, away from evaluations and checkpoints, as far as can be."""
    every = [n for n in (plan.checkpoint_every, plan.snapshot_every, plan.eval_every, plan.grid_every) if n]
    last = left.stop - steps
    quiet = lambda s: not any((n % e == 0) for n in range(s, s + steps + 1) for e in every) and s < last
    begins = lambda s: s % round_ == 0
    tests = (lambda s: quiet(s) and begins(s), begins, lambda s: True)
    for after in (WAIT, 1):
        for test in tests:
            found = next((s for s in range(left.start + after, last + 1) if test(s)), None)
            if found is not None:
                return found
    raise AssertionError("no step is left")


def roof(device: torch.device, precision: str) -> dict[str, float] | None:
    """FLOP/s of a square matmul in a stage's precision and bytes/s of a copy, read plus written; None without the memory.

    Draws from a generator of its own: the run's random numbers are not touched.
    """
    cuda = device.type == "cuda"
    n, size = (8192, 2**27) if cuda else (768, 2**24)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    wait = torch.cuda.synchronize if cuda else lambda: None

    def best(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            wait()
            start = time.perf_counter()
            call()
            wait()
            times.append(time.perf_counter() - start)
        return min(times[2:])

    try:
        with torch.no_grad():
            a = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
            product = torch.empty_like(a)
            flop_s = 2 * n**3 / best(lambda: torch.mm(a, a, out=product))
            source = torch.ones(size, device=device)
            target = torch.empty_like(source)
            return {"flop_s": flop_s, "byte_s": 2 * source.nbytes / best(lambda: target.copy_(source))}
    except torch.OutOfMemoryError:
        return None


def table(
    events: Any, calls: list[Call], seconds: float, steps: int, round_: int, best: dict[str, float] | None
) -> tuple[list[Row], float]:
    """The rows of a step and its ms. events: of the profiled steps; calls: of ops in them, in order; seconds: they took."""
    events = [e for e in events if e.device_type == DeviceType.CPU]
    ranges = sorted((e for e in events if _is_op(e)), key=lambda e: e.time_range.start)
    made = _made(ranges, calls)
    spent: dict[tuple[str, str], float] = {}
    for e in events:
        own = _own_ms(e)
        if own:
            key = _place(e, made)
            spent[key] = spent.get(key, 0.0) + own
    work: dict[tuple[str, str], list[float | None]] = {}  # calls, flops, bytes
    for call, (part, _) in zip(made.calls, made.parts):
        cases = cases_of(call.op)
        _count(work, (part, call.op), cases.flops(call.case), cases.nbytes(call.case, call.itemsize))
        if call.grad and call.nodes[1] > call.nodes[0]:
            plain = replace(call.case, k=None) if call.op in MATMULS else None
            _count(work, ("backward", call.op), 2 * cases.flops(plain) if plain else None, None)
    # a rollout is for a round of steps: those that began in these steps are spread over theirs
    rolled = sum(1 for e in events if e.name == "teacher") and sum(
        ms for (part, _), ms in spent.items() if part == "teacher"
    )
    fills = -(-steps // round_)
    weigh = lambda part: fills * round_ if part == "teacher" else steps
    whole = 1e3 * seconds
    spent[("step", "host and waiting")] = max(0.0, whole - sum(spent.values()))
    step_ms = (whole - rolled) / steps + rolled / (fills * round_)
    rows = []
    for (part, op), ms in sorted(spent.items(), key=lambda item: -item[1] / weigh(item[0][0])):
        n = weigh(part)
        count, flops, nbytes = work.get((part, op), [0, None, None])
        at_best = None
        if best and ms and (flops is not None or nbytes is not None):
            at_best = 1e3 * max((flops or 0) / best["flop_s"], (nbytes or 0) / best["byte_s"]) / ms
        per = lambda x, n=n: None if x is None else x / n
        rows.append(Row(part, op, count / n, ms / n, ms / n / step_ms, per(flops), per(nbytes), at_best))
    return rows, step_ms


class _Made(NamedTuple):
    """Ranges of ops with their calls, and whose each autograd node is: thread -> (first nodes, (end, op))."""

    ranges: dict[int, int]
    calls: list[Call]
    parts: list[tuple[str, str]]
    nodes: dict[int, tuple[list[int], list[tuple[int, str]]]]


def _made(ranges: list, calls: list[Call]) -> _Made:
    """Calls are remembered as they end and ranges sorted as they begin: matched by op, as ops do not call themselves."""
    queues: dict[str, list[Call]] = {}
    for call in calls:
        queues.setdefault(call.op, []).append(call)
    assert len(ranges) == len(calls), f"{len(ranges)} ranges of {len(calls)} calls"
    matched = [queues[e.name[len(RANGE) :]].pop(0) for e in ranges]
    parts, nodes = [], {}
    for e, call in zip(ranges, matched):
        parts.append((_part(e, call), call.op))
        starts, ends = nodes.setdefault(e.thread, ([], []))
        if call.nodes[1] > call.nodes[0]:
            starts.append(call.nodes[0])
            ends.append((call.nodes[1], call.op))
    return _Made({id(e): i for i, e in enumerate(ranges)}, matched, parts, nodes)


def _part(e: Any, call: Call) -> str:
    above = [a.name for a in _up(e)]
    if "teacher" in above:
        return "teacher"
    if any(name.startswith(NODE) for name in above):
        return "recomputed"
    if call.op == "adamw_ema":
        return "update"
    return "forward" if call.grad else "no gradient"


def _place(e: Any, made: _Made) -> tuple[str, str]:
    """(part, op) of the time of one event: of the nearest op around it, or of the op whose node is run."""
    inside = ""
    for a in _up(e):
        if id(a) in made.ranges:
            return made.parts[made.ranges[id(a)]]
        if a.name.startswith(NODE):
            return "backward", _whose(a, made)
        if a.name == "teacher":
            return "teacher", "between ops"
        if a.name == "stalled":
            return "step", "rows"
        inside = inside or ("compiled network" if a.name.startswith(COMPILED) else "")
    return ("forward", inside) if inside else ("step", "between ops")


def _whose(node: Any, made: _Made) -> str:
    if "AccumulateGrad" in node.name:
        return "sum of gradients"
    if any(name in node.name for name in COMPILED):
        return "compiled network"
    starts, ends = made.nodes.get(node.fwd_thread, ([], []))
    i = bisect_right(starts, node.sequence_nr) - 1
    return ends[i][1] if i >= 0 and node.sequence_nr < ends[i][0] else "between ops"


def _up(e: Any) -> Iterator[Any]:
    while e is not None:
        yield e
        e = e.cpu_parent


def _is_op(e: Any) -> bool:
    return e.name.startswith(RANGE) and e.name[len(RANGE) :] in cmt_kernels.OPS


def _own_ms(e: Any) -> float:
    """Of an event alone: its kernels where there is a GPU, else its time without that of the events in it."""
    if torch.cuda.is_available():
        return 0.0 if e.is_user_annotation else 1e-3 * sum(k.duration for k in e.kernels)
    return 0.0 if e.name.startswith("ProfilerStep") else 1e-3 * max(0.0, e.self_cpu_time_total)


def _count(work: dict, key: tuple[str, str], flops: float | None, nbytes: float | None) -> None:
    count, f, b = work.get(key, [0, None, None])
    add = lambda x, y: x if y is None else (x or 0) + y
    work[key] = [count + 1, add(f, flops), add(b, nbytes)]


def as_table(rows: list[Row], steps: range, step_ms: float, round_: int, best: dict[str, float] | None) -> Table:
    """For the terminal and the page."""
    text = lambda x, form: DASH if x is None else format(x, form)
    cells = [
        [r.part, r.op, f"{r.calls:.4g}" if r.calls else DASH, f"{r.ms:.3f}", f"{r.share:.1%}",
         text(None if r.flops is None else r.flops * 1e-9, ".3f"), text(None if r.nbytes is None else r.nbytes * 1e-6, ".2f"),
         text(r.roof, ".1%")]
        for r in rows
    ]  # fmt: skip
    by_part: dict[str, float] = {}
    for r in rows:
        by_part[r.part] = by_part.get(r.part, 0.0) + r.share
    note = ", ".join(f"{part} {share:.1%}" for part, share in sorted(by_part.items(), key=lambda item: -item[1]))
    if best:
        note += f". Roof: {best['flop_s'] * 1e-9:,.0f} GFLOP/s of a matmul, {best['byte_s'] * 1e-9:,.1f} GB/s of a copy"
    if any(r.part == "teacher" for r in rows):
        note += f". Rollouts are spread over the {round_} steps that they are for"
    title = f"Steps {steps.start} to {steps.stop - 1}: {step_ms:.2f} ms a step under the profiler"
    return Table(title, ["part", "op", "calls", "ms", "share", "GFLOP", "MB", "of the roof"], cells, f"{note}.", left=2)
