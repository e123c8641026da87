"""The size at which numbers can be squared and summed: squares of fp32 overflow from 1.8e19 on, and a sum of them earlier.

What is scale invariant (a norm, a distance) is computed at that size: a power of two, so that nothing is rounded, and 1
for every row that needs none.
"""

import torch
from torch import Tensor

LARGE, SHRUNK = 2.0**48, 2.0**-80


def size_of(x: Tensor, dim: int | None = None) -> Tensor:
    """2^-80 where a number of x along `dim` (of all of x) is beyond 2^48, else 1; the dim is kept, the dtype is that of x.

    At that size the largest lies in [2^-32, 2^48]. A constant of every derivative.
    """
    with torch.no_grad():
        largest = torch.linalg.vector_norm(x.detach(), float("inf"), dim, keepdim=dim is not None)
        return torch.ones_like(largest).masked_fill(largest > LARGE, SHRUNK)
