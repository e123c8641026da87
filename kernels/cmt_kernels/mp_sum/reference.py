"""mp_sum in plain torch."""

import math

from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.dual import Dual, add, combine, linear_map, tangent_rule, value


def mp_sum(a: Tensor | Dual, b: Tensor | Dual, share: float = 0.5, limit: float | None = None) -> Tensor | Dual:
    weight_a, weight_b = weights(share)
    if (
        transforms.active()
    ):  # torch.func.linearize dies of an addition with an `alpha`, which `combine` has (torch 2.13)
        total = add(linear_map(lambda x: x * weight_a, a), linear_map(lambda x: x * weight_b, b))
    else:
        total = combine(a, weight_a, b, weight_b)
    if limit is None:
        return total
    y = value(total).clamp(-limit, limit)
    if not isinstance(total, Dual):
        return y
    with tangent_rule():
        k = len(total.tangent)
        return Dual(y, total.tangent.masked_fill(~(total.value[:k].abs() <= limit), 0))


def weights(share: float) -> tuple[float, float]:
    """Of a and of b."""
    total = math.hypot(1 - share, share)
    return (1 - share) / total, share / total
