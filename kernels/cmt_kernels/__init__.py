"""Ops of the diffusion transformers and U-Nets, the ODE solvers and the few-step losses, each for `Tensor | Dual`.

One folder per op: formula and shapes in its `__init__`, plain torch in `reference.py`, inputs in
`cases.py`. `_op.py` chooses the backend.
"""

from cmt_kernels._op import OPS, available, table, through, use, without_native
from cmt_kernels.adamw_ema import adamw_ema
from cmt_kernels.attention import attention
from cmt_kernels.attention.proof import table as proofs
from cmt_kernels.clip import clip
from cmt_kernels.consistency_loss import consistency_loss
from cmt_kernels.conv2d import conv2d
from cmt_kernels.dropout import dropout
from cmt_kernels.dual import Dual
from cmt_kernels.fourier_embedding import fourier_embedding
from cmt_kernels.gated_residual import gated_residual
from cmt_kernels.gelu import gelu
from cmt_kernels.group_norm import group_norm
from cmt_kernels.label_embedding import label_embedding
from cmt_kernels.linear import linear
from cmt_kernels.meanflow_loss import meanflow_loss
from cmt_kernels.modulated_norm import modulated_norm
from cmt_kernels.modulated_rms_norm import modulated_rms_norm
from cmt_kernels.mp_cat import mp_cat
from cmt_kernels.mp_silu import mp_silu
from cmt_kernels.mp_sum import mp_sum
from cmt_kernels.path_point import path_point
from cmt_kernels.pixel_norm import pixel_norm
from cmt_kernels.qk_norm import qk_norm
from cmt_kernels.random_bits import random_bits
from cmt_kernels.silu import silu
from cmt_kernels.solver_step import solver_step
from cmt_kernels.time_embedding import time_embedding
from cmt_kernels.unit_weight import unit_weight
from cmt_kernels.weight_gradient import weight_gradient

__version__ = "0.1.0"
__all__ = [
    "OPS",
    "Dual",
    "adamw_ema",
    "attention",
    "available",
    "clip",
    "consistency_loss",
    "conv2d",
    "dropout",
    "fourier_embedding",
    "gated_residual",
    "gelu",
    "group_norm",
    "label_embedding",
    "linear",
    "meanflow_loss",
    "modulated_norm",
    "modulated_rms_norm",
    "mp_cat",
    "mp_silu",
    "mp_sum",
    "path_point",
    "pixel_norm",
    "proofs",
    "qk_norm",
    "random_bits",
    "silu",
    "solver_step",
    "table",
    "through",
    "time_embedding",
    "unit_weight",
    "use",
    "weight_gradient",
    "without_native",
]
