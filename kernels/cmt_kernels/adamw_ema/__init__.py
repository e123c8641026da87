"""adamw_ema: AdamW (Loshchilov & Hutter 2019) with gradient clipping and any number of EMA tracks, in place.

g <- g min(1, max_norm / |g|)
m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
p <- (1 - lr wd) p - lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)
e <- e + (1 - beta_e) (p - e)         for each track

A gradient with a number that is not finite changes nothing, to the bit: what it would leave is good for nothing. The norm is
NaN then, and nobody has to wait for it before the next step is queued.
"""

from torch import Tensor

from cmt_kernels._op import backend


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
    """p, g, m, v and each EMA track: (P,) flat, the same dtype, changed in place, unless g is not finite; step counts from 1.

    max_norm 0 does not clip. half: (P,) in bf16, gets the new p, rounded. Returns the gradient's norm before clipping,
    a scalar tensor, NaN where g is not finite.
    Many parameters: the update's own tensors, and the optimizer's settings by their published names.
    """
    return backend("adamw_ema", p)(p, g, m, v, emas, ema_betas, step, lr, betas, eps, weight_decay, max_norm, half)
