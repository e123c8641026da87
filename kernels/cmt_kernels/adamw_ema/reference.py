"""adamw_ema in plain torch."""

import torch
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.magnitude import size_of


def clip_factor(norm: Tensor, size: Tensor, max_norm: float) -> Tensor:
    """What g size is multiplied by so that g is clipped, from the norm of g size: min(1, max_norm / |g|) / size."""
    return torch.minimum(max_norm / (norm + 1e-6 * size), 1 / size)


def told(norm: Tensor, size: Tensor) -> Tensor:
    """The norm of g from that of g size; NaN where g is not finite, infinite where its norm alone is beyond fp32."""
    return (norm / size).masked_fill_(~norm.isfinite(), torch.nan)


def put(x: Tensor, new: Tensor, norm: Tensor) -> None:
    """new into x, both (P,), unless the norm is NaN; nobody waits for the device."""
    x.copy_(torch.where(norm.isnan(), x, new))


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
    if transforms.derivative():
        raise RuntimeError(
            f"adamw_ema: a step changes its buffers in place and has no derivative; active: {transforms.names()}"
        )
    size = size_of(g)
    norm = torch.linalg.vector_norm(g * size)
    if max_norm > 0:
        g = g * size * clip_factor(norm, size, max_norm)
    norm = told(norm, size)
    put(m, m.lerp(g, 1 - betas[0]), norm)
    put(v, v.mul(betas[1]).addcmul_(g, g, value=1 - betas[1]), norm)
    denominator = (v.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    put(p, p.mul(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** step)), norm)
    for e, beta in zip(emas, ema_betas, strict=True):
        put(e, e.lerp(p, 1 - beta), norm)
    if half is not None:
        half.copy_(p)
    return norm
