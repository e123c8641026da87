"""dropout: y = x m/(1 - p), m 1 with probability 1 - p; the mask is a function of each row's seeds, so it can be had again.

Of element e of row b: h = e ^ seeds[b, 0], h = (h ^ h >> 16) 0x7feb352d, h ^= seeds[b, 1], h = (h ^ h >> 16) 0x45d9f3b,
h ^= h >> 16, all mod 2^32; m = h >= p 2^32. The map is linear: its tangent has the same mask.
In plain torch alone: eager, the hash takes several times the memory of x while it runs; compiled, it is fused.
"""

from torch import Tensor

from cmt_kernels._op import backend
from cmt_kernels.dual import Dual


def dropout(x: Tensor | Dual, seeds: Tensor, p: float) -> Tensor | Dual:
    """x: (B, ...); seeds: (B, 2) int64 in [0, 2^32); 0 <= p < 1 -> the same shape and dtype."""
    return backend("dropout", x)(x, seeds, p)
