"""solver_step: everything between two network calls of a teacher's rollout, in one launch.

    F  = F_null + w (F_cond - F_null)                  classifier-free guidance, where f holds both
    m0 = c_skip x + c_out F                            the prediction behind the network's output (EDM, table 1)
    y  = c0 x + c1 m0 + c2 m1 + c3 m2                  the multistep update; y is written into the trajectory
    net_in = c_in y                                    what the network is fed next, in the dtype of f

DPM-Solver++ of orders 1-3, Euler and Heun are rows of one coefficient table (cmt_fast/diffusion/solvers.py).
"""

from torch import Tensor

from cmt_kernels._op import backend

COLUMNS = ("c_skip", "c_out", "w", "c0", "c1", "c2", "c3", "c_in")


def solver_step(
    x: Tensor,
    f: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    coefficients: Tensor,
    keep: bool = True,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, m0, net_in) after one network output; (y, None, None) unless `keep`, for a step that nothing follows.

    x, m1, m2: (B, ...), m1 and m2 may be None where their coefficients are zero; f: (B, ...), or (2B, ...) with the
    conditional rows before the unconditional ones; coefficients: (8,) for all rows or (B, 8), in the order of COLUMNS;
    y: (B, ...) to write into, such as a slot of a trajectory, by default fresh. y and m0 have the dtype of x, net_in that
    of f.
    """
    assert all(m is None or m.shape == x.shape for m in (m1, m2, y)), "solver_step: tensors not shaped like x"
    assert f.shape[1:] == x.shape[1:] and len(f) in (len(x), 2 * len(x)), "solver_step: outputs not shaped like x"
    return backend("solver_step", x)(x, f, m1, m2, coefficients, keep, y)
