"""Cases of qk_norm."""

from dataclasses import dataclass
from typing import Any

import torch

from cmt_kernels.cases import LOW, BaseCase, Draw, tangent_rows
from cmt_kernels.dual import rows, value

DTYPES = LOW
GRADS = ("qkv", "q_weight", "k_weight")


@dataclass(frozen=True)
class Case(BaseCase):
    B: int
    T: int
    H: int
    d: int
    norm: bool = True
    rope: bool = True
    k: int | None = None


CASES = tuple(Case(8, 5, 2, 8, True, True, k) for k in tangent_rows(8)) + (
    Case(5, 77, 2, 36),
    Case(5, 77, 1, 72, True, True, 1),
    Case(5, 77, 2, 36, True, False, 2),
    Case(5, 77, 2, 36, False, True, 5),
    Case(5, 7, 2, 8, False, False, 1),
)
BENCH = tuple(Case(8, 256, 12, 64, True, True, k) for k in (None, 2, 8))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    draw = Draw(dtype, device)
    angle = draw.uniform(case.T, case.d // 2, high=6.0)
    return {
        "qkv": draw.dual(case.k, case.B, case.T, 3, case.H, case.d),
        "q_weight": draw.normal(case.d, mean=1.0, std=0.3) if case.norm else None,
        "k_weight": draw.normal(case.d, mean=1.0, std=0.3) if case.norm else None,
        "cos": angle.cos() if case.rope else None,
        "sin": angle.sin() if case.rope else None,
    }


def case_of(qkv, q_weight, k_weight, cos, sin, eps) -> Case:
    b, t, _, h, d = value(qkv).shape
    return Case(b, t, h, d, q_weight is not None, cos is not None, rows(qkv))


def nbytes(case: Case, itemsize: int) -> int:
    """The values pass through, but are read and written: the op returns a new tensor."""
    if not (case.norm or case.rope):
        return 0
    parameters = 2 * case.d * case.norm + case.T * case.d * case.rope
    return (6 * (case.B + (case.k or 0)) * case.T * case.H * case.d + parameters) * itemsize


def flops(case: Case) -> int:
    """Of queries and keys: 4 an element for the norm (8 for its tangent), 3 for the rotation."""
    n = 2 * case.T * case.H * case.d
    k = case.k or 0
    return n * (case.norm * (4 * case.B + 8 * k) + 3 * case.rope * (case.B + k))
