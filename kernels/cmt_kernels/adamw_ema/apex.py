"""adamw_ema over apex's multi-tensor Adam: one pass for moments and parameters, more for the norm, clip and EMA tracks.

Runs only when asked for by name: torch's fused AdamW, which is always there, comes before it. Not run by us so far: the
machines of this project have no apex; the call follows what apex.optimizers.FusedAdam passes.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from cmt_kernels import transforms
from cmt_kernels.adamw_ema.torch import clipped

CHUNK = 2048 * 32  # elements a block, as apex's own applier


def unavailable(device: str = "cuda") -> str | None:
    """Why apex cannot run here, or None."""
    if importlib.util.find_spec("amp_C") is None:
        return "apex is not installed with its CUDA extensions (module amp_C)"
    if device != "cuda" or not torch.cuda.is_available():
        return "apex's multi-tensor Adam runs on CUDA tensors only"
    return None


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
    """As the public function; g is overwritten."""
    transforms.refuse("adamw_ema", "apex")
    import amp_C

    norm = clipped(g, max_norm)
    if norm.isnan():  # waits for the device: apex's Adam does not heed its own flag
        return norm
    skip = torch.zeros(1, dtype=torch.int32, device=p.device)
    adamw, corrected = 1, 1
    amp_C.multi_tensor_adam(
        CHUNK, skip, [[g], [p], [m], [v]], lr, betas[0], betas[1], eps, step, adamw, corrected, weight_decay
    )
    for e, beta in zip(emas, ema_betas, strict=True):
        e.lerp_(p, 1 - beta)
    if half is not None:
        half.copy_(p)
    return norm
