"""How many bytes a process holds under each ZeRO stage, and the rule that chooses the stage.

Bytes a parameter on each of N processes, T EMA tracks; optimizer state is m, v and the tracks, 8 + 4 T.

    local   4 + 4 + (8 + 4 T)            weights, gradients, optimizer state
    0       4 + 4 + (8 + 4 T) + 4        DeepSpeed's gradients, joined for the optimizer
    1       4 + 4 + (4 + 8 + 4 T) / N    a rank's weights a second time: what its optimizer steps
    2       4 + (4 + 4 + 8 + 4 T) / N
    3       (4 + 4 + 4 + 8 + 4 T) / N

bf16 adds 2 up to stage 2: autocast's copies of the weights, kept until the backward. `peaks` says what that comes to at the
start, in a step, at a save and at an evaluation, with the buckets of communication; the rule goes by the largest of them.
Activations come on top; the rule leaves them the rest of the memory.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import nn

from cmt_fast.runtime import distributed

PHASES = "start", "step", "save", "evaluation"
SHARE = 0.6  # of a process's memory that states may take; activations and buckets get the rest


class Peaks(NamedTuple):
    """The most bytes that one process holds at each phase, its teacher's part too, activations apart.

    start: until the first step; step: a whole optimizer step; save: while a checkpoint is written; evaluation: with the
    averaged network that is judged; rest: what stays between them, without the teacher.
    """

    start: int
    step: int
    save: int
    evaluation: int
    rest: int

    def phases(self) -> dict[str, int]:
        """The peak of each phase, by name."""
        return dict(zip(PHASES, self))


class Buckets(NamedTuple):
    """What DeepSpeed moves at once, in numbers; from the size of the network alone.

    bucket: of gradients that are reduced, weights that are gathered, weights that are fetched ahead; live: of weights that
    stage 3 keeps gathered; whole: smaller parameters are never partitioned by stage 3; group: that stage 3 steps at once.
    """

    bucket: int
    live: int
    whole: int
    group: int


class ShardingPlan(NamedTuple):
    """A ZeRO stage (None: the local engine), whether the teacher is sharded, and the arithmetic behind both.

    state_bytes: a process's weights, gradients, optimizer state and EMA; teacher_bytes: its part of the frozen teacher.
    """

    stage: int | None
    teacher_sharded: bool
    state_bytes: int
    teacher_bytes: int
    memory_bytes: int
    why: str
    peaks: Peaks = Peaks(0, 0, 0, 0, 0)
    buckets: Buckets | None = None

    def lines(self, parameters: int, processes: int) -> list[str]:
        """What is printed at the start."""
        name = "local" if self.stage is None else f"zero, stage {self.stage}"
        teacher = f" + teacher {gb(self.teacher_bytes)}{' (sharded)' if self.teacher_sharded else ''}"
        return [
            f"engine: {name}; {self.why}",
            f"memory: {gb(self.state_bytes)} states{teacher if self.teacher_bytes else ''} a process of "
            f"{gb(self.memory_bytes)}, {parameters:,} parameters on {processes} process{'es' * (processes > 1)}; "
            "activations come on top",
            self.peak_line(),
        ]

    def peak_line(self) -> str:
        """The most that a process holds at each phase, and what DeepSpeed moves at once."""
        each = ", ".join(f"{phase} {gb(n)}" for phase, n in self.peaks.phases().items())
        cut = self.buckets
        moved = f"; buckets of {cut.bucket:,} numbers, {cut.live:,} live" if cut and self.stage else ""
        return f"peak: {each} a process without activations{moved}"


class StageSize(NamedTuple):
    """What a stage trains and holds: parameters of its network and of its frozen teachers (0 without), EMA tracks.

    largest: numbers of the largest parameter; remade: of weights that a forward makes anew and keeps for its backward, as
    EDM2 its unit weights; small: of all parameters that stage 3 never partitions.
    """

    parameters: int
    teacher_parameters: int
    tracks: int
    bf16: bool
    largest: int = 0
    remade: int = 0
    small: int = 0


def state_bytes(stage: int | None, parameters: int, processes: int, tracks: int, bf16: bool) -> int:
    """Bytes of weights, gradients, optimizer state and EMA tracks on one process: the table above."""
    moments, cast = 8 + 4 * tracks, 2 if bf16 else 0
    each = {
        None: 8 + moments + cast,
        0: 12 + moments + cast,
        1: 8 + (4 + moments) / processes + cast,
        2: 4 + (8 + moments) / processes + cast,
        3: (12 + moments) / processes,
    }[stage]
    return int(each * parameters)


def measure(net: nn.Module) -> StageSize:
    """The size of a network, which may be one without memory; without teachers, tracks and precision."""
    every = [p.numel() for p in net.parameters()]
    remade = sum(p.numel() for m in net.modules() if hasattr(m, "scaled") for p in m.parameters(recurse=False))
    cut = buckets(sum(every), max(every))
    return StageSize(sum(every), 0, 0, False, max(every), remade, sum(n for n in every if n <= cut.whole))


def buckets(parameters: int, largest: int) -> Buckets:
    """DeepSpeed's own defaults (5e8, 1e9, 1e5, 1e9), but a sixteenth of the network where that is less, and room for its
    largest parameter.
    """
    part = max(-(-parameters // 16), largest)
    part += part % 2  # DeepSpeed wants an even number
    return Buckets(min(part, 5 * 10**8), min(part, 10**9), min(parameters // 10**4, 10**5), 10**9)


def peaks(stage: int | None, size: StageSize, processes: int, sharded: bool = False) -> Peaks:
    """The most that one of `processes` holds under a ZeRO stage (None: the local engine), in bytes, without activations.

    In numbers, of P parameters on N processes with T tracks, buckets of b and a largest parameter of l:

        local   rest (4 + T) P              step + l                             evaluation + 0
        0            (3 + T) P                   + 2 P, DeepSpeed's and joined         + 0
        1, 2         P + (3 + T) P/N             + max(P + b, 2 P/N), 2 without b      + P, the averaged network
        3            (5 + T) P/N + b             + max(P/N, 3 l + 2 b)                 + P

    The start of stages 1 and 2 is at least 2 P, while DeepSpeed joins the weights; a save holds one whole tensor. Weights
    that a forward makes anew and keeps count where they and a gradient are more, and so does autocast's copy.
    bench/training/ranks.py measures all of it.
    sharded: whether the frozen teachers are sharded over processes.
    """
    p, n, tracks, largest = size.parameters, processes, size.tracks, size.largest
    bucket = buckets(p, largest).bucket
    rest: float
    step: float
    if stage is None:
        rest, step, averaged = (4 + tracks) * p, largest, 0
    elif stage == 0:
        rest, step, averaged = (3 + tracks) * p, 2 * p, 0
    elif stage < 3:
        rest, step, averaged = p + (3 + tracks) * p / n, max(p + (bucket if stage == 1 else 0), 2 * p / n), p
    else:
        rest, step, averaged = (5 + tracks) * p / n + bucket, max(p / n, 3 * largest + 2 * bucket), p
    held = size.teacher_parameters / (n if sharded else 1)
    cast = p / 2 if size.bf16 and stage != 3 else 0
    whole = lambda numbers: int(4 * (numbers + held))
    gathered = 3 * largest + 2 * bucket if stage == 3 else largest
    step = max(step, size.remade + gathered if size.remade else 0) + cast  # a backward ends before the optimizer begins
    start = max(whole(rest), 8 * p if stage in (1, 2) else 0)  # weights are joined before a teacher is read
    return Peaks(start, whole(rest + step), whole(rest + largest), whole(rest + averaged), int(4 * rest))


def choose(engine: str, stage: int | str, teacher: str, size: StageSize, processes: int, memory: int) -> ShardingPlan:
    """The first of (1, whole teacher), (2, whole), (3, whole), (3, sharded) whose states take at most SHARE of `memory`.

    One process has nothing to share: stage 0. engine: "local" or "zero"; stage: "auto" or a number; teacher: "auto",
    "whole" or "sharded"; memory: bytes of one process.
    """

    def sized(s: int | None, sharded: bool, why: str) -> ShardingPlan:
        held = 4 * size.teacher_parameters // (processes if sharded else 1)
        states = state_bytes(s, size.parameters, processes, size.tracks, size.bf16)
        most, cut = peaks(s, size, processes, sharded), None if s is None else buckets(size.parameters, size.largest)
        return ShardingPlan(s, sharded, states, held, memory, why, most, cut)

    if engine == "local":
        return sized(None, False, "every process holds everything")
    shard = [False, True] if teacher == "auto" else [teacher == "sharded"]
    if not size.teacher_parameters or processes == 1:
        shard = [False]
    if stage != "auto":
        stages, rule = [int(stage)], "as zero_stage says: "
    elif processes == 1:
        stages, rule = [0], "one process has nothing to share: "
    else:
        stages, rule = [1, 2, 3], ""
    tried, limit = [], int(SHARE * memory)
    for s, sharded in [(s, sharded) for sharded in shard for s in stages if not sharded or s == stages[-1]]:
        choice = sized(s, sharded, "")
        need = max(choice.peaks)
        tried.append(f"stage {s}{' with a sharded teacher' * sharded} needs {gb(need)}")
        if need <= limit:
            break
    verdict = "within the" if need <= limit else "more than the"
    return choice._replace(why=f"{rule}{', '.join(tried)}, {verdict} {gb(limit)} that states may take")


def memory_bytes(device: torch.device) -> int:
    """Memory of one process: its GPU's, or this machine's shared among the processes on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // distributed.local_size()


def gb(n: int) -> str:
    """A size in GB (1e9 bytes)."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
