"""Where arithmetic in fp32 or bf16 is not the truth at extreme numbers (extremes.py): plain torch's, and attention's of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """What arithmetic in fp32 or bf16 does where it is not the truth: plain torch's own, and of our kernels attention's alone."""

    op: str
    backends: tuple[str, ...]
    arguments: tuple[str, ...]
    applies: Callable[[float], bool]  # to these values
    why: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    everywhere: bool = True  # of these devices; else on some processors alone


LIMITS = (
    Limit("adamw_ema", ("reference", "torch"), ("g",), lambda v: 0 < v < 1e-19,
          "squares of a gradient below 1e-19 vanish: its norm is 0, which clips as little as 1e-19 does"),
    Limit("attention", ("reference",), ("qkv.0", "qkv.1"), lambda v: not math.isfinite(v),
          "torch's fused kernels may leave a NaN of the logits out: a finite value beside a NaN gradient and tangent", ("cuda",)),
    Limit("attention", ("reference", "triton"), ("qkv.0", "qkv.1"), lambda v: 1e13 <= abs(v) < math.inf,
          "logits are fp32: those of 1e13 are rounded to 1e6, and softmax is of the rest"),
    Limit("attention", ("reference",), ("qkv.0", "qkv.1"), lambda v: 1e4 <= abs(v) < 1e13,
          "torch's fused kernels there keep logsumexp alone: from logits of 1e4 on its rounding shows", ("cuda",)),
    Limit("attention", ("reference",), ("gradient",), lambda v: abs(v) == 1e-40,
          "torch's fused kernels there take numbers below 1.2e-38 for 0", ("cuda",)),
    Limit("attention", ("triton",), ("qkv.tangent", "qkv.2"), lambda v: abs(v) == 1e-40,
          "every product of a number below 1.2e-38 is rounded to 1.4e-45, and a sum over T tokens has T of them"),
    Limit("conv2d", ("reference",), ("x", "x.tangent"), lambda v: not math.isfinite(v),
          "with AVX512-BF16 a number that is not finite reaches outputs beside those that it is in: products are taken in pairs, "
          "and 0 times it is NaN; seen in bf16, torch 2.13", ("cpu",), everywhere=False),
    Limit("gelu", ("reference",), ("x", "bias"), lambda v: v == -10.2,
          "1 + tanh p cancels: a line of nothing but 1e-8 and less has no digits"),
    Limit("gelu", ("reference",), ("x", "bias"), lambda v: 1e19 < abs(v) < math.inf,
          "torch's backward squares x: 0 times inf, NaN, from 1.8e19 on"),
    Limit("group_norm", ("reference",), ("x",), lambda v: 10 < abs(v) < math.inf,
          "torch's kernel computes r x - r mean: of a group of equal numbers r is 300, and the difference rounding; its "
          "squares overflow from 1.8e19 on"),
    Limit("modulated_norm", ("reference",), ("x",), lambda v: 1e4 <= abs(v) < math.inf,
          "torch's mean is rounded: of a row of equal numbers r is 1000 and the rest of the mean shows; its squares "
          "overflow from 1.8e19 on"),
    Limit("modulated_norm", ("reference",), ("x",), lambda v: 10 < abs(v) < 1e4,
          "the same; torch's kernel for a GPU adds in another order, and equal numbers of 10.2 leave a rest already", ("cuda",)),
    Limit("time_embedding", ("reference",), ("t",), lambda v: 1e13 <= abs(v) < math.inf,
          "an angle of 1e13 has three digits in float64, and two machines' frequencies differ in the last of them", ("cuda",)),
)  # fmt: skip
