"""mp_cat in plain torch."""

import math

from torch import Tensor

from cmt_kernels.dual import Dual, concatenate, linear_map, value


def mp_cat(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    w_a, w_b = weights(value(a).shape[1], value(b).shape[1])
    return concatenate(linear_map(lambda x: x * w_a, a), linear_map(lambda x: x * w_b, b))


def weights(n_a: int, n_b: int) -> tuple[float, float]:
    """Of a and of b, with so many channels."""
    both = math.sqrt((n_a + n_b) / 2)
    return both / math.sqrt(n_a), both / math.sqrt(n_b)
