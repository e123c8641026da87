"""label_embedding in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_embedding(labels: Tensor, table: Tensor, drop: Tensor | None = None) -> Tensor:
    if drop is not None:
        labels = torch.where(drop, table.shape[0] - 1, labels)
    return F.embedding(labels, table)
