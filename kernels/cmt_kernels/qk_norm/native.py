"""qk_norm in C++ and CUDA (csrc): norm, rotation and copy of the values in one pass, with the tangent beside it.

Kept for the backward: qkv and the tables; 1/rms is computed again. No norm and no RoPE returns qkv as it came.
"""

import torch
from torch import Tensor

from cmt_kernels import _native
from cmt_kernels.dual import Dual, tangent, value
from cmt_kernels.qk_norm import reference

unavailable = _native.unavailable


def loses(device: str) -> str | None:
    """A lane loads two or four bytes at a time. With tangents too (0.179 ms beside 0.099 of 16 rows).

    Not measured: fp32, backward, other cards than one H100."""
    if device != "cuda":
        return None
    return "one H100, 44cd33c, B 64, T 256, H 12, d 64, bf16, kernels alone: 0.168 ms, 30 % of the roof; triton 0.081, 62 %"


def qk_norm(
    qkv: Tensor | Dual,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | Dual:
    qkv_v, qkv_dot = value(qkv), tangent(qkv)
    if q_weight is None and cos is None or not _native.covers(qkv_v, "qk_norm"):
        return reference.qk_norm(qkv, q_weight, k_weight, cos, sin, eps)
    tables = map(_native.wide, (q_weight, k_weight, cos, sin))
    y, y_dot = _native.call("qk_norm", qkv_v, *tables, qkv_dot, eps)
    return y if qkv_dot is None else Dual(y, y_dot)


def _fake(qkv, q_weight, k_weight, cos, sin, qkv_dot, eps):
    k = 0 if qkv_dot is None else qkv_dot.shape[0]
    return qkv.new_empty(qkv.shape), qkv.new_empty(k, *qkv.shape[1:])


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad, _):
    saved = ctx.saved_tensors  # once: what activation checkpointing computes again is there for one look
    dqkv, dq, dk = torch.ops.cmt.qk_norm_backward(grad, *saved, ctx.eps)
    normed = saved[1] is not None
    return dqkv, dq if normed else None, dk if normed else None, None, None, None, None


def _backward_fake(grad, qkv, q_weight, k_weight, cos, sin, eps):
    d = 0 if q_weight is None else qkv.shape[-1]
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(d, dtype=torch.float32) for _ in range(2))


if not unavailable("cpu"):
    _native.register("qk_norm", _fake, _setup_context, _backward, _backward_fake)
