"""adamw_ema in Triton: a pass for the gradient's norm, then one for clip, moments, parameters and every EMA track.

Squares are summed in float64, where none of fp32 overflows: of a gradient beyond 1.8e19 fp32 would make the norm infinite
and its clipping a step of nothing. The norm stays on the device: the first launch leaves partial sums of squares, every
program of the second adds them up itself (at most PARTS numbers, from L2) and program 0 writes the result. Nothing waits
for the host, the order of every sum is fixed, and step and lr reach the kernel only inside float arguments, so no step
compiles anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.adamw_ema.reference import put
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

BLOCK = 2048  # parameters a program of the update
NORM_BLOCK = 4096  # gradients a program of the norm takes at a time
PARTS = 512  # most programs of the norm
FAR = tl.constexpr(2.0**64)  # norms beyond it: a gradient is multiplied by the clip's ratio in two factors
TRACKS = 4  # EMA tracks in the update's launch; more of them cost a pass each
SCALARS = ["b2", "one_b1", "one_b2", "decay", "size", "root", "eps", "max_norm", "w0", "w1", "w2", "w3"]


@triton.jit
def norm_kernel(g, partial, n, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """partial[program_id(0)] = the sum of g^2 over ROUNDS blocks, a grid apart from each other, in float64."""
    pid = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for j in range(ROUNDS):
        i = (j * tl.num_programs(0) + pid).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(g + i, mask=i < n, other=0.0).to(tl.float64)
        total += x * x
    tl.store(partial + pid, tl.sum(total, axis=0))


@triton.jit
def follow(e, i, inside, p, weight):
    """e <- e + weight (p - e) for one EMA track."""
    old = tl.load(e + i, mask=inside)
    tl.store(e + i, old + weight * (p - old), mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def update_kernel(
    p,
    g,
    m,
    v,
    e0,
    e1,
    e2,
    e3,
    half,
    partial,
    norm,
    n,
    parts,
    b2,
    one_b1,
    one_b2,
    decay,
    size,
    root,
    eps,
    max_norm,
    w0,
    w1,
    w2,
    w3,
    CLIP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """decay = 1 - lr wd, size = lr / (1 - b1^n), root = sqrt(1 - b2^n). Tracks that are not there are None, so is
    half, which gets p in bf16."""
    lane = tl.arange(0, PARTS)
    length = tl.sqrt(tl.sum(tl.load(partial + lane, mask=lane < parts, other=0.0), axis=0))
    if tl.program_id(0) == 0:
        tl.store(norm, tl.where(length < float("inf"), length, float("nan")).to(tl.float32))
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    end = tl.where(length < float("inf"), n, 0)  # a norm that is not finite: nothing is loaded or stored
    inside = i < end
    x = tl.load(g + i, mask=inside)
    if CLIP:
        ratio = max_norm / (length + 1e-6)
        ratio = tl.where(ratio > 1.0, 1.0, ratio)
        down = tl.where(length > FAR, 1.0 / FAR, 1.0)  # in two factors: neither leaves the numbers of fp32
        x = x * down.to(tl.float32) * (ratio * (1.0 / down)).to(tl.float32)
    first = tl.load(m + i, mask=inside)
    first += one_b1 * (x - first)
    second = tl.load(v + i, mask=inside, other=0.0) * b2 + one_b2 * x * x
    denominator = tl.div_rn(tl.sqrt_rn(second), root) + eps
    y = tl.load(p + i, mask=inside) * decay
    y -= size * tl.div_rn(first, denominator)
    tl.store(m + i, first, mask=inside)
    tl.store(v + i, second, mask=inside)
    tl.store(p + i, y, mask=inside)
    if e0 is not None:
        follow(e0, i, inside, y, w0)
    if e1 is not None:
        follow(e1, i, inside, y, w1)
    if e2 is not None:
        follow(e2, i, inside, y, w2)
    if e3 is not None:
        follow(e3, i, inside, y, w3)
    if half is not None:
        tl.store(half + i, y, mask=inside)


@torch.library.custom_op("cmt::triton_adamw_ema", mutates_args=("p", "m", "v", "emas", "half"))
def _launch(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    emas: list[Tensor],
    ema_betas: list[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_norm: float,
    half: Tensor | None,
) -> Tensor:
    n, g = p.numel(), g.contiguous()
    parts = max(min(PARTS, triton.cdiv(n, NORM_BLOCK)), 1)
    partial, norm = p.new_empty(parts, dtype=torch.float64), p.new_empty(())
    placed("adamw_ema", norm_kernel)[(parts,)](
        g, partial, n, ROUNDS=triton.cdiv(n, parts * NORM_BLOCK), BLOCK=NORM_BLOCK, num_warps=8
    )
    tracks = [*emas[:TRACKS], *[None] * (TRACKS - len(emas))]
    weights = [1 - beta for beta in ema_betas[:TRACKS]] + [0.0] * (TRACKS - len(emas))
    placed("adamw_ema", update_kernel)[(max(triton.cdiv(n, BLOCK), 1),)](
        p,
        g,
        m,
        v,
        *tracks,
        half,
        partial,
        norm,
        n,
        parts,
        beta2,
        1 - beta1,
        1 - beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** 0.5,
        eps,
        max_norm,
        *weights,
        CLIP=max_norm > 0,
        PARTS=triton.next_power_of_2(parts),
        BLOCK=BLOCK,
        num_warps=8,
    )
    for e, beta in zip(emas[TRACKS:], ema_betas[TRACKS:]):
        put(e, e.lerp(p, 1 - beta), norm)
    return norm


@_launch.register_fake
def _(p, g, m, v, emas, ema_betas, step, lr, beta1, beta2, eps, weight_decay, max_norm, half):
    return p.new_empty(())


@torch.no_grad()
def adamw_ema(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    emas: list[Tensor],
    ema_betas: list[float],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_norm: float = 0.0,
    half: Tensor | None = None,
) -> Tensor:
    """As the public function, for contiguous float32 buffers only; g is left as it was."""
    transforms.refuse("adamw_ema", "triton")
    for x in (p, g, m, v, *emas):
        if x.dtype != torch.float32 or x.shape != p.shape or not (x.is_contiguous() or x is g):
            raise ValueError("adamw_ema in Triton takes contiguous float32 buffers of one length")
    if half is not None and not (half.shape == p.shape and half.dtype == torch.bfloat16 and half.is_contiguous()):
        raise ValueError("adamw_ema in Triton takes a contiguous bfloat16 copy of the length of p")
    assert len(emas) == len(ema_betas), "adamw_ema: one beta a track"
    return _launch(p, g, m, v, list(emas), list(ema_betas), step, lr, *betas, eps, weight_decay, max_norm, half)


def gates() -> list[Gate]:
    """The norm over 2^22 and 675 M parameters; the update with 0 to 4 tracks, with and without clipping."""
    floats = dict.fromkeys(SCALARS, "fp32")
    rows = [
        Gate(
            f"norm-rounds{rounds}",
            norm_kernel,
            {"g": "*fp32", "partial": "*fp64", "n": "i32:16"},
            {"ROUNDS": rounds, "BLOCK": NORM_BLOCK},
            num_warps=8,
        )
        for rounds in (2, 323)
    ]
    several = ((0, False), (1, False), (1, True), (2, True), (3, True), (4, True))
    for tracks, clip, half in (*((*which, False) for which in several), (1, True, True), (4, True, True)):
        given = {f"e{i}": "*fp32" for i in range(tracks)}
        given |= {"half": "*bf16"} if half else {}
        missing = {f"e{i}": None for i in range(tracks, TRACKS)} | ({} if half else {"half": None})
        pointers = dict.fromkeys(("p", "g", "m", "v", "norm"), "*fp32") | {"partial": "*fp64"}
        signature = pointers | given | {"n": "i32:16", "parts": "i32:16"} | floats
        constexprs = {"CLIP": clip, "PARTS": PARTS, "BLOCK": BLOCK} | missing
        rows.append(
            Gate(
                f"update-emas{tracks}" + "-clip" * clip + "-half" * half,
                update_kernel,
                signature,
                constexprs,
                num_warps=8,
            )
        )
    return rows
