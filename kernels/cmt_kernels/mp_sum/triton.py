"""mp_sum in Triton: numbers in any order, a block of them to a program."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import checked, chunks, paired, variants
from cmt_kernels.channels import alike
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed
from cmt_kernels.mp_sum import reference

BLOCK, WARPS = 1024, 4


@triton.jit
def _weighted(a, b, at, inside, weight_a, weight_b):
    s = tl.zeros(at.shape, tl.float32)
    if b is not None:
        s = tl.load(b + at, mask=inside, other=0.0).to(tl.float32) * weight_b
    if a is not None:
        s = tl.fma(tl.load(a + at, mask=inside, other=0.0).to(tl.float32), weight_a, s)
    return s


@triton.jit
def _forward(a, b, a_dot, b_dot, y, y_dot, N, N_dot, weight_a, weight_b, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = _weighted(a, b, at, at < N, weight_a, weight_b)
    tl.store(y + at, tl.where(s > limit, limit, tl.where(s < -limit, -limit, s)), mask=at < N)
    if y_dot is not None:
        t = _weighted(a_dot, b_dot, at, at < N_dot, weight_a, weight_b)
        tl.store(y_dot + at, tl.where((s <= limit) & (s >= -limit), t, 0.0), mask=at < N_dot)


@triton.jit
def _backward(dy, y, da, db, N, weight_a, weight_b, limit, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(dy + at, mask=at < N, other=0.0).to(tl.float32)
    if y is not None:
        v = tl.load(y + at, mask=at < N, other=0.0).to(tl.float32)
        g = tl.where((v < limit) & (v > -limit), g, 0.0)
    tl.store(da + at, g * weight_a, mask=at < N)
    tl.store(db + at, g * weight_b, mask=at < N)


@torch.library.custom_op("cmt_triton::mp_sum", mutates_args=())
def _sum(
    a: Tensor, b: Tensor, a_dot: Tensor | None, b_dot: Tensor | None, k: int, weights: list[float], limit: float
) -> tuple[Tensor, Tensor]:
    """y and its tangent, of k rows."""
    a, b, a_dot, b_dot = checked("mp_sum", a, b, a_dot, b_dot)
    y, y_dot = torch.empty_like(a), a.new_empty(k, *a.shape[1:])
    if a.numel():
        dots = (a_dot, b_dot, y, y_dot) if k else (None, None, y, None)
        placed("mp_sum", _forward)[(chunks(a.numel(), BLOCK),)](
            *(a, b, *dots, a.numel(), y_dot.numel(), *weights, limit, BLOCK), num_warps=WARPS, enable_fp_fusion=False
        )
    return y, y_dot


@_sum.register_fake
def _(a, b, a_dot, b_dot, k, weights, limit):
    return a.new_empty(a.shape), a.new_empty(k, *a.shape[1:])


@torch.library.custom_op("cmt_triton::mp_sum_backward", mutates_args=())
def _sum_backward(dy: Tensor, y: Tensor | None, weights: list[float], limit: float) -> tuple[Tensor, Tensor]:
    """da and db."""
    dy, y = checked("mp_sum", dy, y)
    da, db = torch.empty_like(dy), torch.empty_like(dy)
    if dy.numel():
        placed("mp_sum", _backward)[(chunks(dy.numel(), BLOCK),)](
            *(dy, y, da, db, dy.numel(), *weights, limit, BLOCK), num_warps=WARPS, enable_fp_fusion=False
        )
    return da, db


@_sum_backward.register_fake
def _(dy, y, weights, limit):
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape)


def _save(ctx, inputs, output) -> None:
    *_, ctx.weights, ctx.limit = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if math.isfinite(ctx.limit) else None)


@transforms.once("mp_sum")
def _gradient(ctx, dy, _):
    if dy is None:
        return (None,) * 7
    return *_sum_backward(dy, *ctx.saved_tensors, ctx.weights, ctx.limit), *(None,) * 5


_sum.register_autograd(_gradient, setup_context=_save)


def mp_sum(a: Tensor | Dual, b: Tensor | Dual, share: float = 0.5, limit: float | None = None) -> Tensor | Dual:
    transforms.refuse("mp_sum", "triton")
    k, a_v = rows(a, b), alike(value(a), value(a))
    order = (0, *range(2, a_v.ndim), 1) if not a_v.is_contiguous() else tuple(range(a_v.ndim))
    flat = lambda x: None if x is None else alike(x.to(a_v.dtype), a_v).permute(order)
    numbers = map(flat, (a_v, value(b), tangent(a), tangent(b)))
    y, y_dot = _sum(*numbers, k or 0, list(reference.weights(share)), math.inf if limit is None else limit)
    back = [order.index(i) for i in range(a_v.ndim)]
    return paired(y.permute(back), y_dot.permute(back), k)


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward."""
    tensors, dots = ("a", "b", "a_dot", "b_dot", "y", "y_dot"), ("a_dot", "b_dot", "y_dot")
    found = variants("forward", _forward, dict.fromkeys(tensors, "x"), ("N", "N_dot"), {"BLOCK": BLOCK}, WARPS, dots)
    found += variants(
        "backward", _backward, dict.fromkeys(("dy", "y", "da", "db"), "x"), ("N",), {"BLOCK": BLOCK}, WARPS, ()
    )
    for gate in found:
        gate.signature.update(dict.fromkeys(("weight_a", "weight_b", "limit"), "fp32"))
    return found
