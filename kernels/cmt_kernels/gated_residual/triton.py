"""gated_residual in Triton. The gradient of the bias is sum_b gate_b (sum_t dy): one more column sum per image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import ROWS, SUMMED_ROWS, WIDTHS, among, checked, chunks, cut, paired, row_of, variants
from cmt_kernels.dual import Dual, rows, tangent, value
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

STREAM = ("x", "x_dot", "y", "y_dot", "dy")  # what may be fp32 where all else is bf16
COLUMNS = 256  # of a warp: with 512, as where rows are summed, ptxas spills a few bytes on sm_100


@triton.jit
def _forward(
    x,
    branch,
    gate,
    bias,
    x_dot,
    branch_dot,
    gate_dot,
    y,
    y_dot,
    T,
    k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    runs = tl.cdiv(T, ROWS)
    image = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * ROWS
    cols = tl.arange(0, BLOCK)
    in_row = cols < D
    g = row_of(gate, image, in_row, cols, D)
    for i in range(ROWS):
        inside = among(first + i, T, in_row, BLOCK)
        row = image * T + first + i
        o = row_of(branch, row, inside, cols, D)
        if bias is not None:
            o += row_of(bias, 0, in_row, cols, D)
        tl.store(y + row * D + cols, tl.fma(g, o, row_of(x, row, inside, cols, D)), mask=inside)
        if y_dot is not None:  # noqa: SIM102  (compile time)
            if image < k:  # run time, the same for the whole program
                t = tl.zeros((BLOCK,), tl.float32)
                if x_dot is not None:
                    t = row_of(x_dot, row, inside, cols, D)
                if branch_dot is not None:
                    t = tl.fma(g, row_of(branch_dot, row, inside, cols, D), t)
                if gate_dot is not None:
                    t = tl.fma(row_of(gate_dot, image, in_row, cols, D), o, t)
                tl.store(y_dot + row * D + cols, t, mask=inside)


@triton.jit
def _backward(dy, branch, gate, bias, dbranch, sums, T, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dbranch, and in sums (B, runs, 2, D) the partial sums of dgate and of dy."""
    runs = tl.cdiv(T, ROWS)
    image = (tl.program_id(0) // runs).to(tl.int64)
    first = (tl.program_id(0) % runs) * ROWS
    cols = tl.arange(0, BLOCK)
    in_row = cols < D
    g = row_of(gate, image, in_row, cols, D)
    dgate = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        inside = among(first + i, T, in_row, BLOCK)
        row = image * T + first + i
        d = row_of(dy, row, inside, cols, D)
        o = row_of(branch, row, inside, cols, D)
        if bias is not None:
            o += row_of(bias, 0, in_row, cols, D)
        tl.store(dbranch + row * D + cols, g * d, mask=inside)
        dgate = tl.fma(d, o, dgate)
        total += d
    out = sums + tl.program_id(0).to(tl.int64) * 2 * D + cols
    tl.store(out, dgate, mask=in_row)
    tl.store(out + D, total, mask=in_row)


@torch.library.custom_op("cmt_triton::gated_residual", mutates_args=())
def _residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    x_dot: Tensor | None,
    branch_dot: Tensor | None,
    gate_dot: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and its tangent (k, T, D)."""
    b, t, d = x.shape
    x, branch, gate, bias, *dots = checked("gated_residual", x, branch, gate, bias, x_dot, branch_dot, gate_dot)
    y, y_dot = torch.empty_like(x), x.new_empty(k, t, d)
    block, warps = cut(d, COLUMNS)
    if x.numel():
        tangents = dots if k else (None, None, None)
        placed("gated_residual", _forward)[(b * chunks(t, ROWS),)](
            *(x, branch, gate, bias, *tangents, y, y_dot if k else None, t, k, d, block, ROWS),
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return y, y_dot


@_residual.register_fake
def _(x, branch, gate, bias, x_dot, branch_dot, gate_dot, k):
    b, t, d = x.shape
    return x.new_empty(b, t, d), x.new_empty(k, t, d)


@torch.library.custom_op("cmt_triton::gated_residual_backward", mutates_args=())
def _residual_backward(dy: Tensor, branch: Tensor, gate: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dbranch (B, T, D) and, in fp32, dgate (B, D) and dbias (D,)."""
    b, t, d = branch.shape
    dy, branch, gate, bias = checked("gated_residual", dy, branch, gate, bias)
    runs = chunks(t, SUMMED_ROWS)
    dbranch, sums = torch.empty_like(branch), branch.new_empty(b, runs, 2, d, dtype=torch.float32)
    block, warps = cut(d, COLUMNS)
    if branch.numel():
        placed("gated_residual", _backward)[(b * runs,)](
            *(dy, branch, gate, bias, dbranch, sums, t, d, block, SUMMED_ROWS), num_warps=warps, enable_fp_fusion=False
        )
    dgate, total = sums.sum(1).unbind(1)
    return dbranch, dgate.contiguous(), (gate.float() * total).sum(0)


@_residual_backward.register_fake
def _(dy, branch, gate, bias):
    b, t, d = branch.shape
    sums = (branch.new_empty(shape, dtype=torch.float32) for shape in ((b, d), (d,)))
    return branch.new_empty(b, t, d), *sums


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:4])


@transforms.once("gated_residual")
def _gradient(ctx, dy, _):
    if dy is None:
        return (None,) * 8
    branch, gate, bias = ctx.saved_tensors
    dbranch, dgate, dbias = _residual_backward(dy, branch, gate, bias)
    return dy, dbranch, dgate.to(gate.dtype), None if bias is None else dbias.to(bias.dtype), *(None,) * 4


_residual.register_autograd(_gradient, setup_context=_save)


def gated_residual(
    x: Tensor | Dual, branch: Tensor | Dual, gate: Tensor | Dual, bias: Tensor | None = None
) -> Tensor | Dual:
    transforms.refuse("gated_residual", "triton")
    k = rows(x, branch, gate)
    y, y_dot = _residual(*map(value, (x, branch, gate)), bias, *map(tangent, (x, branch, gate)), k or 0)
    return paired(y, y_dot, k)


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward at the widths of DiT-S, B, L and XL."""
    found = []
    inputs, dots = {"branch": "x", "gate": "x", "bias": "x"}, ("x_dot", "branch_dot", "gate_dot", "y_dot")
    for d in WIDTHS:
        block, warps = cut(d, COLUMNS)
        sizes = {"D": d, "BLOCK": block}
        forward = inputs | dict.fromkeys(("x", *dots, "y"), "x")
        found += variants(f"forward D{d}", _forward, forward, ("T", "k"), sizes | {"ROWS": ROWS}, warps, dots, STREAM)
        backward = inputs | {"dy": "x", "dbranch": "x", "sums": "fp32"}
        sizes |= {"ROWS": SUMMED_ROWS}
        found += variants(f"backward D{d}", _backward, backward, ("T",), sizes, warps, (), STREAM)
    return found
