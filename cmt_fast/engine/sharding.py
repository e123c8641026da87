"""How many bytes a process holds under each ZeRO stage, and the rule that chooses the stage.

Bytes a parameter on each of N processes, T EMA tracks; optimizer state is m, v and the tracks, 8 + 4 T.

    local   4 + 4 + (8 + 4 T)            weights, gradients, optimizer state
    0       4 + 4 + (8 + 4 T) + 4        DeepSpeed's gradients, joined for the optimizer
    1       4 + 4 + (4 + 8 + 4 T) / N    a rank's weights a second time: what its optimizer steps
    2       4 + (4 + 4 + 8 + 4 T) / N
    3       (4 + 4 + 4 + 8 + 4 T) / N

bf16 adds 2 up to stage 2: autocast's copies of the weights, kept until the backward. Buckets of communication (at most
0.5e9 elements) and activations come on top; the rule leaves them the rest of the memory.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

SHARE = 0.6  # of a process's memory that states may take; activations and buckets get the rest


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

    def lines(self, parameters: int, processes: int) -> list[str]:
        """What is printed at the start."""
        name = "local" if self.stage is None else f"zero, stage {self.stage}"
        teacher = f" + teacher {gb(self.teacher_bytes)}{' (sharded)' if self.teacher_sharded else ''}"
        return [
            f"engine: {name}; {self.why}",
            f"memory: {gb(self.state_bytes)} states{teacher if self.teacher_bytes else ''} a process of "
            f"{gb(self.memory_bytes)}, {parameters:,} parameters on {processes} process{'es' * (processes > 1)}; "
            "activations come on top, and at the start the whole network",
        ]


class StageSize(NamedTuple):
    """What a stage trains and holds: parameters of its network and of its frozen teachers (0 without), EMA tracks."""

    parameters: int
    teacher_parameters: int
    tracks: int
    bf16: bool


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


def choose(engine: str, stage: int | str, teacher: str, size: StageSize, processes: int, memory: int) -> ShardingPlan:
    """The first of (1, whole teacher), (2, whole), (3, whole), (3, sharded) whose states take at most SHARE of `memory`.

    One process has nothing to share: stage 0. engine: "local" or "zero"; stage: "auto" or a number; teacher: "auto",
    "whole" or "sharded"; memory: bytes of one process.
    """

    def sized(s: int | None, sharded: bool, why: str) -> ShardingPlan:
        held = 4 * size.teacher_parameters // (processes if sharded else 1)
        states = state_bytes(s, size.parameters, processes, size.tracks, size.bf16)
        return ShardingPlan(s, sharded, states, held, memory, why)

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
        need = choice.state_bytes + choice.teacher_bytes
        tried.append(f"stage {s}{' with a sharded teacher' * sharded} needs {gb(need)}")
        if need <= limit:
            break
    verdict = "within the" if need <= limit else "more than the"
    return choice._replace(why=f"{rule}{', '.join(tried)}, {verdict} {gb(limit)} that states may take")


def memory_bytes(device: torch.device) -> int:
    """Memory of one process: its GPU's, or this machine's shared among the processes on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here


def gb(n: int) -> str:
    """A size in GB (1e9 bytes)."""
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"
