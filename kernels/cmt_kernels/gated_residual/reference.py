"""gated_residual in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, head, in_dtype, rows, tangent, tangent_rule, value


def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, bias: Tensor | None = None
) -> Tensor | Dual:
    k, dtype = rows(x, branch, gate), value(x).dtype
    branch, gate = in_dtype(branch, dtype), in_dtype(gate, dtype)
    x_v, branch_v, gate_v = value(x), value(branch), value(gate)
    if bias is not None:
        branch_v = branch_v + bias.to(dtype)
    y = torch.addcmul(x_v, gate_v.unsqueeze(1), branch_v)
    if k is None:
        return y
    with tangent_rule():
        x_dot, branch_dot, gate_dot = tangent(x), tangent(branch), tangent(gate)
        y_dot = torch.zeros_like(y[:k]) if x_dot is None else x_dot
        if branch_dot is not None:
            y_dot = torch.addcmul(y_dot, head(gate, k).unsqueeze(1), branch_dot)
        if gate_dot is not None:
            y_dot = torch.addcmul(y_dot, gate_dot.unsqueeze(1), branch_v[:k].detach())
        return Dual(y, y_dot)
