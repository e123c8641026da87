"""What the zero engine puts around a network before DeepSpeed sees it, and what DeepSpeed is told of its size."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cmt_fast.engine.sharding import Buckets


class Autocast(nn.Module):
    """The module under the local engine's autocast; DeepSpeed would switch off one that is entered outside.

    `calls` holds what is run, the module or its compiled form: DeepSpeed's hooks hang on this module and stay outside.
    """

    def __init__(
        self, net: nn.Module, device: torch.device, bf16: bool, linear: Callable[..., Tensor] | None = None
    ) -> None:
        """linear: the map that its layers call in the place of torch's."""
        super().__init__()
        self.net, self.kind, self.bf16, self.calls, self.linear = net, device.type, bf16, (net,), linear

    def forward(self, *args: Any, **named: Any) -> Any:
        with linear_of(self.linear), torch.autocast(self.kind, torch.bfloat16, enabled=self.bf16):
            return self.calls[0](*args, **named)


@contextlib.contextmanager
def linear_of(linear: Callable[..., Tensor] | None) -> Iterator[None]:
    """Layers call this linear map inside, and afterwards the one that they called before; None: the same inside.

    Why stage 3 needs DeepSpeed's: of 67 MB of weights on two CPU ranks torch's map held 63 to 65 MB between forward and
    backward, DeepSpeed's 3 to 7 (2026-11-28).
    """
    before = functional.linear
    if linear is not None:
        functional.linear = linear
    try:
        yield
    finally:
        functional.linear = before


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Put torch's linear map, the environment and the excepthook back to what they were, whatever a library makes of them."""
    environment, hook = dict(os.environ), sys.excepthook
    with linear_of(None):
        try:
            yield
        finally:
            sys.excepthook = hook
            for key in os.environ.keys() - environment.keys():
                del os.environ[key]
            os.environ.update({key: value for key, value in environment.items() if os.environ.get(key) != value})


class Sharded:
    """A frozen network sharded over ranks: nothing but its forward, which is where it gathers."""

    def __init__(self, engine: Any, outer: Autocast) -> None:
        self.engine, self.outer = engine, outer

    def __call__(self, *arguments: Any) -> Any:
        return self.engine(*arguments)

    def in_bf16(self, *arguments: Any) -> Any:
        """The same forward under autocast, which DeepSpeed would switch off if it were entered outside."""
        self.outer.bf16 = True
        try:
            return self.engine(*arguments)
        finally:
            self.outer.bf16 = False


def rank_variable() -> Callable[[], None]:
    """Give a process that no launcher started the variable that DeepSpeed's steps read; what is returned takes it away."""
    if "LOCAL_RANK" in os.environ:
        return lambda: None
    os.environ["LOCAL_RANK"] = "0"
    return lambda: os.environ.pop("LOCAL_RANK", None) and None


def forget_groups(deepspeed: Any) -> None:
    """Let DeepSpeed make its groups anew where those that it keeps have ended with their default group, as every command's do."""
    groups = deepspeed.utils.groups
    own = groups._WORLD_GROUP
    if own is not None and own not in dist.distributed_c10d._world.pg_map:
        for name in [name for name, x in vars(groups).items() if name.endswith("_GROUP") and not isinstance(x, dict)]:
            setattr(groups, name, None)
        deepspeed.comm.comm.cdb = None


def release(engine: Any, lent: Iterable[Tensor] = ()) -> None:
    """Free what a DeepSpeed engine holds, buffers of modules and what is lent apart. Its hooks and caches keep it for as long
    as the process lives, and with it every stage's weights, moments and gradients, if it is only forgotten.
    """
    with contextlib.suppress(RuntimeError):  # it waits for the device, which may have failed
        engine.destroy()
    stays = {x.untyped_storage()._cdata for x in lent}
    owners = [engine.optimizer, getattr(engine.optimizer, "optimizer", None), *engine.module.parameters()]
    for owner in [x for x in owners if x is not None]:
        for x in _tensors([owner, getattr(owner, "grad", None), vars(owner)]):
            memory = x.untyped_storage()
            if memory._cdata not in stays and memory.resizable():
                memory.resize_(0)


def _tensors(x: Any) -> Iterator[Tensor]:
    """All in nested lists, tuples and dictionaries."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple, dict)):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _tensors(y)


def no_scalars(net: nn.Module, recurse: bool = True) -> None:
    """Parameters without a dimension, EDM2's gains, get one: DeepSpeed broadcasts bytes, which a scalar has no view of."""
    for p in net.parameters(recurse):
        if p.ndim == 0:
            p.data = p.data.view(1)


def largest(net: nn.Module) -> int:
    """Numbers of the largest parameter."""
    return max(p.numel() for p in net.parameters())


def section_of(level: int, cut: Buckets) -> dict[str, Any]:
    """DeepSpeed's section on a stage: what it moves and holds at once, from the size of the network."""
    section: dict[str, Any] = {"stage": level}
    if level:
        section |= {"reduce_bucket_size": cut.bucket, "allgather_bucket_size": cut.bucket}
    if level == 3:
        section |= {
            "stage3_prefetch_bucket_size": cut.bucket,
            "stage3_max_live_parameters": cut.live,
            "stage3_max_reuse_distance": cut.live,
            "stage3_param_persistence_threshold": cut.whole,
            "sub_group_size": cut.group,
        }
    return section
