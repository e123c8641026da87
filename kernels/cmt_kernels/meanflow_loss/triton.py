"""meanflow_loss in Triton: loss and gradient in one launch, one program an image.

The weight needs the whole image's error, so a program walks its image twice: once to sum, once to write
du = 2 w e. The first chunk stays in registers; a longer image is read again, from L2. The backward multiplies du by
the gradient that arrives and reads nothing else; the rows of the tangents are read in the same launch. Squares are
summed in float64, two operations for at least eight bytes read, and the per-row scalars (error, weight, loss) are too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.dual import Dual, tangent, value
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

BLOCK = 4096
WARPS = 8
FAR = tl.constexpr(2.0**100)


@triton.jit
def residual(u, v, u_dot, dt, row, i, n, n_dot, wide: tl.constexpr):
    """e = u - (v - (t - r) u.) of values i of one image; its first n_dot values (n or 0) have a tangent."""
    at = row * n + i
    inside = i < n
    target = tl.load(v + at, mask=inside, other=0.0).to(wide)
    if u_dot is not None:
        target -= dt * tl.load(u_dot + at, mask=i < n_dot, other=0.0).to(wide)
    return tl.load(u + at, mask=inside, other=0.0).to(wide) - target


@triton.jit(do_not_specialize=["k"])
def loss_kernel(
    u,
    v,
    u_dot,
    t,
    r,
    loss,
    squared,
    du,
    k,
    n,
    P: tl.constexpr,
    C: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Image program_id(0) of n values in ROUNDS chunks; u_dot and du may be None."""
    wide: tl.constexpr = tl.float64 if u.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    dt = tl.load(t + row).to(tl.float64) - tl.load(r + row).to(tl.float64)
    dt = dt.to(wide)
    n_dot = tl.where(row < k, n, 0)
    lane = tl.arange(0, BLOCK)
    first = residual(u, v, u_dot, dt, row, lane, n, n_dot, wide)
    total = first.to(tl.float64) * first.to(tl.float64)
    for j in range(1, ROUNDS):
        e = residual(u, v, u_dot, dt, row, j * BLOCK + lane, n, n_dot, wide)
        total += e.to(tl.float64) * e.to(tl.float64)
    error = tl.sum(total, axis=0)
    if P == 0.0:
        weight = error * 0 + 1
    elif P == 1.0:
        weight = 1 / (error + C)
    else:
        weight = tl.exp(-P * tl.log(error + C))
    tl.store(loss + row, (weight * error).to(wide))
    tl.store(squared + row, error.to(wide))
    if du is not None:
        # 2 w, which fp32 makes 0 of an error beyond 1e38: there in two factors
        root = tl.sqrt(2 * weight)
        scale = tl.where(error > FAR, root, 2 * weight).to(wide)
        again = tl.where(error > FAR, root, 1.0).to(wide)
        tl.store(du + row * n + lane, scale * first * again, mask=lane < n)
        for j in range(1, ROUNDS):
            i = j * BLOCK + lane
            e = residual(u, v, u_dot, dt, row, i, n, n_dot, wide)
            tl.store(du + row * n + i, scale * e * again, mask=i < n)


@torch.library.custom_op("cmt::triton_meanflow_loss", mutates_args=())
def _launch(
    u: Tensor, v: Tensor, u_dot: Tensor | None, t: Tensor, r: Tensor, p: float, c: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (B,), squared error (B,), du (B, ...), or du (0,) when no gradient is wanted)."""
    u, v, t, r = (x.contiguous() for x in (u, v, t, r))
    rows, k = len(u), 0 if u_dot is None else len(u_dot)
    n = u.numel() // max(rows, 1)
    loss, squared = u.new_empty(rows), u.new_empty(rows)
    du = torch.empty_like(u) if with_gradient else None
    if rows:
        block = min(BLOCK, triton.next_power_of_2(max(n, 1)))
        placed("meanflow_loss", loss_kernel)[(rows,)](
            u,
            v,
            u_dot.contiguous() if k else None,
            t,
            r,
            loss,
            squared,
            du,
            k,
            n,
            P=p,
            C=c,
            ROUNDS=max(triton.cdiv(n, block), 1),
            BLOCK=block,
            num_warps=WARPS if block == BLOCK else 4,
        )
    return loss, squared, u.new_empty(0) if du is None else du


@_launch.register_fake
def _(u, v, u_dot, t, r, p, c, with_gradient):
    du = torch.empty_like(u, memory_format=torch.contiguous_format) if with_gradient else u.new_empty(0)
    return u.new_empty(len(u)), u.new_empty(len(u)), du


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


@transforms.once("meanflow_loss")
def _backward(ctx, grad: Tensor | None, grad_squared: Tensor | None, grad_du: Tensor | None):
    assert grad_squared is None and grad_du is None, "meanflow_loss has no second derivative in Triton"
    (du,) = ctx.saved_tensors
    gradient = None if grad is None else du * grad.to(du.dtype).view(-1, *[1] * (du.ndim - 1))
    return gradient, None, None, None, None, None, None, None


_launch.register_autograd(_backward, setup_context=_save)


def meanflow_loss(
    u: Tensor | Dual, v: Tensor, t: Tensor, r: Tensor, p: float = 1.0, c: float = 1e-2
) -> tuple[Tensor, Tensor]:
    """As the public function; p and c are compile-time constants of the kernel. No second derivative."""
    transforms.refuse("meanflow_loss", "triton")
    u_v, u_dot = value(u), tangent(u)
    assert u_v.shape == v.shape and t.shape == r.shape == u_v.shape[:1], "meanflow_loss: shapes of u, v, t, r"
    with_gradient = torch.is_grad_enabled() and u_v.requires_grad
    loss, squared, _ = _launch(u_v, v.detach(), u_dot, t.detach(), r.detach(), float(p), float(c), with_gradient)
    return loss, squared.detach()


def gates() -> list[Gate]:
    """32x32x4 latents (one chunk) and 768x16x16 latents (48), with and without tangents, the exponents of the papers."""
    rows = []
    for kind, n, p, dual in (
        ("fp32", 4096, 1.0, False),
        ("fp32", 4096, 1.0, True),
        ("fp32", 4096, 0.75, True),
        ("fp32", 4096, 0.0, True),
        ("fp32", 16384, 1.0, True),
        ("fp32", 196608, 1.0, True),
        ("bf16", 4096, 1.0, True),
        ("bf16", 196608, 1.0, True),
    ):
        pointers = {"u": kind, "v": "fp32", "t": "fp32", "r": "fp32", "loss": kind, "squared": kind, "du": kind}
        pointers |= {"u_dot": kind} if dual else {}
        constexprs = {"P": p, "C": 1e-2, "ROUNDS": n // BLOCK, "BLOCK": BLOCK} | ({} if dual else {"u_dot": None})
        signature = {name: f"*{of}" for name, of in pointers.items()} | {"k": "i32", "n": "i32:16"}
        name = f"{kind}-n{n}-p{p:g}" + "-dual" * dual
        rows.append(Gate(name, loss_kernel, signature, constexprs, num_warps=WARPS))
    return rows
