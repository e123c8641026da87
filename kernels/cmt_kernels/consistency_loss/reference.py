"""consistency_loss in plain torch."""

import torch
from torch import Tensor


def consistency_loss(prediction: Tensor, target: Tensor, distance: str = "pseudo_huber", c: float = 0.01) -> Tensor:
    squared = (prediction - target.detach().to(prediction.dtype)).square().flatten(1).sum(1)
    if distance == "squared_l2":
        return squared
    if distance == "l2":
        return torch.sqrt(squared + 1e-16)
    if distance == "pseudo_huber":
        return torch.sqrt(squared + c * c) - c
    raise ValueError(f"distance {distance!r} is none of squared_l2, l2, pseudo_huber")
