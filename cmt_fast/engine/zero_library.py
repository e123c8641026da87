"""DeepSpeed itself: imported at one door, told what to move at once, and what of it hangs on a network."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from cmt_fast.engine.sharding import Buckets
from cmt_fast.runtime import distributed


class Autocast(nn.Module):
    """The module under the local engine's autocast; DeepSpeed would switch off one that is entered outside.

    `calls` holds what is run, the module or its compiled form: DeepSpeed's hooks hang on this module and stay outside.
    """

    def __init__(self, net: nn.Module, device: torch.device, bf16: bool) -> None:
        super().__init__()
        self.net, self.kind, self.bf16, self.calls = net, device.type, bf16, (net,)

    def forward(self, *args: Any) -> Any:
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.bf16):
            return self.calls[0](*args)


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


def no_scalars(net: nn.Module, recurse: bool = True) -> None:
    """Parameters without a dimension, EDM2's gains, get one: DeepSpeed broadcasts bytes, which a scalar has no view of."""
    for p in net.parameters(recurse):
        if p.ndim == 0:
            p.data = p.data.view(1)


def largest(net: nn.Module) -> int:
    """Numbers of the largest parameter."""
    return max(p.numel() for p in net.parameters())


def section(level: int, cut: Buckets) -> dict[str, Any]:
    """DeepSpeed's section on a stage: what it moves and holds at once, from the size of the network."""
    out: dict[str, Any] = {"stage": level}
    if level:
        out |= {"reduce_bucket_size": cut.bucket, "allgather_bucket_size": cut.bucket}
    if level == 3:
        out |= {
            "stage3_prefetch_bucket_size": cut.bucket,
            "stage3_max_live_parameters": cut.live,
            "stage3_max_reuse_distance": cut.live,
            "stage3_param_persistence_threshold": cut.whole,
            "sub_group_size": cut.group,
        }
    return out


class Cut:
    """Cuts single parameters as stage 3 holds them: this rank's part stays, the rest is freed."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        zero = deepspeed_for(device).zero
        # of an empty module: a context would cut after every constructor, before a parent has drawn anew
        self.init = zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)

    def __call__(self, p: nn.Parameter) -> None:
        self.init._convert_to_zero_parameters([p])


def deepspeed_for(device: torch.device) -> Any:
    """The one door to DeepSpeed: imported for this device, quiet, in a process group that exists."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # of a process that no launcher started
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # its all-reduce for inference, which ZeRO does not call: it would be compiled here, 45 s at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    distributed.alone(device)
    return deepspeed
