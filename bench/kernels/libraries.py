"""What other libraries do for an op, as rows beside ours: flash-attn, cuDNN, jvp_flash_attention, apex, Liger, QuACK.

Each function has its op's own signature and adds in plain torch what the library leaves out (adaLN's modulation around
a plain LayerNorm). Only libraries that can be imported have a row, and none has a time before it passed the op's check.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from cmt_kernels import Dual
from cmt_kernels.attention.primal import LIBRARIES
from torch import Tensor


def _here(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def attention_dual(qkv: Dual) -> Dual:
    """jvp_flash_attention: the rows with a tangent by its dual forward, the others by its plain one."""
    attend = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn
    k = len(qkv.tangent)
    split = lambda x: (part.contiguous() for part in x.permute(2, 0, 3, 1, 4))  # (B, H, T, d) each
    merge = lambda y: y.transpose(1, 2).flatten(2)
    with forward_ad.dual_level():
        parts = (forward_ad.make_dual(x, x_dot) for x, x_dot in zip(split(qkv.value[:k]), split(qkv.tangent)))
        o, o_dot = forward_ad.unpack_dual(attend.fwd_dual(*parts))
    if k == len(qkv.value):
        return Dual(merge(o), merge(o_dot))
    return Dual(merge(torch.cat((o, attend.fwd(*split(qkv.value[k:]))))), merge(o_dot))


def modulated_norm(norm: Callable[[Tensor, float], Tensor], x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6):
    """A library's LayerNorm with the modulation in plain torch."""
    return norm(x, eps) * (1 + scale[:, None]) + shift[:, None]


def _liger_norm(x: Tensor, eps: float) -> Tensor:
    one, zero = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    return importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply(x, one, zero, eps)


def _quack_norm(x: Tensor, eps: float) -> Tensor:
    one = torch.ones(x.shape[-1], device=x.device)
    return importlib.import_module("quack.rmsnorm").layernorm_fwd(x.flatten(0, 1), one, eps=eps).view(x.shape)


def _apex_norm(x: Tensor, eps: float) -> Tensor:
    return importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm(x, (x.shape[-1],), eps)


NORMS = {"liger": ("liger_kernel", _liger_norm), "quack": ("quack", _quack_norm), "apex": ("apex", _apex_norm)}


def of(op: str, inputs: dict[str, Any], device: str) -> dict[str, Callable]:
    """name -> function of the libraries here that do this call of `op`. On a GPU: they have no CPU kernels."""
    if device != "cuda":
        return {}
    dual = any(isinstance(x, Dual) for x in inputs.values())
    if op == "attention" and dual:
        return {"jvp-flash": attention_dual} if _here("jvp_flash_attention") else {}
    if op == "attention":
        return {name: library for name, library in LIBRARIES.items() if name != "triton"}
    if op == "modulated_norm" and not dual:
        return {name: partial(modulated_norm, norm) for name, (package, norm) in NORMS.items() if _here(package)}
    return {}
