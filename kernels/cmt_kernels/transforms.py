"""Whether torch is differentiating forward or mapping over us: `torch.func` transforms and forward-AD levels.

A kernel of ours knows values, gradients and its own tangents (`Dual`), nothing of `torch.func.jvp`, `vmap` or
`forward_ad.dual_level`; called under one it would give a zero tangent without a word. So the dispatch runs the reference
there, which is plain torch, and every other backend refuses. The test is two flags of torch, which an eager call does not
notice. While torch.compile traces, the first is read off the transforms it traces through and the second is guarded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_NAMES = {"Vmap": "torch.func.vmap", "Grad": "torch.func.grad or vjp", "Jvp": "torch.func.jvp"}


def _stacked() -> bool:
    return torch._C._are_functorch_transforms_active()


def _levels() -> tuple[str, ...]:
    """The kinds of the active `torch.func` transforms, outermost first: "Vmap", "Grad", "Jvp", "Functionalize"."""
    return tuple(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())


# torch.compile runs these while it traces: the transforms that it traces through are on the stack then
_stacked._dynamo_marked_constant = True
_levels._dynamo_marked_constant = True


def active() -> bool:
    """Whether a transform of torch.func or a forward-AD level is active, whichever tensors it concerns."""
    return _stacked() or forward_ad._current_level >= 0


def forward() -> bool:
    """Whether a forward derivative is being taken: torch.func.jvp, jacfwd, hessian, linearize, forward_ad.dual_level."""
    return "Jvp" in _levels() if _stacked() else forward_ad._current_level >= 0


def derivative() -> bool:
    """Whether a derivative of either direction is being taken by a transform; not under vmap alone."""
    return "Grad" in _levels() or forward() if _stacked() else forward_ad._current_level >= 0


def names() -> str:
    """What is active, in words."""
    return ", ".join(_NAMES.get(level, level) for level in _levels()) or "torch.autograd.forward_ad.dual_level"


def refuse(op: str, backend: str) -> None:
    """Raises RuntimeError while a transform is active: the first line of every backend but the reference."""
    if active():
        raise RuntimeError(
            f"{op}: its {backend} kernel has no rule for {names()}, which is active; CMT_KERNELS={op}:reference has"
        )


def once(op: str) -> Callable[[Callable], Callable]:
    """Decorates the gradient `f(ctx, *grads)` of a kernel: it refuses gradients that carry a tangent of forward AD."""

    def decorate(f: Callable) -> Callable:
        @wraps(f)
        def gradient(ctx: Any, *grads: Tensor | None) -> Any:
            if forward() and any(_has_tangent(g) for g in grads):
                raise RuntimeError(
                    f"{op}: the gradient of its kernel has no rule for {names()}; CMT_KERNELS={op}:reference has"
                )
            return f(ctx, *grads)

        return gradient

    return decorate


def _has_tangent(g: Tensor | None) -> bool:
    if not isinstance(g, Tensor):
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(g) or forward_ad.unpack_dual(g).tangent is not None
