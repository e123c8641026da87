"""gelu in Triton, by way of y = x sigmoid(2 p): .5 (1 + tanh p) without the cancellation, and one exponential.

The hidden layer of an MLP is too wide to hold a row: a program owns a few rows of one block of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import ROWS, SUMMED_ROWS, WIDTHS, among, checked, chunks, cut, paired, row_of, variants
from cmt_kernels.dual import Dual
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

WIDEST = 1024  # columns of a program
SUMMED_CHUNKS = 512  # at most so many partial sums of a column


@triton.jit
def _exponential(x):
    """exp(-2 p), p = sqrt(2/pi) (x + .044715 x^3). Where it is infinite the sigmoid is 0 and so is y: it has no limit."""
    return tl.exp(-1.5957691216057308 * x * tl.fma(0.044715, x * x, 1.0))


@triton.jit
def _slope(x):
    """dy/dx = s + x s (1 - s) (2 p)' with s = sigmoid(2 p); 1 - s is e s, without the cancellation.

    Beyond +-10 it is 0 and 1 to fp32, so it is taken there: nothing overflows for any finite x (inf times 0 would be
    NaN). Of an infinite x it is NaN, as in the formula.
    """
    x = tl.fma(x, 0.0, tl.minimum(tl.maximum(x, -10.0), 10.0))
    e = _exponential(x)
    s = 1.0 / (1.0 + e)
    return tl.fma(x * s * (e * s), 1.5957691216057308 * tl.fma(0.134145, x * x, 1.0), s)


@triton.jit
def _forward(x, bias, x_dot, y, y_dot, N, tangent_rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < D
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        inside = among(row, N, in_row, BLOCK)
        x_row = row_of(x, row, inside, cols, D)
        if bias is not None:
            x_row += row_of(bias, 0, in_row, cols, D)
        tl.store(y + row * D + cols, x_row * (1.0 / (1.0 + _exponential(x_row))), mask=inside)
        if y_dot is not None:  # noqa: SIM102  (compile time)
            if row < tangent_rows:  # run time, the same for the whole program
                d = row_of(x_dot, row, inside, cols, D)
                tl.store(y_dot + row * D + cols, _slope(x_row) * d, mask=inside)


@triton.jit
def _backward(dy, x, bias, dx, sums, N, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """dx, and in sums (chunks, D) the partial sums of dbias over `rows` rows each."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = cols < D
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(rows):
        row = tl.program_id(0).to(tl.int64) * rows + i
        inside = among(row, N, in_row, BLOCK)
        x_row = row_of(x, row, inside, cols, D)
        if bias is not None:
            x_row += row_of(bias, 0, in_row, cols, D)
        d = _slope(x_row) * row_of(dy, row, inside, cols, D)
        tl.store(dx + row * D + cols, d, mask=inside)
        total += d
    if bias is not None:
        tl.store(sums + tl.program_id(0).to(tl.int64) * D + cols, total, mask=in_row)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """(rows, D, BLOCK, warps)"""
    d = x.shape[-1]
    return (x.numel() // d if d else 0), d, *cut(min(d, WIDEST))


@torch.library.custom_op("cmt_triton::gelu", mutates_args=())
def _gelu(x: Tensor, bias: Tensor | None, x_dot: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, ..., D) and its tangent (k, ..., D)."""
    x, bias, x_dot = checked("gelu", x, bias, x_dot)
    k = 0 if x_dot is None else len(x_dot)
    y, y_dot = torch.empty_like(x), x.new_empty(k, *x.shape[1:])
    n, d, block, warps = _sizes(x)
    if x.numel():
        tangents = (x_dot, y_dot) if k else (None, None)
        placed("gelu", _forward)[(chunks(n, ROWS), chunks(d, block))](
            *(x, bias, tangents[0], y, tangents[1], n, n // len(x) * k, d, block, ROWS),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return y, y_dot


@_gelu.register_fake
def _(x, bias, x_dot):
    return x.new_empty(x.shape), x.new_empty(0 if x_dot is None else x_dot.shape[0], *x.shape[1:])


@torch.library.custom_op("cmt_triton::gelu_backward", mutates_args=())
def _gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx (..., D) and dbias (D,), fp32."""
    dy, x, bias = checked("gelu", dy, x, bias)
    n, d, block, warps = _sizes(x)
    each = max(SUMMED_ROWS, chunks(n, SUMMED_CHUNKS))
    dx, sums = torch.empty_like(x), x.new_zeros(chunks(n, each) if bias is not None else 0, d, dtype=torch.float32)
    if x.numel():
        placed("gelu", _backward)[(chunks(n, each), chunks(d, block))](
            *(dy, x, bias, dx, sums, n, each, d, block), num_warps=warps, enable_fp_fusion=False
        )
    return dx, sums.sum(0)


@_gelu_backward.register_fake
def _(dy, x, bias):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])


@transforms.once("gelu")
def _gradient(ctx, dy, _):
    if dy is None:
        return None, None, None
    x, bias = ctx.saved_tensors
    dx, dbias = _gelu_backward(dy, x, bias)
    return dx, None if bias is None else dbias.to(bias.dtype), None


_gelu.register_autograd(_gradient, setup_context=_save)


def gelu(x: Tensor | Dual, bias: Tensor | None = None) -> Tensor | Dual:
    transforms.refuse("gelu", "triton")
    if not isinstance(x, Dual):
        return _gelu(x, bias, None)[0]
    return paired(*_gelu(x.value, bias, x.tangent), len(x.tangent))


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward at the hidden widths of DiT-S, B, L and XL."""
    found = []
    for d in (4 * width for width in WIDTHS):
        block, warps = cut(min(d, WIDEST))
        sizes, dots = {"D": d, "BLOCK": block}, ("x_dot", "y_dot")
        forward = dict.fromkeys(("x", "bias", "y", *dots), "x")
        found += variants(
            f"forward D{d}", _forward, forward, ("N", "tangent_rows"), sizes | {"ROWS": ROWS}, warps, dots
        )
        backward = dict.fromkeys(("dy", "x", "bias", "dx"), "x") | {"sums": "fp32"}
        found += variants(f"backward D{d}", _backward, backward, ("N", "rows"), sizes, warps, ())
    return found
