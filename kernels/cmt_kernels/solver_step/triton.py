"""solver_step in Triton: one launch, every operand read once, sums in float32 (float64 for float64).

Coefficients stay on the device, so a step is capturable in a CUDA graph; a row of a table on the CPU is copied over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels.gate import Gate

BLOCK = 1024


@triton.jit
def step_kernel(x, m0, m1, m2, coefficients, y, n, BLOCK: tl.constexpr):
    """Program (row, chunk) of a (rows, n) view; `coefficients` (rows, 4); m1, m2 may be None."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    chunks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = row * n + i
    c = coefficients + row * 4
    total = tl.load(c).to(wide) * tl.load(x + at, mask=inside).to(wide)
    total += tl.load(c + 1).to(wide) * tl.load(m0 + at, mask=inside).to(wide)
    if m1 is not None:
        total += tl.load(c + 2).to(wide) * tl.load(m1 + at, mask=inside).to(wide)
    if m2 is not None:
        total += tl.load(c + 3).to(wide) * tl.load(m2 + at, mask=inside).to(wide)
    tl.store(y + at, total, mask=inside)


@torch.library.custom_op("cmt::triton_solver_step", mutates_args=())
def _launch(x: Tensor, m0: Tensor, m1: Tensor | None, m2: Tensor | None, coefficients: Tensor) -> Tensor:
    x, m0, m1, m2 = (None if a is None else a.contiguous() for a in (x, m0, m1, m2))
    coefficients = coefficients.to(x.device).contiguous()
    y = torch.empty_like(x)
    rows = x.shape[0] if coefficients.ndim == 2 else 1
    n = x.numel() // max(rows, 1)
    if n:
        block = min(BLOCK, triton.next_power_of_2(n))
        step_kernel[(rows * triton.cdiv(n, block),)](x, m0, m1, m2, coefficients, y, n, BLOCK=block)
    return y


@_launch.register_fake
def _(x: Tensor, m0: Tensor, m1: Tensor | None, m2: Tensor | None, coefficients: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def solver_step(x: Tensor, m0: Tensor, m1: Tensor | None, m2: Tensor | None, coefficients: Tensor) -> Tensor:
    """As the public function. Predictions may be of another dtype than x; shapes must be equal."""
    assert all(m is None or m.shape == x.shape for m in (m0, m1, m2)), "solver_step: predictions not shaped like x"
    return _launch(x, m0, m1, m2, coefficients)


def gates() -> list[Gate]:
    """State and predictions in fp32 or bf16, orders 1 to 3, coefficients in float64 as the tables give them."""
    rows = []
    for kind in ("fp32", "bf16"):
        for order in (1, 2, 3):
            given = {"m1": order > 1, "m2": order > 2}
            signature = {"x": f"*{kind}", "m0": f"*{kind}", "coefficients": "*fp64", "y": f"*{kind}", "n": "i32:16"}
            signature |= {m: f"*{kind}" for m, here in given.items() if here}
            constexprs = {"BLOCK": BLOCK} | {m: None for m, here in given.items() if not here}
            rows.append(Gate(f"{kind}-order{order}", step_kernel, signature, constexprs))
    return rows
