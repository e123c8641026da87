"""Shapes of a forward's tensors by rules of our own, on the meta device.

Torch's rules for that device are Python that imports a compiler, for seconds, at its first call. An op without a rule here is
torch's: right, and slow to start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

aten = torch.ops.aten
LIKE = {getattr(aten, f"{name}_like").default for name in ("empty", "zeros", "ones", "full", "rand", "randn")}
REDUCTIONS = {
    aten.linalg_vector_norm.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.mean.default,
    aten.amax.default,
}


def _slid(x: Tensor, window: Any, stride: Any, padding: Any, dilation: Any) -> Iterator[int]:
    """How often a window fits into the sides of x (B, C, ...)."""
    sides = zip(x.shape[2:], window, stride, padding, dilation)
    return ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)


def _convolved(
    x: Tensor, w: Tensor, b: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *more: Any
) -> tuple[int, ...]:
    """(B, C, ...) that a convolution gives."""
    if transposed:
        added, groups = more
        sides = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, added)
        return (
            x.shape[0],
            w.shape[1] * groups,
            *((n - 1) * s - 2 * p + d * (k - 1) + 1 + a for n, k, s, p, d, a in sides),
        )
    return x.shape[0], w.shape[0], *_slid(x, w.shape[2:], stride, padding, dilation)


def _joined(parts: list[Tensor], dim: int = 0) -> tuple[int, ...]:
    """What torch.cat gives."""
    sizes = list(parts[0].shape)
    sizes[dim] = sum(x.shape[dim] for x in parts)
    return tuple(sizes)


def _pooled(x: Tensor, size: list, stride: Any = (), padding: Any = (0, 0), *rest: Any, **_: Any) -> tuple[int, ...]:
    """What pooling gives; without a stride the windows touch."""
    assert not any(rest), "dilated windows, or ones that reach over the edge"
    return *x.shape[:2], *_slid(x, size, stride or size, padding, (1, 1))


def _same(x: Tensor, *_: Any, **__: Any) -> tuple[int, ...]:
    """The shape of the first argument."""
    return tuple(x.shape)


RULES: dict[Any, Callable[..., tuple[int, ...]]] = {
    aten.mm.default: lambda a, b: (a.shape[0], b.shape[1]),
    aten.addmm.default: lambda c, a, b, **_: (a.shape[0], b.shape[1]),
    aten.bmm.default: lambda a, b: (*a.shape[:2], b.shape[2]),
    aten.baddbmm.default: lambda c, a, b, **_: (*a.shape[:2], b.shape[2]),
    aten.convolution.default: _convolved,
    aten.cat.default: _joined,
    aten.avg_pool2d.default: _pooled,
    aten.max_pool2d_with_indices.default: _pooled,
    aten.native_group_norm.default: _same,
    aten.native_layer_norm.default: _same,
    aten.upsample_nearest2d.default: lambda x, size, *_, **__: (*x.shape[:2], *size),
    aten.embedding.default: lambda table, index, *_, **__: (*index.shape, table.shape[1]),
    aten._safe_softmax.default: _same,
    aten._softmax.default: _same,
}
# outputs besides the first, which no forward here reads: statistics and indices
MORE = {aten.native_group_norm.default: 2, aten.native_layer_norm.default: 2, aten.max_pool2d_with_indices.default: 1}


class LightMode(TorchDispatchMode):
    """A dispatch mode that imports no compiler, not even to be kept from it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def counting() -> bool:
    """Whether this thread is inside a LightMode."""
    return any(isinstance(mode, LightMode) for mode in _get_current_dispatch_mode_stack())


class Shapes(LightMode):
    """Pointwise ops and reductions give a tensor of the right shape, by rules of their own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if (torch.Tag.pointwise in func.tags or func in LIKE) and tensors and "out" not in kwargs:
            if func.overloadpacket.__name__.endswith("_"):  # in place
                return args[0]
            shape = np.broadcast_shapes(*(tuple(x.shape) for x in tensors))
            return torch.empty(shape, dtype=kwargs.get("dtype") or tensors[0].dtype, device="meta")
        if func in REDUCTIONS:
            given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
            return _reduced(args[0], given.get("dim"), given.get("keepdim", False))
        if func in RULES:
            first = args[0] if isinstance(args[0], Tensor) else args[0][0]
            out = torch.empty(RULES[func](*args, **kwargs), dtype=first.dtype, device="meta")
            return (out, *[None] * MORE[func]) if func in MORE else out
        return func(*args, **kwargs)


def _reduced(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """What a reduction of x over these dimensions gives, all of them if none are named."""
    over = [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim or range(x.ndim))]
    sizes = [1 if d in over else n for d, n in enumerate(x.shape) if keepdim or d not in over]
    return torch.empty(sizes, dtype=x.dtype, device="meta")
