"""label_embedding: rows of a table, the last of them the null class; drops labels for classifier-free guidance."""

from torch import Tensor

from cmt_kernels._op import backend


def label_embedding(labels: Tensor, table: Tensor, drop: Tensor | None = None) -> Tensor:
    """labels: (B,) int64 in [0, C]; table: (C + 1, D), row C the null class; drop: (B,) bool, True takes the null row.

    Returns (B, D). Labels do not depend on time, so there is no tangent. One `drop` mask serves every copy of a batch.
    """
    return backend("label_embedding", labels)(labels, table, drop)
