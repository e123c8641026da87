"""mp_silu in Triton: a program owns a few pixels of one image and a block of its channels; sums of the scale's gradient are
partial ones, added by a second pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import ROWS, SUMMED_ROWS, among, checked, chunks, cut, paired, row_of, variants
from cmt_kernels.channels import image, pixels
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed
from cmt_kernels.mp_silu import through

CHANNELS = (192, 768, 1792)  # of the gates: EDM2-S, its deepest level, the deepest of XXL
WIDEST = 1024  # columns of a program
EACH, EACH_BACK = 256, 512  # columns of a warp: the other way round ptxas spills a few bytes on sm_100
OVER = tl.constexpr(1.0 / 0.596)


@triton.jit
def _sigmoid(s):
    """sigmoid(s) and 1 - sigmoid(s), without cancellation: e = exp(-|s|) is never infinite."""
    e = tl.exp(-tl.abs(s))
    p = 1.0 / (1.0 + e)
    return tl.where(s < 0.0, e * p, p), e * p, p


@triton.jit
def _slope(s):
    q, e_p, p = _sigmoid(s)
    return tl.fma(s * p, e_p, q) * OVER


@triton.jit
def _forward(
    x,
    scale,
    x_dot,
    scale_dot,
    y,
    y_dot,
    T,
    k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    runs = tl.cdiv(T, ROWS)
    b = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * ROWS
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < D
    m = tl.full((BLOCK,), 1.0, tl.float32)
    if scale is not None:
        m += row_of(scale, b, in_row, cols, D)
    for i in range(ROWS):
        inside = among(first + i, T, in_row, BLOCK)
        row = b * T + first + i
        v = row_of(x, row, inside, cols, D)
        q, _, _ = _sigmoid(v * m)
        tl.store(y + row * D + cols, v * m * q * OVER, mask=inside)
        if y_dot is not None:  # noqa: SIM102  (compile time)
            if b < k:  # run time, the same for the whole program
                t = tl.zeros((BLOCK,), tl.float32)
                if x_dot is not None:
                    t = row_of(x_dot, row, inside, cols, D) * m
                if scale_dot is not None:
                    t = tl.fma(row_of(scale_dot, b, in_row, cols, D), v, t)
                tl.store(y_dot + row * D + cols, _slope(v * m) * t, mask=inside)


@triton.jit
def _backward(dy, x, scale, onward, dx, sums, T, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dx, and in sums (B, runs, D) the partial sums of dscale."""
    runs = tl.cdiv(T, ROWS)
    b = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * ROWS
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < D
    m = tl.full((BLOCK,), 1.0, tl.float32)
    if scale is not None:
        m += row_of(scale, b, in_row, cols, D)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        inside = among(first + i, T, in_row, BLOCK)
        row = b * T + first + i
        v = row_of(x, row, inside, cols, D)
        ds = row_of(dy, row, inside, cols, D) * _slope(v * m)
        d = ds * m
        if onward is not None:
            d = tl.fma(ds, m, row_of(onward, row, inside, cols, D))
        tl.store(dx + row * D + cols, d, mask=inside)
        total += tl.where(inside, ds * v, 0.0)
    if scale is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * D + cols, total, mask=in_row)


@torch.library.custom_op("cmt_triton::mp_silu", mutates_args=())
def _silu(
    x: Tensor, scale: Tensor | None, x_dot: Tensor | None, scale_dot: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and its tangent (k, T, D)."""
    b, t, d = x.shape
    x, scale, x_dot, scale_dot = checked("mp_silu", x, scale, x_dot, scale_dot)
    y, y_dot = torch.empty_like(x), x.new_empty(k, t, d)
    if x.numel():
        block, warps = cut(min(d, WIDEST), EACH)
        dots = (x_dot, scale_dot, y, y_dot) if k else (None, None, y, None)
        placed("mp_silu", _forward)[(b * chunks(t, ROWS), chunks(d, block))](
            *(x, scale, *dots, t, k, d, block, ROWS), num_warps=warps, enable_fp_fusion=False
        )
    return y, y_dot


@_silu.register_fake
def _(x, scale, x_dot, scale_dot, k):
    return x.new_empty(x.shape), x.new_empty(k, *x.shape[1:])


@torch.library.custom_op("cmt_triton::mp_silu_backward", mutates_args=())
def _silu_backward(dy: Tensor, x: Tensor, scale: Tensor | None, onward: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx (B, T, D) and, in fp32, dscale (B, D)."""
    b, t, d = x.shape
    dy, x, scale, onward = checked("mp_silu", dy, x, scale, onward)
    runs = chunks(t, SUMMED_ROWS)
    dx, sums = torch.empty_like(x), x.new_empty(b if scale is not None else 0, runs, d, dtype=torch.float32)
    if x.numel():
        block, warps = cut(min(d, WIDEST), EACH_BACK)
        placed("mp_silu", _backward)[(b * runs, chunks(d, block))](
            *(dy, x, scale, onward, dx, sums, t, d, block, SUMMED_ROWS), num_warps=warps, enable_fp_fusion=False
        )
    return dx, sums.sum(1)


@_silu_backward.register_fake
def _(dy, x, scale, onward):
    return x.new_empty(x.shape), x.new_empty(0 if scale is None else x.shape[0], x.shape[2], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


@transforms.once("mp_silu")
def _gradient(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    return *_backward_below(dy, *ctx.saved_tensors, None), None, None, None


_silu.register_autograd(_gradient, setup_context=_save)


def _forward_below(x, scale, x_dot, scale_dot):
    return _silu(x, scale, x_dot, scale_dot, next((len(m) for m in (x_dot, scale_dot) if m is not None), 0))


def _backward_below(dy, x, scale, onward):
    dx, dscale = _silu_backward(dy, x, scale, onward)
    return dx, None if scale is None else dscale.to(scale.dtype)


def mp_silu(x, scale=None, also_x=False):
    transforms.refuse("mp_silu", "triton")
    k, x_v, dot = rows(x, scale), value(x), tangent(x)
    x_rows, scale_v = pixels(x_v), None if scale is None else value(scale)
    arguments = x_rows, scale_v, None if dot is None else pixels(dot), tangent(scale)
    if also_x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, y_dot, x_rows = through.call("triton", _forward_below, _backward_below)(*arguments)
        x_v = image(x_rows, x_v.shape)
    else:
        y, y_dot = _silu(*arguments, k or 0)
    y = paired(image(y, x_v.shape), image(y_dot, x_v.shape), k)
    return (y, x._replace(value=x_v) if isinstance(x, Dual) else x_v) if also_x else y


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward at the channels of EDM2."""
    found = []
    inputs, dots = {"x": "x", "scale": "x"}, ("x_dot", "scale_dot", "y_dot")
    for d in CHANNELS:
        block, warps = cut(min(d, WIDEST), EACH)
        sizes = {"D": d, "BLOCK": block}
        forward = inputs | dict.fromkeys((*dots, "y"), "x")
        found += variants(f"forward D{d}", _forward, forward, ("T", "k"), sizes | {"ROWS": ROWS}, warps, dots)
        block, warps = cut(min(d, WIDEST), EACH_BACK)
        backward = inputs | {"dy": "x", "onward": "x", "dx": "x", "sums": "fp32"}
        found += variants(f"backward D{d}", _backward, backward, ("T",), sizes | {"ROWS": SUMMED_ROWS}, warps, ())
    return found
