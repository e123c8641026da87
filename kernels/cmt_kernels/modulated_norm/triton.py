"""modulated_norm in Triton. The mean is taken about the row's first number: of equal numbers it is that one.

A forward keeps half the mean and 2/std of each row for the backward: x - mean may be twice the largest number of fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import (
    LARGEST,
    ROWS,
    SHRUNK,
    SUMMED_ROWS,
    WIDTHS,
    among,
    checked,
    chunks,
    cut,
    paired,
    row_of,
    variants,
)
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed
from cmt_kernels.modulated_norm import through

STREAM = ("x", "x_dot", "onward", "dx")  # what may be fp32 where all else is bf16


@triton.jit
def _centred(x_row, origin, in_row, D: tl.constexpr):
    """(mean, x - mean, sum of its squares) of one row; origin: its first number."""
    mu = origin + tl.sum(tl.where(in_row, x_row - origin, 0.0), 0) / D
    centred = tl.where(in_row, x_row - mu, 0.0)
    return mu, centred, tl.sum(centred * centred, 0)


@triton.jit
def _forward(
    x,
    shift,
    scale,
    x_dot,
    shift_dot,
    scale_dot,
    y,
    y_dot,
    half_mean,
    twice_r,
    T,
    k,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    runs = tl.cdiv(T, ROWS)
    image = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * ROWS
    cols = tl.arange(0, BLOCK)
    in_row = cols < D
    gain = 1.0 + row_of(scale, image, in_row, cols, D)
    h = row_of(shift, image, in_row, cols, D)
    for i in range(ROWS):
        exists = first + i < T
        inside = among(first + i, T, in_row, BLOCK)
        row = image * T + first + i
        x_row = row_of(x, row, inside, cols, D)
        origin = tl.load(x + row * D, mask=exists, other=0.0).to(tl.float32)
        mu, centred, squares = _centred(x_row, origin, in_row, D)
        s = tl.where(squares <= LARGEST, 1.0, SHRUNK)
        if s < 1.0:  # run time, the same for the whole program
            mu, centred, squares = _centred(x_row * s, origin * s, in_row, D)
        r = tl.div_rn(1.0, tl.sqrt_rn(squares / D + eps * s * s))
        xh = centred * r
        tl.store(y + row * D + cols, tl.fma(xh, gain, h), mask=inside)
        tl.store(half_mean + row, mu * (0.5 / s), mask=exists)
        tl.store(twice_r + row, 2.0 * r * s, mask=exists)
        if y_dot is not None:  # noqa: SIM102  (compile time)
            if image < k:  # run time, the same for the whole program
                t = tl.zeros((BLOCK,), tl.float32)
                if x_dot is not None:
                    d = row_of(x_dot, row, inside, cols, D)
                    t = r * s * (d - tl.sum(d, 0) / D - xh * (tl.sum(xh * d, 0) / D)) * gain
                if scale_dot is not None:
                    t = tl.fma(xh, row_of(scale_dot, image, in_row, cols, D), t)
                if shift_dot is not None:
                    t += row_of(shift_dot, image, in_row, cols, D)
                tl.store(y_dot + row * D + cols, t, mask=inside)


@triton.jit
def _backward(
    dy, x, scale, half_mean, twice_r, onward, dx, sums, T, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """dx with `onward` added to it if there is one, and in sums (B, runs, 2, D) the partial sums of dshift and dscale."""
    runs = tl.cdiv(T, ROWS)
    image = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * ROWS
    cols = tl.arange(0, BLOCK)
    in_row = cols < D
    gain = 1.0 + row_of(scale, image, in_row, cols, D)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        exists = first + i < T
        inside = among(first + i, T, in_row, BLOCK)
        row = image * T + first + i
        g = row_of(dy, row, inside, cols, D)
        half = tl.load(half_mean + row, mask=exists, other=0.0)
        r = tl.load(twice_r + row, mask=exists, other=0.0)
        xh = tl.where(in_row, row_of(x, row, inside, cols, D) * 0.5 - half, 0.0) * r
        w = g * gain
        d = 0.5 * r * (w - tl.sum(w, 0) / D - xh * (tl.sum(w * xh, 0) / D))
        if onward is not None:
            d = row_of(onward, row, inside, cols, D) + d
        tl.store(dx + row * D + cols, d, mask=inside)
        dshift += g
        dscale = tl.fma(g, xh, dscale)
    out = sums + tl.program_id(0).to(tl.int64) * 2 * D + cols
    tl.store(out, dshift, mask=in_row)
    tl.store(out + D, dscale, mask=in_row)


@torch.library.custom_op("cmt_triton::modulated_norm", mutates_args=())
def _norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    k: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, T, D), its tangent (k, T, D), and mean / 2 and 2 / std (B, T), fp32."""
    b, t, d = x.shape
    x, shift, scale, x_dot, shift_dot, scale_dot = checked(
        "modulated_norm", x, shift, scale, x_dot, shift_dot, scale_dot
    )
    y, y_dot = (torch.empty_like(x, dtype=shift.dtype), shift.new_empty(k, t, d))
    half_mean, twice_r = (x.new_empty(b, t, dtype=torch.float32) for _ in range(2))
    block, warps = cut(d)
    if x.numel():
        tangents = (x_dot, shift_dot, scale_dot) if k else (None, None, None)
        placed("modulated_norm", _forward)[(b * chunks(t, ROWS),)](
            *(x, shift, scale, *tangents, y, y_dot if k else None, half_mean, twice_r, t, k, eps, d, block, ROWS),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return y, y_dot, half_mean, twice_r


@_norm.register_fake
def _(x, shift, scale, x_dot, shift_dot, scale_dot, k, eps):
    b, t, d = x.shape
    statistics = (x.new_empty(b, t, dtype=torch.float32) for _ in range(2))
    return shift.new_empty(b, t, d), shift.new_empty(k, t, d), *statistics


@torch.library.custom_op("cmt_triton::modulated_norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, half_mean: Tensor, twice_r: Tensor, onward: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx (B, T, D), with `onward` added, and, in fp32, (2, B, D): dshift and dscale."""
    b, t, d = x.shape
    dy, x, scale, onward = checked("modulated_norm", dy, x, scale, onward)
    runs = chunks(t, SUMMED_ROWS)
    dx, sums = torch.empty_like(x), x.new_empty(b, runs, 2, d, dtype=torch.float32)
    block, warps = cut(d)
    if x.numel():
        placed("modulated_norm", _backward)[(b * runs,)](
            *(dy, x, scale, half_mean, twice_r, onward, dx, sums, t, d, block, SUMMED_ROWS),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return dx, sums.sum(1).transpose(0, 1).contiguous()


@_norm_backward.register_fake
def _(dy, x, scale, half_mean, twice_r, onward):
    b, t, d = x.shape
    return x.new_empty(b, t, d), x.new_empty(2, b, d, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    x, shift, scale = inputs[:3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, *output[2:])
    ctx.shift_dtype = shift.dtype


@transforms.once("modulated_norm")
def _gradient(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    x, scale, *statistics = ctx.saved_tensors
    dx, (dshift, dscale) = _norm_backward(dy, x, scale, *statistics, None)
    return dx, dshift.to(ctx.shift_dtype), dscale.to(scale.dtype), *(None,) * 5


_norm.register_autograd(_gradient, setup_context=_save)


def _forward_below(x, shift, scale, x_dot, shift_dot, scale_dot, k, eps):
    return _norm(x, shift, scale, x_dot, shift_dot, scale_dot, k, eps)


def _backward_below(dy, x, scale, half_mean, twice_r, onward):
    dx, (dshift, dscale) = _norm_backward(dy, x, scale, half_mean, twice_r, onward)
    return dx, dshift.to(dy.dtype), dscale.to(scale.dtype)


_through = through.function(_forward_below, _backward_below)


def modulated_norm(x, shift, scale, eps=1e-6, also_x=False):
    transforms.refuse("modulated_norm", "triton")
    k = rows(x, shift, scale)
    arguments = *map(value, (x, shift, scale)), *map(tangent, (x, shift, scale)), k or 0, eps
    if also_x and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, y_dot, x_v = _through(*arguments)
        return paired(y, y_dot, k), x._replace(value=x_v) if isinstance(x, Dual) else x_v
    y, y_dot, *_ = _norm(*arguments)
    return (paired(y, y_dot, k), x) if also_x else paired(y, y_dot, k)


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward at the widths of DiT-S, B, L and XL."""
    found = []
    inputs, fixed = dict.fromkeys(("x", "shift", "scale"), "x"), dict.fromkeys(("half_mean", "twice_r"), "fp32")
    dots = {"x_dot": "x", "shift_dot": "x", "scale_dot": "x", "y_dot": "x"}
    for d in WIDTHS:
        block, warps = cut(d)
        sizes = {"D": d, "BLOCK": block}
        forward = inputs | dots | {"y": "x"} | fixed
        found += variants(
            f"forward D{d}", _forward, forward, ("T", "k", "eps"), sizes | {"ROWS": ROWS}, warps, tuple(dots), STREAM
        )
        backward = dict.fromkeys(("dy", "x", "scale", "onward", "dx"), "x") | {"sums": "fp32"} | fixed
        sizes |= {"ROWS": SUMMED_ROWS}
        found += variants(f"backward D{d}", _backward, backward, ("T",), sizes, warps, (), STREAM)
    return found
