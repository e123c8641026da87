"""path_point in Triton: the noise is drawn where it is used, x_t and v leave in one launch.

The Philox integers are those of `cmt_kernels.philox` bit for bit: same counters, same key, exact arithmetic. Their map
to a normal number is the same formula in float32, but its log, cos and sin are those of the device (CUDA libdevice
here, SLEEF or libm in torch on a CPU), which differ in the last bits; so do the floats, and only the integers are equal
by construction. Products and sums are in float32 (float64 for float64) and rounded once to the dtype of x_0, the noise
included, which the reference rounds to that dtype first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed
from cmt_kernels.philox import Key

BLOCK = 256  # Philox counters a program, four numbers each
KEY = ["seed", "stage", "step", "stream"]


@triton.jit
def philox(c0, sample, seed, stage, step, stream):
    """Four uint32 for each counter c0 (uint32) of one sample (int64); the key's fields are int32 bit patterns."""
    zero = c0 * 0
    c1 = zero + sample.to(tl.uint32)
    c2 = zero + step.to(tl.uint32, bitcast=True)
    c3 = zero + stream.to(tl.uint32, bitcast=True)
    k0 = zero + seed.to(tl.uint32, bitcast=True)
    k1 = zero + stage.to(tl.uint32, bitcast=True)
    m0 = zero + 0xD2511F53
    m1 = zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(m0, c0), m0 * c0
        h1, l1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(b0, b1):
    """Two independent float32 normal numbers of two uint32."""
    radius = tl.sqrt_rn(-2.0 * tl.log((b0.to(tl.float32) + 0.5) * 2.3283064365386963e-10))  # 2^-32
    angle = b1.to(tl.float32) * 1.4629180792671596e-09  # 2 pi 2^-32
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def interleave4(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit(do_not_specialize=KEY)
def integers_kernel(out, sample, blocks, seed, stage, step, stream, BLOCK: tl.constexpr):
    """Row program_id(1), counters [program_id(0) BLOCK, + BLOCK): out (B, 4 blocks) int64."""
    row = tl.program_id(1)
    first = tl.program_id(0) * BLOCK
    c0 = (first + tl.arange(0, BLOCK)).to(tl.uint32)
    b0, b1, b2, b3 = philox(c0, tl.load(sample + row), seed, stage, step, stream)
    i = 4 * first + tl.arange(0, 4 * BLOCK)
    tl.store(out + row * 4 * blocks + i, interleave4(b0, b1, b2, b3).to(tl.int64), mask=i < 4 * blocks)


@triton.jit(do_not_specialize=KEY)
def point_kernel(
    x_0, alpha, sigma, alpha_dot, sigma_dot, sample, x_t, v, n, seed, stage, step, stream, BLOCK: tl.constexpr
):
    """Program (row, chunk of 4 BLOCK values) of x_0 (B, n)."""
    wide: tl.constexpr = tl.float64 if x_0.dtype.element_ty == tl.float64 else tl.float32
    chunks = tl.cdiv(n, 4 * BLOCK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * BLOCK
    c0 = (first + tl.arange(0, BLOCK)).to(tl.uint32)
    b0, b1, b2, b3 = philox(c0, tl.load(sample + row), seed, stage, step, stream)
    z0, z1 = box_muller(b0, b1)
    z2, z3 = box_muller(b2, b3)
    eps = interleave4(z0, z1, z2, z3).to(wide)
    i = 4 * first + tl.arange(0, 4 * BLOCK)
    inside = i < n
    at = row * n + i
    x = tl.load(x_0 + at, mask=inside).to(wide)
    point = tl.load(alpha + row).to(wide) * x + tl.load(sigma + row).to(wide) * eps
    velocity = tl.load(alpha_dot + row).to(wide) * x + tl.load(sigma_dot + row).to(wide) * eps
    tl.store(x_t + at, point, mask=inside)
    tl.store(v + at, velocity, mask=inside)


def _pattern(field: int) -> int:
    """The low 32 bits of a key's field as an int32, so that every key has one type and nothing recompiles."""
    return ((field + 2**31) & 0xFFFFFFFF) - 2**31


def integers(key: Key, sample: Tensor, blocks: int) -> Tensor:
    """`cmt_kernels.philox.integers` by the kernel's generator, for the tests. sample: (B,) -> (B, blocks, 4) int64."""
    out = torch.empty(len(sample), blocks, 4, dtype=torch.int64, device=sample.device)
    grid = (triton.cdiv(blocks, BLOCK), len(sample))
    placed("path_point", integers_kernel)[grid](
        out, sample.to(torch.int64).contiguous(), blocks, *map(_pattern, key), BLOCK=BLOCK
    )
    return out


@torch.library.custom_op("cmt::triton_path_point", mutates_args=())
def _launch(
    x_0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_dot: Tensor,
    sigma_dot: Tensor,
    sample: Tensor,
    seed: int,
    stage: int,
    step: int,
    stream: int,
) -> tuple[Tensor, Tensor]:
    x_0 = x_0.contiguous()
    alpha, sigma, alpha_dot, sigma_dot = (c.contiguous() for c in (alpha, sigma, alpha_dot, sigma_dot))
    x_t, v = torch.empty_like(x_0), torch.empty_like(x_0)
    n = x_0.numel() // max(len(x_0), 1)
    if n:
        block = min(BLOCK, triton.next_power_of_2(triton.cdiv(n, 4)))
        key = (_pattern(field) for field in (seed, stage, step, stream))
        placed("path_point", point_kernel)[(len(x_0) * triton.cdiv(n, 4 * block),)](
            x_0, alpha, sigma, alpha_dot, sigma_dot, sample.to(torch.int64).contiguous(), x_t, v, n, *key, BLOCK=block
        )
    return x_t, v


@_launch.register_fake
def _(x_0, alpha, sigma, alpha_dot, sigma_dot, sample, seed, stage, step, stream):
    return tuple(torch.empty_like(x_0, memory_format=torch.contiguous_format) for _ in range(2))


def path_point(
    x_0: Tensor, alpha: Tensor, sigma: Tensor, alpha_dot: Tensor, sigma_dot: Tensor, key: Key, sample: Tensor
) -> tuple[Tensor, Tensor]:
    """As the public function."""
    transforms.refuse("path_point", "triton")
    coefficients = (alpha, sigma, alpha_dot, sigma_dot)
    assert all(c.shape == x_0.shape[:1] for c in (*coefficients, sample)), "path_point: one coefficient and id a row"
    return _launch(x_0, *coefficients, sample, *key)


def gates() -> list[Gate]:
    """Images in fp32 and bf16 with times in fp32; times in float64 with fp32 images, as some objectives have them."""
    rows = []
    for kind, time in (("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "fp64")):
        signature = {"x_0": f"*{kind}", "sample": "*i64", "x_t": f"*{kind}", "v": f"*{kind}", "n": "i32:16"}
        signature |= dict.fromkeys(("alpha", "sigma", "alpha_dot", "sigma_dot"), f"*{time}") | dict.fromkeys(KEY, "i32")
        rows.append(Gate(f"{kind}-time-{time}", point_kernel, signature, {"BLOCK": BLOCK}))
    signature = {"out": "*i64", "sample": "*i64", "blocks": "i32:16"} | dict.fromkeys(KEY, "i32")
    return [*rows, Gate("integers", integers_kernel, signature, {"BLOCK": BLOCK})]
