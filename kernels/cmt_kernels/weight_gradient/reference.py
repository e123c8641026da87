"""weight_gradient in plain torch."""

import torch
from torch import Tensor

from cmt_kernels import transforms


@torch.no_grad()
def weight_gradient(g: Tensor, dy: Tensor, x: Tensor) -> None:
    if transforms.derivative():
        raise RuntimeError(
            f"weight_gradient: it changes g in place and has no derivative; active: {transforms.names()}"
        )
    g.addmm_(dy.reshape(-1, dy.shape[-1]).mT.to(g.dtype), x.reshape(-1, x.shape[-1]).to(g.dtype))
