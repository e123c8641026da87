"""gated_residual in plain torch."""

import torch
from torch import Tensor

from cmt_kernels.dual import Dual, head, rows, tangent, tangent_rule, value


def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, bias: Tensor | None = None
) -> Tensor | Dual:
    k = rows(x, branch, gate)
    x_v, branch_v, gate_v = value(x), value(branch), value(gate)
    if bias is not None:
        branch_v = branch_v + bias.to(branch_v.dtype)
    y = torch.addcmul(x_v, gate_v.unsqueeze(1).to(x_v.dtype), branch_v.to(x_v.dtype))
    if k is None:
        return y
    with tangent_rule():
        x_dot, branch_dot, gate_dot = tangent(x), tangent(branch), tangent(gate)
        y_dot = torch.zeros_like(y[:k]) if x_dot is None else x_dot
        if branch_dot is not None:
            y_dot = torch.addcmul(y_dot, head(gate, k).unsqueeze(1).to(y.dtype), branch_dot.to(y.dtype))
        if gate_dot is not None:
            y_dot = torch.addcmul(y_dot, gate_dot.unsqueeze(1).to(y.dtype), branch_v[:k].detach().to(y.dtype))
        return Dual(y, y_dot)
