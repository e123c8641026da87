"""RAdam as settings of an AdamW step: what changes from step to step is three numbers, so one fused kernel serves both."""

from __future__ import annotations

from typing import NamedTuple

from cmt_fast.config.schema import Stage

# an eps against which sqrt(v) vanishes in float32: the step is then m over eps, and lr times eps undoes it
OVERWHELMING = 1e10


class Settings(NamedTuple):
    """What `cmt_kernels.adamw_ema` is given at one step."""

    lr: float
    eps: float
    weight_decay: float


def settings(stage: Stage, step: int, lr: float) -> Settings:
    """AdamW's own numbers, or those that make it RAdam (Liu et al. 2020, alg. 2) at optimizer step `step`, from 1.

    rho_inf = 2/(1 - b2) - 1,  rho = rho_inf - 2 n b2^n / (1 - b2^n). Above 5 the step is AdamW's times the rectification
    sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho)); at or below 5 the variance is not to be trusted yet
    and the step is the momentum's alone, m / (1 - b1^n). Weight decay is decoupled and not rectified.
    """
    if stage.optimizer == "adamw":
        return Settings(lr, stage.eps, stage.weight_decay)
    b2 = stage.betas[1]
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * step * b2**step / (1 - b2**step)
    if rho > 5:
        factor, eps = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5, stage.eps
    else:
        factor = eps = OVERWHELMING
    return Settings(lr * factor, eps, stage.weight_decay / factor)
