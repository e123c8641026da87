"""pixel_norm in Triton: a program owns a few rows, each in registers. Kept is y and two numbers a row, as in csrc/row_math.h."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import LARGEST, ROWS, SHRUNK, among, checked, chunks, cut, paired, row_of, variants
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

LENGTHS = (64, 192, 768, 1792)  # of the gates: a head, EDM2-S, its deepest level, the deepest of XXL


@triton.jit
def _over_length(x, r):
    """x / n, of 8 / n, which is a normal number for every finite n."""
    return x * r * 0.125


@triton.jit
def _forward(
    x,
    x_dot,
    y,
    y_dot,
    stats,
    N,
    tangent_rows,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    in_row = cols < D
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        if row < N:
            v = row_of(x, row, in_row, cols, D)
            square = tl.sum(v * v, 0) / D
            size = tl.where(square <= LARGEST, 1.0, SHRUNK)
            square = tl.where(square <= LARGEST, square, tl.sum((v * size) * (v * size), 0) / D)
            length = tl.sqrt_rn(square)
            n = length + eps * size
            r = tl.div_rn(8.0 * size, n)
            ratio = tl.where(length > 0.0, tl.div_rn(n, length), 0.0)
            tl.store(stats + 2 * row, r)
            tl.store(stats + 2 * row + 1, ratio)
            v = _over_length(v, r)
            tl.store(y + row * D + cols, v, mask=in_row)
            if y_dot is not None:  # noqa: SIM102  (compile time)
                if row < tangent_rows:
                    t = row_of(x_dot, row, in_row, cols, D)
                    mean = tl.sum(t * v, 0) / D
                    tl.store(y_dot + row * D + cols, _over_length(t - v * (mean * ratio), r), mask=in_row)


@triton.jit
def _backward(dy, y, stats, dx, N, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    in_row = cols < D
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = among(row, N, in_row, BLOCK)
        g, v = row_of(dy, row, inside, cols, D), row_of(y, row, inside, cols, D)
        r = tl.load(stats + 2 * row, mask=row < N, other=0.0)
        ratio = tl.load(stats + 2 * row + 1, mask=row < N, other=0.0)
        mean = tl.sum(g * v, 0) / D
        tl.store(dx + row * D + cols, _over_length(g - v * (mean * ratio), r), mask=inside)


@torch.library.custom_op("cmt_triton::pixel_norm", mutates_args=())
def _norm(x: Tensor, x_dot: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D), its tangent (k, T, D), and (B, T, 2) for the backward, fp32."""
    b, t, d = x.shape
    x, x_dot = checked("pixel_norm", x, x_dot)
    k = 0 if x_dot is None else len(x_dot)
    y, y_dot, stats = torch.empty_like(x), x.new_empty(k, t, d), x.new_empty(b, t, 2, dtype=torch.float32)
    if x.numel():
        block, warps = cut(d)
        dots = (x_dot, y, y_dot) if k else (None, y, None)
        placed("pixel_norm", _forward)[(chunks(b * t, ROWS),)](
            *(x, *dots, stats, b * t, k * t, eps, d, block, ROWS), num_warps=warps, enable_fp_fusion=False
        )
    return y, y_dot, stats


@_norm.register_fake
def _(x, x_dot, eps):
    k = 0 if x_dot is None else x_dot.shape[0]
    return x.new_empty(x.shape), x.new_empty(k, *x.shape[1:]), x.new_empty(*x.shape[:2], 2, dtype=torch.float32)


@torch.library.custom_op("cmt_triton::pixel_norm_backward", mutates_args=())
def _norm_backward(dy: Tensor, y: Tensor, stats: Tensor) -> Tensor:
    """dx (B, T, D)."""
    b, t, d = y.shape
    dy, y, stats = checked("pixel_norm", dy, y, stats)
    dx = torch.empty_like(y)
    if y.numel():
        block, warps = cut(d)
        placed("pixel_norm", _backward)[(chunks(b * t, ROWS),)](
            *(dy, y, stats, dx, b * t, d, block, ROWS), num_warps=warps, enable_fp_fusion=False
        )
    return dx


@_norm_backward.register_fake
def _(dy, y, stats):
    return y.new_empty(y.shape)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], output[2])


@transforms.once("pixel_norm")
def _gradient(ctx, dy, *_):
    return (None if dy is None else _norm_backward(dy, *ctx.saved_tensors)), None, None


_norm.register_autograd(_gradient, setup_context=_save)


def pixel_norm(x: Tensor | Dual, dim: int = 1, eps: float = 1e-4) -> Tensor | Dual:
    transforms.refuse("pixel_norm", "triton")
    k, x_v, dot = rows(x), value(x), tangent(x)
    shape = x_v.movedim(dim, -1).shape[1:]
    flat = lambda m: m.movedim(dim, -1).reshape(len(m), shape[:-1].numel(), shape[-1])
    y, y_dot, _ = _norm(flat(x_v), None if dot is None else flat(dot), eps)
    back = lambda m: m.view(len(m), *shape).movedim(-1, dim)
    return paired(back(y), back(y_dot), k)


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward at the lengths of EDM2's rows."""
    found = []
    for d in LENGTHS:
        block, warps = cut(d)
        sizes, dots = {"D": d, "BLOCK": block, "ROWS": ROWS}, ("x_dot", "y_dot")
        forward = dict.fromkeys(("x", "y", *dots), "x") | {"stats": "fp32"}
        found += variants(f"forward D{d}", _forward, forward, ("N", "tangent_rows", "eps"), sizes, warps, dots)
        backward = dict.fromkeys(("dy", "y", "dx"), "x") | {"stats": "fp32"}
        found += variants(f"backward D{d}", _backward, backward, ("N",), sizes, warps, ())
    return found
