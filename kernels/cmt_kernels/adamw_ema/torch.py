"""adamw_ema over torch's fused AdamW kernel: one pass for moments and parameters, one more per EMA track."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cmt_kernels import transforms
from cmt_kernels.adamw_ema.reference import clip_factor, put, told
from cmt_kernels.magnitude import size_of


def clipped(g: Tensor, max_norm: float) -> Tensor:
    """The norm of g, which is clipped in place; max_norm 0 leaves g as it is. NaN where g is not finite."""
    if g.is_cpu and (norm := torch.linalg.vector_norm(g)).isfinite():  # there the host has nothing to wait for
        if max_norm > 0:
            g.mul_(clip_factor(norm, torch.ones_like(norm), max_norm))
        return norm
    size = size_of(g)
    norm = torch.linalg.vector_norm(g.mul_(size))
    g.mul_(clip_factor(norm, size, max_norm) if max_norm > 0 else 1 / size)
    return told(norm, size)


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
    transforms.refuse("adamw_ema", "torch")
    norm = clipped(g, max_norm)
    if g.is_cpu and norm.isnan():
        return norm
    unsound = None if g.is_cpu else norm.isnan().float()
    adamw(
        [p],
        [g],
        [m],
        [v],
        [],
        [torch.tensor(float(step - 1), device=p.device)],
        fused=True,
        foreach=False,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        found_inf=unsound,
    )
    for e, beta in zip(emas, ema_betas, strict=True):
        e.lerp_(p, 1 - beta) if unsound is None else put(e, e.lerp(p, 1 - beta), norm)
    if half is not None:
        half.copy_(p)
    return norm
