"""solver_step in plain torch."""

from torch import Tensor


def solver_step(x: Tensor, m0: Tensor, m1: Tensor | None, m2: Tensor | None, coefficients: Tensor) -> Tensor:
    c = coefficients.to(x.dtype)
    c = c.unbind(-1) if c.ndim == 1 else [a.view(-1, *[1] * (x.ndim - 1)) for a in c.unbind(-1)]
    y = c[0] * x
    for weight, m in zip(c[1:], (m0, m1, m2)):
        if m is not None:
            y = y.addcmul_(weight.expand_as(y), m.to(y.dtype)) if weight.ndim else y.add_(m.to(y.dtype) * weight)
    return y
