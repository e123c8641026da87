"""consistency_loss in Triton: distance and gradient in one launch, one program an image.

As meanflow_loss: the first walk sums (prediction - target)^2 in float64, the second writes the gradient, the first chunk
stays in registers. The backward multiplies by the gradient that arrives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

BLOCK = 4096
WARPS = 8
DISTANCES = ("squared_l2", "l2", "pseudo_huber")


@triton.jit
def difference(prediction, target, row, i, n, wide: tl.constexpr):
    """prediction - target at values i of one image, 0 past its end."""
    at = row * n + i
    a = tl.load(prediction + at, mask=i < n, other=0.0).to(wide)
    return a - tl.load(target + at, mask=i < n, other=0.0).to(wide)


@triton.jit
def distance_kernel(
    prediction,
    target,
    loss,
    gradient,
    n,
    DISTANCE: tl.constexpr,
    C: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Image program_id(0) of n values in ROUNDS chunks; gradient may be None."""
    wide: tl.constexpr = tl.float64 if prediction.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = difference(prediction, target, row, lane, n, wide)
    total = first.to(tl.float64) * first.to(tl.float64)
    for j in range(1, ROUNDS):
        e = difference(prediction, target, row, j * BLOCK + lane, n, wide)
        total += e.to(tl.float64) * e.to(tl.float64)
    error = tl.sum(total, axis=0)
    if DISTANCE == "squared_l2":
        distance = error
        slope = error * 0 + 2
    elif DISTANCE == "l2":
        distance = tl.sqrt(error + 1e-16)
        slope = 1 / distance
    else:
        root = tl.sqrt(error + C * C)
        distance = root - C
        slope = 1 / root
    tl.store(loss + row, distance.to(wide))
    if gradient is not None:
        # in float64: 1 / distance has no digits in fp32 where the distance is near its largest number
        tl.store(gradient + row * n + lane, (slope * first.to(tl.float64)).to(wide), mask=lane < n)
        for j in range(1, ROUNDS):
            i = j * BLOCK + lane
            e = difference(prediction, target, row, i, n, wide)
            tl.store(gradient + row * n + i, (slope * e.to(tl.float64)).to(wide), mask=i < n)


@torch.library.custom_op("cmt::triton_consistency_loss", mutates_args=())
def _launch(prediction: Tensor, target: Tensor, distance: str, c: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """(loss (B,), gradient (B, ...), or gradient (0,) when none is wanted)."""
    prediction, target = prediction.contiguous(), target.contiguous()
    rows = len(prediction)
    n = prediction.numel() // max(rows, 1)
    loss = prediction.new_empty(rows)
    gradient = torch.empty_like(prediction) if with_gradient else None
    if rows:
        block = min(BLOCK, triton.next_power_of_2(max(n, 1)))
        placed("consistency_loss", distance_kernel)[(rows,)](
            prediction,
            target,
            loss,
            gradient,
            n,
            DISTANCE=distance,
            C=c,
            ROUNDS=max(triton.cdiv(n, block), 1),
            BLOCK=block,
            num_warps=WARPS if block == BLOCK else 4,
        )
    return loss, prediction.new_empty(0) if gradient is None else gradient


@_launch.register_fake
def _(prediction, target, distance, c, with_gradient):
    contiguous = torch.contiguous_format
    gradient = torch.empty_like(prediction, memory_format=contiguous) if with_gradient else prediction.new_empty(0)
    return prediction.new_empty(len(prediction)), gradient


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


@transforms.once("consistency_loss")
def _backward(ctx, grad: Tensor | None, grad_gradient: Tensor | None):
    assert grad_gradient is None, "consistency_loss has no second derivative in Triton"
    (gradient,) = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    return gradient * grad.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1)), None, None, None, None


_launch.register_autograd(_backward, setup_context=_save)


def consistency_loss(prediction: Tensor, target: Tensor, distance: str = "pseudo_huber", c: float = 0.01) -> Tensor:
    """As the public function; the distance and c are compile-time constants of the kernel. No second derivative."""
    transforms.refuse("consistency_loss", "triton")
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r} is none of {', '.join(DISTANCES)}")
    assert prediction.shape == target.shape, "consistency_loss: prediction and target differ in shape"
    with_gradient = torch.is_grad_enabled() and prediction.requires_grad
    return _launch(prediction, target.detach(), distance, float(c), with_gradient)[0]


def gates() -> list[Gate]:
    """Every distance on 3x32x32 pixels (one masked chunk); the default on latents of one, four and 48 chunks."""
    rows = []
    for kind, n, distance in (
        *(("fp32", 3072, distance) for distance in DISTANCES),
        ("fp32", 4096, "pseudo_huber"),
        ("fp32", 16384, "pseudo_huber"),
        ("fp32", 196608, "pseudo_huber"),
        ("bf16", 4096, "pseudo_huber"),
        ("bf16", 196608, "pseudo_huber"),
    ):
        signature = {name: f"*{kind}" for name in ("prediction", "target", "loss", "gradient")} | {"n": "i32:16"}
        constexprs = {"DISTANCE": distance, "C": 0.01, "ROUNDS": triton.cdiv(n, BLOCK), "BLOCK": BLOCK}
        rows.append(Gate(f"{kind}-n{n}-{distance}", distance_kernel, signature, constexprs, num_warps=WARPS))
    return rows
