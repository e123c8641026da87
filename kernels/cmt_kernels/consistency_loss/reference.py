"""consistency_loss in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.magnitude import size_of


def consistency_loss(prediction: Tensor, target: Tensor, distance: str = "pseudo_huber", c: float = 0.01) -> Tensor:
    difference = (prediction - target.detach().to(prediction.dtype)).flatten(1)
    if distance == "squared_l2":
        return difference.square().sum(1)
    if distance in ("l2", "pseudo_huber"):
        c, shift = (c, c) if distance == "pseudo_huber" else (1e-8, 0.0)
        size = size_of(difference, 1)
        squared = (difference * size).square().sum(1)
        size = size.squeeze(1)
        return torch.sqrt(squared + c * c * size * size) / size - shift
    raise ValueError(f"distance {distance!r} is none of squared_l2, l2, pseudo_huber")
