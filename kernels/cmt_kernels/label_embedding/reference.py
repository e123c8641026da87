"""label_embedding in plain torch."""

import torch.nn.functional as F
from torch import Tensor


def label_embedding(labels: Tensor, table: Tensor, drop: Tensor | None = None) -> Tensor:
    if drop is not None:
        labels = labels.masked_fill(drop, table.shape[0] - 1)
    return F.embedding(labels, table)
