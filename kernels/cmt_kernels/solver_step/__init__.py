"""solver_step: one linear multistep update of the teacher's ODE.

    y = c0 x + c1 m0 + c2 m1 + c3 m2        m0 the newest network prediction

DPM-Solver++ of orders 1-3, Euler and Heun are rows of one coefficient table (cmt_fast/solvers.py).
"""

from torch import Tensor

from cmt_kernels._op import backend


def solver_step(x: Tensor, m0: Tensor, m1: Tensor | None, m2: Tensor | None, coefficients: Tensor) -> Tensor:
    """x, m0, m1, m2: (B, ...); coefficients: (4,) for all rows or (B, 4) one set a row -> (B, ...), dtype of x.

    m1 or m2 may be None where its coefficient is zero.
    """
    return backend("solver_step", x)(x, m0, m1, m2, coefficients)
