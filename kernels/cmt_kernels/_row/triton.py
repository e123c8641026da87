"""What the row-wise Triton kernels share: how a row is cut, and what their launches say.

A program owns a few rows of one image, a row at a time, the columns in registers and fp32; the columns beyond D are
masked. Column sums (of shift, scale, gate, bias, weights) are fp32 partials, one row of them for each program, added
by a second pass: the same bits every time, no atomics. Sums and products are contracted only where the source says
`fma` (launches pass `enable_fp_fusion=False`), so that a kernel with a tangent gives bitwise the value of the one
without. Warps and rows per program are chosen from the registers that the gates print; none has been timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmt_kernels.dual import Dual
from cmt_kernels.gate import Gate

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = (384, 768, 1024, 1152)
ROWS = 4  # of a program of a forward
# A row whose sum of squares overflows fp32 is normalised at this size: there no square overflows or vanishes, and
# eps size^2 is nothing beside their mean (csrc/row_math.h).
SHRUNK = tl.constexpr(2.0**-80)
LARGEST = tl.constexpr(3.4028234663852886e38)
SUMMED_ROWS = 16  # of a program that leaves partial column sums


def cut(columns: int, each: int = 512) -> tuple[int, int]:
    """(BLOCK, warps): the power of two that covers a row, and a warp for every `each` columns of it."""
    block = max(triton.next_power_of_2(columns), 16)
    return block, min(max(block // each, 1), 16)


def chunks(rows: int, each: int) -> int:
    """Programs for so many rows."""
    return -(-rows // each)


def checked(op: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors contiguous. Raises ValueError for a dtype the kernels do not compute in."""
    for x in tensors:
        if x is not None and x.dtype not in TYPES:
            raise ValueError(f"{op}: the Triton kernels take {', '.join(map(str, TYPES))}, not {x.dtype}")
    return [None if x is None else x.contiguous() for x in tensors]


def paired(y: Tensor, y_dot: Tensor | None, k: int | None) -> Tensor | Dual:
    """The result of an op with k rows of tangents, None for a plain call."""
    return y if k is None else Dual(y, y_dot)


def variants(
    name: str,
    kernel,
    tensors: dict[str, str],
    integers: tuple[str, ...],
    constexprs: dict,
    warps: int,
    duals,
    stream: tuple[str, ...] = (),
):
    """Gates of one kernel, in bf16 and fp32: plain, and with the tangents `duals` if there are any. `tensors`: argument
    -> "x" for the dtype of the activations or a fixed type; tangents that are absent are the constant None. `stream`:
    arguments that may be fp32 where the others are bf16, a third kind."""
    rows = []
    for kind in ("bf16", "fp32", *(["fp32 stream"] if stream else [])):
        beside = "bf16" if kind == "fp32 stream" else kind
        types = {
            a: ("fp32" if a in stream and kind == "fp32 stream" else beside) for a, t in tensors.items() if t == "x"
        }
        for dual in (False, True) if duals else (False,):
            absent = {} if dual else dict.fromkeys(duals)
            signature = {a: "*" + types.get(a, t) for a, t in tensors.items() if a not in absent}
            signature |= {a: "fp32" if a == "eps" else "i32" for a in integers}
            label = f"{name}{' dual' * dual} {kind}"
            rows.append(Gate(label, kernel, signature, constexprs | absent, warps, fp_fusion=False))
    return rows


@triton.jit
def row_of(base, row, inside, cols, D: tl.constexpr):
    """Row `row` of a (rows, D) tensor, fp32; 0 where not `inside`."""
    return tl.load(base + row * D + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def among(row, rows, in_row, BLOCK: tl.constexpr):
    """in_row where row < rows, else nowhere. The comparison is made as a vector: one of scalars is an integer, not a
    mask, in the interpreter of Triton 3.9."""
    return in_row & (tl.full((BLOCK,), row, tl.int64) < rows)
