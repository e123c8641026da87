"""The step as a table of our ops: the profiler's events on one side, the calls of ops on the other.

Every event's own time goes to the op whose range is nearest around it, and below an autograd node to the op that made it.
"Between ops" is the rest of a part: reshapes, sums, and networks whose ops are not watched because the stage is compiled.

A rollout that is a CUDA graph calls no op when it is replayed: its kernels belong to the launch of the graph, which no op of
torch is around, and stand in one row. Runtime calls are told by another thread number than ranges, so the range around a
launch is found by time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import cmt_kernels
from cmt_kernels.cases import cases_of
from torch.autograd import DeviceType

from cmt_fast.render.templates import Table

MATMULS = ("attention", "conv2d", "linear")
NODE, RANGE = "autograd::engine::evaluate_function: ", "op "
COMPILED = ("Torch-Compiled Region", "CompiledFxGraph", "CompiledFunction")
ROLLOUT, WAITING = "teacher", "stalled"  # ranges that the meter opens
LAUNCH, GRAPH = ("cudaGraphLaunch", "cuGraphLaunch", "hipGraphLaunch"), "CUDA graph"
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


def table(
    events: Any,
    calls: list[Call],
    seconds: float,
    steps: int,
    round_: int,
    best: dict[str, float] | None,
    cuda: bool,
) -> tuple[list[Row], float]:
    """The rows of a step and its ms. events: of the profiled steps; calls: of ops in them; seconds: the steps' own.

    round_: steps that a rollout is for, over which its time is spread; best: the roof's FLOP/s and bytes/s.
    """
    found = _Found([e for e in events if e.device_type == DeviceType.CPU], calls)
    graphs = _graphs_ms(events) if cuda else {}
    spent: dict[tuple[str, str], float] = {}
    for e in found.events:
        own = graphs.get(e.id, 0.0) if id(e) in found.launches else _own_ms(e, cuda)
        if own:
            key = found.place(e)
            spent[key] = spent.get(key, 0.0) + own
    work = found.work()
    rolled = sum(ms for (part, _), ms in spent.items() if part == "teacher")
    span = len(found.rollouts) * round_ or steps
    per_step = lambda part: span if part == "teacher" else steps
    whole = 1e3 * seconds
    spent[("step", "host and waiting")] = max(0.0, whole - sum(spent.values()))
    step_ms = (whole - rolled) / steps + rolled / span
    rows = []
    for (part, op), ms in spent.items():
        n, w = per_step(part), work.get((part, op), Work())
        least = None
        if best and (w.flops is not None or w.nbytes is not None):
            least = 1e3 * max((w.flops or 0) / best["flop_s"], (w.nbytes or 0) / best["byte_s"])
        flops, nbytes = (None if x is None else x / n for x in (w.flops, w.nbytes))
        roof = None if least is None else least / ms
        rows.append(Row(part, op, w.calls / n, ms / n, ms / n / step_ms, flops, nbytes, roof))
    return sorted(rows, key=lambda row: -row.ms), step_ms


class Work(NamedTuple):
    """What formulas say of an op's calls together; None where there is none."""

    calls: int = 0
    flops: float | None = None
    nbytes: float | None = None

    def plus(self, flops: float | None, nbytes: float | None) -> Work:
        """One more call."""
        add = lambda a, b: a if b is None else (a or 0) + b
        return Work(self.calls + 1, add(self.flops, flops), add(self.nbytes, nbytes))


class _Found:
    """Which op each event belongs to: by ranges around it, and by the nodes that calls made.

    Calls are noted as they end and ranges are sorted as they begin, which is the same order, as no op calls itself.
    """

    def __init__(self, events: list, calls: list[Call]) -> None:
        self.events = events
        ranges = sorted((e for e in events if _is_op(e)), key=lambda e: e.time_range.start)
        queues: dict[str, list[Call]] = {}
        for call in calls:
            queues.setdefault(call.op, []).append(call)
        self.calls: list[tuple[str, Call]] = []  # (part, call)
        self.parts: dict[int, tuple[str, str]] = {}  # of a range: (part, op)
        self.nodes: dict[int, tuple[list[int], list[tuple[int, str]]]] = {}  # thread -> first nodes, (end, op)
        # of a pool's draws those that rolled out; the others took rows of a round that was there
        inside = [above for e in ranges if e.name == RANGE + "solver_step" for above in _up(e)]
        self.rollouts = {id(above) for above in inside if above.name == ROLLOUT}
        self.launches: set[int] = set()  # of a rollout's graph
        teachers = [e for e in events if e.name == ROLLOUT]
        for e in events:
            if e.name.startswith(LAUNCH):
                around = [above for above in teachers if _holds(above, e)]
                self.rollouts |= {id(above) for above in around}
                self.launches |= {id(e)} if around else set()
        for e in ranges:
            op = e.name[len(RANGE) :]
            call = queues[op].pop(0) if queues.get(op) else None
            part = self._part(e, call)
            self.parts[id(e)] = part, op
            if call:
                self.calls.append((part, call))
                starts, ends = self.nodes.setdefault(e.thread, ([], []))
                if call.nodes[1] > call.nodes[0]:
                    starts.append(call.nodes[0])
                    ends.append((call.nodes[1], op))

    def _part(self, e: Any, call: Call | None) -> str:
        for above in _up(e):
            if above.name == ROLLOUT:
                return "teacher" if id(above) in self.rollouts else "no gradient"
            if above.name.startswith(NODE):
                return "recomputed"
        if e.name == RANGE + "adamw_ema":
            return "update"
        return "forward" if call and call.grad else "no gradient"

    def work(self) -> dict[tuple[str, str], Work]:
        """(part, op) -> what its calls had to do; a backward of matmuls is twice the forward of the values."""
        out = {(ROLLOUT, GRAPH): Work(len(self.launches))} if self.launches else {}
        for part, call in self.calls:
            cases, key = cases_of(call.op), (part, call.op)
            out[key] = out.get(key, Work()).plus(cases.flops(call.case), cases.nbytes(call.case, call.itemsize))
            if call.grad and call.nodes[1] > call.nodes[0] and part != "recomputed":
                twice = 2 * cases.flops(replace(call.case, k=None)) if call.op in MATMULS else None
                key = "backward", call.op
                out[key] = out.get(key, Work()).plus(twice, None)
        return out

    def place(self, e: Any) -> tuple[str, str]:
        """(part, op) of an event's own time."""
        if id(e) in self.launches:
            return ROLLOUT, GRAPH
        inside = ""
        for above in _up(e):
            if id(above) in self.parts:
                return self.parts[id(above)]
            if above.name.startswith(NODE):
                return "backward", self._maker(above)
            if above.name == ROLLOUT:
                return ("teacher", "between ops") if id(above) in self.rollouts else ("step", "points of trajectories")
            if above.name == WAITING:
                return "step", "rows"
            inside = inside or ("compiled network" if above.name.startswith(COMPILED) else "")
        return ("forward", inside) if inside else ("step", "between ops")

    def _maker(self, node: Any) -> str:
        if "AccumulateGrad" in node.name:
            return "sum of gradients"
        if any(name in node.name for name in COMPILED):
            return "compiled network"
        starts, ends = self.nodes.get(node.fwd_thread, ([], []))
        i = bisect_right(starts, node.sequence_nr) - 1
        return ends[i][1] if i >= 0 and node.sequence_nr < ends[i][0] else "between ops"


def _up(e: Any) -> Iterator[Any]:
    while e is not None:
        yield e
        e = e.cpu_parent


def _is_op(e: Any) -> bool:
    return e.name.startswith(RANGE) and e.name[len(RANGE) :] in cmt_kernels.OPS


def _holds(e: Any, inner: Any) -> bool:
    return e.time_range.start <= inner.time_range.start and inner.time_range.end <= e.time_range.end


def _graphs_ms(events: Any) -> dict[int, float]:
    """Correlation id of a launch -> ms of the kernels and copies on the device that carry it."""
    out: dict[int, float] = {}
    for e in events:
        if e.device_type != DeviceType.CPU and not getattr(e, "is_user_annotation", False):
            out[e.id] = out.get(e.id, 0.0) + 1e-3 * (e.time_range.end - e.time_range.start)
    return out


def _own_ms(e: Any, cuda: bool) -> float:
    """Of an event alone: its kernels on a GPU, else its time without that of the events in it."""
    if cuda:
        return 0.0 if getattr(e, "is_user_annotation", False) else 1e-3 * sum(k.duration for k in e.kernels)
    return 0.0 if e.name.startswith("ProfilerStep") else 1e-3 * max(0.0, e.self_cpu_time_total)


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
