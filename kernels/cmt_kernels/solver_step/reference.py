"""solver_step in plain torch."""

import torch
from torch import Tensor


def solver_step(
    x: Tensor,
    f: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coefficients: Tensor,
    keep: bool = True,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    c = coefficients.to(x.device, x.dtype).unbind(-1)
    if coefficients.ndim == 2:
        c = [a.view(-1, *[1] * (x.ndim - 1)) for a in c]
    c_skip, c_out, w, c0, c1, c2, c3, c_in = c
    prediction = f.to(x.dtype)
    if len(f) == 2 * len(x):
        conditional, null = prediction.chunk(2)
        prediction = torch.addcmul(null, conditional - null, w)
    m0 = torch.addcmul(c_skip * x, prediction, c_out)
    after = torch.addcmul(c0 * x, m0, c1)
    for weight, m in ((c2, m1), (c3, m2)):
        if m is not None:
            after = torch.addcmul(after, m, weight)
    y = after if y is None else y.copy_(after)
    return (y, m0, (c_in * after).to(f.dtype)) if keep else (y, None, None)
