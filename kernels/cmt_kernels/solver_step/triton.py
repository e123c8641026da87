"""solver_step in Triton: one launch, every operand read once, sums in float32 (float64 for float64).

Coefficients stay on the device and every result can be written into memory that is there already, so a rollout is
capturable in a CUDA graph; a row of a table on the CPU is copied over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.gate import Gate
from cmt_kernels.launch import placed

BLOCK = 1024


@triton.jit
def step_kernel(x, f, m1, m2, coefficients, y, m0, net_in, n, null, GUIDED: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, chunk) of a (rows, n) view; `coefficients` (rows, 8); m1, m2 may be None, and m0 with net_in; `null`:
    elements before the unconditional half of f."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    chunks = tl.cdiv(n, BLOCK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    i = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    at = row * n + i
    c = coefficients + row * 8
    state = tl.load(x + at, mask=inside).to(wide)
    prediction = tl.load(f + at, mask=inside).to(wide)
    if GUIDED:
        unconditional = tl.load(f + null + at, mask=inside).to(wide)
        prediction = unconditional + tl.load(c + 2).to(wide) * (prediction - unconditional)
    prediction = tl.load(c).to(wide) * state + tl.load(c + 1).to(wide) * prediction
    total = tl.load(c + 3).to(wide) * state + tl.load(c + 4).to(wide) * prediction
    if m1 is not None:
        total += tl.load(c + 5).to(wide) * tl.load(m1 + at, mask=inside).to(wide)
    if m2 is not None:
        total += tl.load(c + 6).to(wide) * tl.load(m2 + at, mask=inside).to(wide)
    tl.store(y + at, total, mask=inside)
    if m0 is not None:
        tl.store(m0 + at, prediction, mask=inside)
        tl.store(net_in + at, tl.load(c + 7).to(wide) * total, mask=inside)


@torch.library.custom_op("cmt::triton_solver_step", mutates_args=("y", "m0", "net_in"))
def _launch(
    x: Tensor,
    f: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coefficients: Tensor,
    y: Tensor,
    m0: Tensor | None,
    net_in: Tensor | None,
) -> None:
    x, f, m1, m2 = (None if a is None else a.contiguous() for a in (x, f, m1, m2))
    coefficients = coefficients.to(x.device).contiguous()
    rows = x.shape[0] if coefficients.ndim == 2 else 1
    n = x.numel() // max(rows, 1)
    if n:
        block = min(BLOCK, triton.next_power_of_2(n))
        placed("solver_step", step_kernel)[(rows * triton.cdiv(n, block),)](
            x, f, m1, m2, coefficients, y, m0, net_in, n, x.numel(), GUIDED=len(f) == 2 * len(x), BLOCK=block
        )


@_launch.register_fake
def _(*arguments) -> None:
    return None


def solver_step(
    x: Tensor,
    f: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coefficients: Tensor,
    keep: bool = True,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the public function. Earlier predictions may be of another dtype than x; shapes must be equal."""
    transforms.refuse("solver_step", "triton")
    assert all(m is None or m.shape == x.shape for m in (m1, m2, y)), "solver_step: tensors not shaped like x"
    assert f.shape[1:] == x.shape[1:] and len(f) in (len(x), 2 * len(x)), "solver_step: outputs not shaped like x"
    fresh = lambda dtype: torch.empty(x.shape, dtype=dtype, device=x.device)
    out = y if y is not None and y.is_contiguous() else fresh(x.dtype)
    m0, net_in = (fresh(x.dtype), fresh(f.dtype)) if keep else (None, None)
    _launch(x, f, m1, m2, coefficients, out, m0, net_in)
    return (out if y is None or y is out else y.copy_(out)), m0, net_in


def gates() -> list[Gate]:
    """State in fp32, network output in fp32 or bf16, orders 1 to 3, coefficients in float64 as the tables give them."""
    rows = []
    variants = [(order, guided, True) for order in (1, 2, 3) for guided in (False, True)] + [(3, True, False)]
    for kind in ("fp32", "bf16"):
        for order, guided, keep in variants:
            given = {"m1": order > 1, "m2": order > 2, "m0": keep, "net_in": keep}
            types = dict.fromkeys(("x", "y", "m1", "m2", "m0"), "*fp32") | {"f": f"*{kind}", "net_in": f"*{kind}"}
            types |= {"coefficients": "*fp64", "n": "i32:16", "null": "i32:16"}
            constexprs = {"GUIDED": guided, "BLOCK": BLOCK} | {m: None for m, here in given.items() if not here}
            name = f"{kind}-order{order}{'-guided' * guided}{'-last' * (not keep)}"
            rows.append(Gate(name, step_kernel, {a: t for a, t in types.items() if a not in constexprs}, constexprs))
    return rows
