"""weight_gradient as one product of torch's that adds in float32, which torch has on CUDA alone (from 2.10 on)."""

import torch
from torch import Tensor

from cmt_kernels import transforms


def unavailable(device: str) -> str | None:
    return None if device == "cuda" else "torch has no product of bfloat16 that adds to float32 on this device"


@torch.no_grad()
def weight_gradient(g: Tensor, dy: Tensor, x: Tensor) -> None:
    transforms.refuse("weight_gradient", "torch")
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.dtype == g.dtype:
        g.addmm_(dy.mT, x)
    else:
        torch.addmm(g, dy.mT, x, g.dtype, out=g)
