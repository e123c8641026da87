"""unit_weight in plain torch."""

import math

import torch
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.magnitude import size_of


def unit_weight(
    weight: Tensor,
    gain: float = 1.0,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
    eps: float = 1e-4,
) -> Tensor:
    size = size_of(weight.flatten(1), 1).view(
        -1, *[1] * (weight.ndim - 1)
    )  # the row and its length are taken at this size
    w = weight * size
    dims = tuple(range(1, w.ndim))
    length = torch.linalg.vector_norm(w, dim=dims, keepdim=True) / math.sqrt(w[0].numel())
    y = w / (length + eps * size) * gain
    last = channels_last and y.ndim == 4 and not transforms.active()  # vmap knows no layouts
    return y.to(dtype or y.dtype, memory_format=torch.channels_last if last else torch.preserve_format)
