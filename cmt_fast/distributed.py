"""The few collective calls, each the identity on one process. Ranks come from torchrun's environment."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> None:
    """Join torchrun's process group, if this process was started by it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def mean_(x: Tensor) -> Tensor:
    """x averaged over ranks, in place."""
    if size() > 1:
        dist.all_reduce(x)
        x /= size()
    return x


def sum_(x: Tensor) -> Tensor:
    """x added up over ranks, on the device that x is on; in place where it can be."""
    if size() == 1:
        return x
    there = x.cuda() if dist.get_backend() == "nccl" else x.cpu()
    dist.all_reduce(there)
    return there.to(x.device)


def gather_uneven(x: Tensor | None) -> Tensor:
    """Shards (n_r, F) of ranks joined in rank order, on the CPU; n_r may differ, and be None for no rows at all."""
    if size() == 1:
        assert x is not None
        return x
    rows, width = (0, 0) if x is None else x.shape
    most, width, double = largest(rows), largest(width), largest(int(x is not None and x.dtype == torch.float64))
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    mine = torch.zeros(most, width, dtype=torch.float64 if double else torch.float32, device=place)
    if x is not None:
        mine[:rows] = x
    counts = gather_rows(torch.tensor([rows], device=place)).tolist()
    parts = gather_rows(mine).split(most)
    return torch.cat([part[:n] for part, n in zip(parts, counts)]).cpu()


def largest(n: int) -> int:
    """The largest n of all ranks, the same on each."""
    if size() == 1:
        return n
    x = torch.tensor(n, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return int(x)


def gather_rows(x: Tensor, dim: int = 0) -> Tensor:
    """Equal shards (n, ...) of all ranks joined along `dim`, in rank order."""
    if size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


def barrier() -> None:
    if size() > 1:
        dist.barrier()
