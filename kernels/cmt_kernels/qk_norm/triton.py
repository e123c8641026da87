"""qk_norm in Triton: a program owns GROUP of the 3 H heads of a token, values among them, as two halves of d / 2 columns.

The halves are what RoPE turns. The backward goes over several tokens with the same heads, so that the weights' gradients
stay in registers; it recomputes 1 / rms, which costs less than reading it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels._row.triton import LARGEST, SHRUNK, SUMMED_ROWS, checked, chunks, paired, variants
from cmt_kernels.dual import Dual
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

GROUP = 16  # heads of a program
WARPS = 4
HEADS = {64: 12, 72: 16}  # head dim -> heads, of the gates: DiT-B and DiT-XL


@triton.jit
def _halves(base, heads, H: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves of `heads` (GROUP,) of the 3 H of one token at `base`: (GROUP, BLOCK) each, fp32, 0 outside."""
    half: tl.constexpr = (d + 1) // 2
    cols = tl.arange(0, BLOCK)[None, :]
    at = base + heads[:, None] * d + cols
    there = heads[:, None] < 3 * H
    a = tl.load(at, mask=there & (cols < half), other=0.0).to(tl.float32)
    return a, tl.load(at + half, mask=there & (cols < d - half), other=0.0).to(tl.float32)


@triton.jit
def _write(base, heads, a, b, H: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr):
    half: tl.constexpr = (d + 1) // 2
    cols = tl.arange(0, BLOCK)[None, :]
    at = base + heads[:, None] * d + cols
    there = heads[:, None] < 3 * H
    tl.store(at, a, mask=there & (cols < half))
    tl.store(at + half, b, mask=there & (cols < d - half))


@triton.jit
def _weights(q_weight, k_weight, heads, H: tl.constexpr, d: tl.constexpr, BLOCK: tl.constexpr):
    """The weights of each head's rows, in halves: those of queries, of keys, 1 for values."""
    half: tl.constexpr = (d + 1) // 2
    cols = tl.arange(0, BLOCK)
    one, two = cols < half, cols < d - half
    q_a, q_b = (tl.load(q_weight + cols, mask=one, other=0.0), tl.load(q_weight + half + cols, mask=two, other=0.0))
    k_a, k_b = (tl.load(k_weight + cols, mask=one, other=0.0), tl.load(k_weight + half + cols, mask=two, other=0.0))
    is_q, is_k = heads[:, None] < H, heads[:, None] < 2 * H
    a = tl.where(is_q, q_a.to(tl.float32)[None, :], tl.where(is_k, k_a.to(tl.float32)[None, :], 1.0))
    return a, tl.where(is_q, q_b.to(tl.float32)[None, :], tl.where(is_k, k_b.to(tl.float32)[None, :], 1.0))


@triton.jit
def _normalised(a, b, is_qk, eps, d: tl.constexpr):
    """Rows over their rms and 1 / rms, (GROUP, 1); 0 and 1 for values, whose infinities must meet no Jacobian.

    A row whose squares overflow is taken smaller first (`SHRUNK`).
    """
    squares = tl.sum(a * a + b * b, 1)
    size = tl.where(squares <= LARGEST, 1.0, SHRUNK)
    if tl.min(size, 0) < 1.0:  # run time, the same for the whole program
        small_a, small_b = a * size[:, None], b * size[:, None]
        squares = tl.sum(small_a * small_a + small_b * small_b, 1)
    r = tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(squares / d + eps * size * size))[:, None]
    size = size[:, None]
    zero = tl.zeros(a.shape, tl.float32)
    return tl.where(is_qk, a * size * r, zero), tl.where(is_qk, b * size * r, zero), tl.where(is_qk, r * size, 1.0)


@triton.jit
def _turn(a, b, cos, sin, t, turns, d: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """RoPE of the rows that turn, by the angles of token t; BACK turns the other way (its transpose)."""
    cols = tl.arange(0, BLOCK)
    c = tl.load(cos + t * (d // 2) + cols, mask=cols < d // 2, other=1.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * (d // 2) + cols, mask=cols < d // 2, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    return tl.where(turns, tl.fma(a, c, -(b * s)), a), tl.where(turns, tl.fma(b, c, a * s), b)


@triton.jit
def _forward(
    x,
    q_weight,
    k_weight,
    cos,
    sin,
    x_dot,
    y,
    y_dot,
    T,
    tangent_tokens,
    eps,
    H: tl.constexpr,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    is_qk = heads[:, None] < 2 * H
    start = token * (3 * H * d)
    a, b = _halves(x + start, heads, H, d, BLOCK)
    y_a, y_b = a, b
    if q_weight is not None:
        w_a, w_b = _weights(q_weight, k_weight, heads, H, d, BLOCK)
        a, b, r = _normalised(a, b, is_qk, eps, d)
        y_a, y_b = tl.where(is_qk, a * w_a, y_a), tl.where(is_qk, b * w_b, y_b)
    if cos is not None:
        y_a, y_b = _turn(y_a, y_b, cos, sin, token % T, is_qk, d, BLOCK, False)
    _write(y + start, heads, y_a, y_b, H, d, BLOCK)
    if y_dot is not None:  # noqa: SIM102  (compile time)
        if token < tangent_tokens:  # run time, the same for the whole program
            t_a, t_b = _halves(x_dot + start, heads, H, d, BLOCK)
            if q_weight is not None:
                inner = tl.where(is_qk, (tl.sum(a * t_a + b * t_b, 1) / d)[:, None], 0.0)
                t_a, t_b = (t_a - a * inner) * r * w_a, (t_b - b * inner) * r * w_b
            if cos is not None:
                t_a, t_b = _turn(t_a, t_b, cos, sin, token % T, is_qk, d, BLOCK, False)
            _write(y_dot + start, heads, t_a, t_b, H, d, BLOCK)


@triton.jit
def _backward(
    dy,
    x,
    q_weight,
    k_weight,
    cos,
    sin,
    dx,
    sums,
    N,
    T,
    eps,
    H: tl.constexpr,
    d: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """dx, and in sums (programs, 2, d) the partial sums of the gradients of q_weight and k_weight."""
    heads = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    is_qk = heads[:, None] < 2 * H
    dw_a = tl.zeros((GROUP, BLOCK), tl.float32)
    dw_b = tl.zeros((GROUP, BLOCK), tl.float32)
    if q_weight is not None:
        w_a, w_b = _weights(q_weight, k_weight, heads, H, d, BLOCK)
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        if token < N:
            start = token * (3 * H * d)
            g_a, g_b = _halves(dy + start, heads, H, d, BLOCK)
            if cos is not None:
                g_a, g_b = _turn(g_a, g_b, cos, sin, token % T, is_qk, d, BLOCK, True)
            if q_weight is not None:
                a, b = _halves(x + start, heads, H, d, BLOCK)
                a, b, r = _normalised(a, b, is_qk, eps, d)
                dw_a, dw_b = tl.fma(g_a, a, dw_a), tl.fma(g_b, b, dw_b)
                g_a, g_b = g_a * w_a, g_b * w_b
                inner = tl.where(is_qk, (tl.sum(g_a * a + g_b * b, 1) / d)[:, None], 0.0)
                g_a, g_b = (g_a - a * inner) * r, (g_b - b * inner) * r
            _write(dx + start, heads, g_a, g_b, H, d, BLOCK)
    if q_weight is not None:
        half: tl.constexpr = (d + 1) // 2
        cols = tl.arange(0, BLOCK)
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        out = sums + program * 2 * d + cols
        is_q, is_k = heads[:, None] < H, (heads[:, None] >= H) & is_qk
        tl.store(out, tl.sum(tl.where(is_q, dw_a, 0.0), 0), mask=cols < half)
        tl.store(out + half, tl.sum(tl.where(is_q, dw_b, 0.0), 0), mask=cols < d - half)
        tl.store(out + d, tl.sum(tl.where(is_k, dw_a, 0.0), 0), mask=cols < half)
        tl.store(out + d + half, tl.sum(tl.where(is_k, dw_b, 0.0), 0), mask=cols < d - half)


def _block(d: int) -> int:
    return max(triton.next_power_of_2((d + 1) // 2), 16)


@torch.library.custom_op("cmt_triton::qk_norm", mutates_args=())
def _qk_norm(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    qkv_dot: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, 3, H, d) and its tangent (k, T, 3, H, d)."""
    qkv, *parameters, qkv_dot = checked("qk_norm", qkv, q_weight, k_weight, cos, sin, qkv_dot)
    b, t, _, h, d = qkv.shape
    k = 0 if qkv_dot is None else len(qkv_dot)
    y, y_dot = torch.empty_like(qkv), qkv.new_empty(k, t, 3, h, d)
    if qkv.numel():
        tangents = (qkv_dot, y, y_dot) if k else (None, y, None)
        placed("qk_norm", _forward)[(b * t, chunks(3 * h, GROUP))](
            *(qkv, *parameters, *tangents, t, k * t, eps, h, d, _block(d), GROUP),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return y, y_dot


@_qk_norm.register_fake
def _(qkv, q_weight, k_weight, cos, sin, qkv_dot, eps):
    return qkv.new_empty(qkv.shape), qkv.new_empty(0 if qkv_dot is None else qkv_dot.shape[0], *qkv.shape[1:])


@torch.library.custom_op("cmt_triton::qk_norm_backward", mutates_args=())
def _qk_norm_backward(
    dy: Tensor,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dqkv (B, T, 3, H, d) and, in fp32, (2, d): the gradients of q_weight and k_weight."""
    dy, qkv, *parameters = checked("qk_norm", dy, qkv, q_weight, k_weight, cos, sin)
    b, t, _, h, d = qkv.shape
    runs, groups = chunks(b * t, SUMMED_ROWS), chunks(3 * h, GROUP)
    dx = torch.empty_like(qkv)
    sums = qkv.new_empty(runs * groups if q_weight is not None else 0, 2, d, dtype=torch.float32)
    if qkv.numel():
        placed("qk_norm", _backward)[(runs, groups)](
            *(dy, qkv, *parameters, dx, sums, b * t, t, eps, h, d, _block(d), GROUP, SUMMED_ROWS),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return dx, sums.sum(0)


@_qk_norm_backward.register_fake
def _(dy, qkv, q_weight, k_weight, cos, sin, eps):
    return qkv.new_empty(qkv.shape), qkv.new_empty(2, qkv.shape[-1], dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.eps = inputs[6]


@transforms.once("qk_norm")
def _gradient(ctx, dy, _):
    if dy is None:
        return (None,) * 7
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dx, dw = _qk_norm_backward(dy, qkv, q_weight, k_weight, cos, sin, ctx.eps)
    dq, dk = (None if w is None else g.to(w.dtype) for w, g in zip((q_weight, k_weight), dw.unbind(0)))
    return dx, dq, dk, None, None, None, None


_qk_norm.register_autograd(_gradient, setup_context=_save)


def qk_norm(
    qkv: Tensor | Dual,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | Dual:
    transforms.refuse("qk_norm", "triton")
    if q_weight is None and cos is None:
        return qkv
    if not isinstance(qkv, Dual):
        return _qk_norm(qkv, q_weight, k_weight, cos, sin, None, eps)[0]
    return paired(*_qk_norm(qkv.value, q_weight, k_weight, cos, sin, qkv.tangent, eps), len(qkv.tangent))


def gates() -> list[Gate]:
    """Forward, plain and dual, and backward at head dims 64 and 72: norm and RoPE together."""
    found = []
    inputs = dict.fromkeys(("x", "q_weight", "k_weight", "cos", "sin"), "x")
    for d, heads in HEADS.items():
        sizes, dots = {"H": heads, "d": d, "BLOCK": _block(d), "GROUP": GROUP}, ("x_dot", "y_dot")
        forward = inputs | dict.fromkeys(("y", *dots), "x")
        found += variants(f"forward d{d}", _forward, forward, ("T", "tangent_tokens", "eps"), sizes, WARPS, dots)
        backward = inputs | {"dy": "x", "dx": "x", "sums": "fp32"}
        sizes = sizes | {"TOKENS": SUMMED_ROWS}
        found += variants(f"backward d{d}", _backward, backward, ("N", "T", "eps"), sizes, WARPS, ())
    return found
