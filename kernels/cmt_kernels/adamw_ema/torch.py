"""adamw_ema over torch's fused AdamW kernel: one pass for moments and parameters, one more per EMA track."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cmt_kernels import transforms


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
) -> Tensor:
    transforms.refuse("adamw_ema", "torch")
    norm = torch.linalg.vector_norm(g)
    if max_norm > 0:
        g.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
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
    )
    for e, beta in zip(emas, ema_betas, strict=True):
        e.lerp_(p, 1 - beta)
    return norm
