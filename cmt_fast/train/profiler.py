"""A few steps of a stage under torch's profiler: a trace to look at, and the step as a table of our ops.

    STAGE/profile/trace.json.gz   for chrome://tracing or Perfetto; ops are ranges `op NAME`, rollouts `teacher`
    STAGE/profile/table.md, .json

While it lasts every call of an op is a range and remembers which autograd nodes it made, so the time of a backward node is
its op's. FLOPs and bytes are the formulas of the op's own `cases.py` at the shapes of the calls; a backward is given FLOPs
where it is matmuls, twice the forward's, and no bytes. An op's roof is the longer of its FLOPs at the rate of a matmul and
its bytes at the rate of a copy, both measured in this process in the stage's precision. What fits in a cache can be above
the roof. Times are the device's: on a GPU of its kernels, on a CPU of the calls, inflated by the profiler's own work, most
where calls are short. The numbers that the stage computes are the same with and without.

A step that is one CUDA graph has no ops to see either, so up to the last step that is profiled a stage's steps are eager.
Inside a compiled network there are no ops to see: its kernels have Inductor's names in the trace and one row in the table.
So has a rollout that is one CUDA graph, which is every rollout on a GPU that can be captured.
Where the teacher rolls out for a round of steps, the steps begin with a round and rollouts are spread over its steps.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cmt_kernels
import torch
from cmt_kernels.cases import cases_of
from cmt_kernels.dual import value
from torch.profiler import ProfilerActivity

from cmt_fast.render import templates
from cmt_fast.render.templates import Group, Section
from cmt_fast.runtime.progress import say
from cmt_fast.schedule import Schedule
from cmt_fast.train.profile_table import RANGE, Call, as_table, table

WAIT = 10  # steps before the first that is profiled
LOSSES = ("adamw_ema", "consistency_loss", "meanflow_loss", "path_point", "solver_step")  # called outside the network


class Profile:
    """Profiles `steps` steps of the first stage that it is given, once."""

    def __init__(self, steps: int = 4) -> None:
        self.steps, self.done = steps, False
        self.running = False  # from the stage's first step to the last that is profiled
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
        first, self.running = window(left, steps, round_, plan), True
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
        best, these = roof(device, precision), range(first, first + steps)
        self._write(profiler, seconds, these, round_, best, cuda, folder / "profile")
        self.running = False
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
        self,
        profiler: Any,
        seconds: float,
        steps: range,
        round_: int,
        best: dict[str, float] | None,
        cuda: bool,
        folder: Path,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        rows, step_ms = table(profiler.events(), self._calls, seconds, len(steps), round_, best, cuda)
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
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
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
