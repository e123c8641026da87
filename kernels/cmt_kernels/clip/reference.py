"""clip in plain torch."""

from torch import Tensor

from cmt_kernels.dual import Dual, tangent_rule, value


def clip(x: Tensor | Dual, limit: float) -> Tensor | Dual:
    y = value(x).clamp(-limit, limit)
    if not isinstance(x, Dual):
        return y
    with tangent_rule():
        return Dual(y, x.tangent.masked_fill(~(x.value[: len(x.tangent)].abs() <= limit), 0))
