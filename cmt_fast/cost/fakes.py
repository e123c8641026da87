"""Tensors of the CPU with shapes, storages and autograd but no numbers, for counting: a small twin of torch's fake tensors.

Torch's own import a compiler, which takes longer than the commands that count, and are slow at each op. Here an op is a rule for
the shape, the dtype and the order in memory of what it gives; an op without a rule is torch's own on the meta device:
right, and slow to start. What is counted with these is what torch's fakes count (tests/cost/test_fakes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmt_fast.models.shapes import MORE, REDUCTIONS, RULES, LightMode, _reduced

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")
DEVICE = torch.ops.prim.device.default
MADE = {getattr(aten, name).default for name in ("ones", "zeros", "randn", "rand")} | {aten.empty.memory_format}
LIKE = {getattr(aten, f"{name}_like").default for name in ("empty", "zeros", "ones", "full", "rand", "randn")}
SMALL = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.logspace.default, aten.linspace.default}
COMPARED = {"gt", "ge", "lt", "le", "eq", "ne"}


class Fake(torch.Tensor):
    """Of the CPU by all that is asked of it; `inside` is the same on the meta device, with the same storage."""

    inside: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: Tensor) -> Fake:
        made = torch.Tensor._make_subclass(cls, inside, False, dispatch_device=True, device_for_backend_keys=CPU)
        made.inside = inside
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CPU

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Fakes().__torch_dispatch__(func, types, args, kwargs)


class Fakes(LightMode):
    """Inside, every op makes fakes, of fakes or of tensors that are there."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # real tensors, each with its twin on the meta device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return CPU
        kwargs = kwargs or {}
        if func._schema.name.endswith("_") and isinstance(args[0], Fake) and "out" not in kwargs:  # in place
            return args[0]
        inner = [self._inside(x) for x in args]
        named = {k: self._inside(v) for k, v in kwargs.items()}
        if "device" in named:
            named["device"] = META
        out = _given(func, inner, named)
        if isinstance(out, Tensor):
            return Fake(out)
        if isinstance(out, (tuple, list)):
            return type(out)(Fake(x) if isinstance(x, Tensor) else x for x in out)
        return out

    def _inside(self, x: Any) -> Any:
        if isinstance(x, Fake):
            return x.inside
        if isinstance(x, Tensor):
            if id(x) not in self._known:
                twin = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
                self._known[id(x)] = x, twin
            return self._known[id(x)][1]
        if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
            return [self._inside(y) for y in x]
        return x


def _given(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What an op gives on the meta device."""
    if func.is_view:
        return func(*args, **kwargs)
    rule = OPS.get(func)
    if rule is not None:
        return rule(*args, **kwargs)
    if func in MADE:
        return torch.empty(args[0], dtype=kwargs.get("dtype"), device=META)
    if func in SMALL:
        small = func(*args, **kwargs | {"device": CPU})
        return torch.empty(small.shape, dtype=small.dtype, device=META)
    if func in LIKE:
        return _like(args[0], kwargs.get("dtype"), kwargs.get("memory_format"))
    if func in REDUCTIONS:
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        out = _reduced(args[0], given.get("dim"), given.get("keepdim", False))
        return out if given.get("dtype") is None else torch.empty(out.shape, dtype=given["dtype"], device=META)
    if torch.Tag.pointwise in func.tags and "out" not in kwargs:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if all(x.is_floating_point() for x in tensors) and not any(isinstance(x, complex) for x in args):
            return _pointwise(tensors, torch.bool if func.overloadpacket.__name__ in COMPARED else None)
    if func in RULES and func not in MORE:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        return torch.empty(RULES[func](*args, **kwargs), dtype=first.dtype, device=META)
    return func(*args, **kwargs)


def _like(x: Tensor, dtype: torch.dtype | None = None, memory_format: Any = None) -> Tensor:
    """A tensor as x is, in x's order of memory where x has no holes and no other is asked for."""
    if memory_format in (None, torch.preserve_format):
        return _pointwise([x], dtype)
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=META).contiguous(memory_format=memory_format)


def _pointwise(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """What an op over the numbers of these gives: broadcast, promoted, and in the order of memory that torch takes."""
    if dtype is None:
        dtype = tensors[0].dtype
        for x, y in zip(tensors, tensors[1:]):
            dtype = torch.promote_types(dtype, torch.result_type(x, y)) if len(tensors) > 2 else torch.result_type(x, y)
    shape = np.broadcast_shapes(*(tuple(x.shape) for x in tensors)) if len(tensors) > 1 else tensors[0].shape
    if all(x.is_contiguous() for x in tensors):
        return torch.empty(shape, dtype=dtype, device=META)
    return torch.empty_strided(shape, _strides(shape, tensors), dtype=dtype, device=META)


def _strides(shape: tuple[int, ...], tensors: Iterable[Tensor]) -> list[int]:
    """Strides of a result without holes: its dimensions in the order of the operands' strides, the first that decides counts."""
    steps = []
    for x in tensors:
        wide = shape[len(shape) - x.ndim :]
        own = [0 if n == 1 and m != 1 else s for n, m, s in zip(x.shape, wide, x.stride())]  # 0: broadcast
        steps.append([0] * (len(shape) - x.ndim) + own)

    def later(a: int, b: int) -> int:
        for s in steps:
            if s[a] and s[b]:
                if s[a] != s[b]:
                    return 1 if s[a] > s[b] else -1
                if shape[a] > shape[b]:
                    return 1
        return 0

    order = list(range(len(shape)))[::-1]
    for i in range(1, len(order)):
        at = i
        for j in range(i - 1, -1, -1):
            turn = later(order[j], order[at])
            if turn > 0:
                order[j], order[at], at = order[at], order[j], j
            elif turn < 0:
                break
    strides, step = [0] * len(shape), 1
    for d in order:
        strides[d], step = step, step * shape[d]
    return strides


def _channels_last(x: Tensor) -> bool:
    """Whether torch takes the channels of x (B, C, H, W) to be its innermost dimension; where both could be, it does not."""
    least, strides = 0, x.stride()
    if x.ndim != 4 or not strides[1]:
        return False
    for d in (1, 3, 2, 0):
        if not x.shape[d] or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(1, x.shape[d])
    return True


def _convolved(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    """In the order of the channels that its input or its weight has."""
    return _image(RULES[aten.convolution.default](x, w, *rest), x.dtype, _channels_last(x) or _channels_last(w))


def _image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    kept = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=META, memory_format=kept)


def _scaled(func: Any) -> Callable[..., Tensor]:
    """A rule of pooling or of scaling up, in the order of its input."""
    return lambda x, *rest, **more: _image(RULES[func](x, *rest, **more), x.dtype, _channels_last(x))


def _group_norm(x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float) -> tuple[Tensor, ...]:
    of_groups = lambda: torch.empty((n, groups), dtype=x.dtype, device=META)
    return torch.empty(x.shape, dtype=x.dtype, device=META), of_groups(), of_groups()


def _layer_norm(x: Tensor, over: list[int], *_: Any) -> tuple[Tensor, ...]:
    of_rows = lambda: torch.empty((*x.shape[: -len(over)], *[1] * len(over)), dtype=x.dtype, device=META)
    return torch.empty(x.shape, dtype=x.dtype, device=META), of_rows(), of_rows()


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """The CPU's: what it gives, and a logarithm of each row of weights in fp32."""
    batch, heads, tokens, _ = q.shape
    return _like(q), torch.empty((batch, tokens, heads), dtype=torch.float32, device=META).transpose(1, 2)


def _padded(x: Tensor, pad: list[int], value: Any = 0) -> Tensor:
    sizes = list(x.shape)
    for i in range(len(pad) // 2):
        sizes[-1 - i] += pad[2 * i] + pad[2 * i + 1]
    return torch.empty(sizes, dtype=x.dtype, device=META)


def _max_pooled(x: Tensor, *window: Any, **more: Any) -> tuple[Tensor, ...]:
    shape = RULES[aten.max_pool2d_with_indices.default](x, *window, **more)
    return tuple(_image(shape, dtype, _channels_last(x)) for dtype in (x.dtype, torch.int64))


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    dtype = parts[0].dtype
    for x in parts[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    shape = RULES[aten.cat.default](parts, dim % parts[0].ndim)
    return _image(shape, dtype, all(_channels_last(x) for x in parts))


OPS: dict[Any, Callable[..., Any]] = {
    aten.lift_fresh.default: lambda x: x,
    aten._unsafe_view.default: lambda x, size: x.view(size),
    aten._to_copy.default: lambda x, dtype=None, memory_format=None, **_: _like(x, dtype, memory_format),
    aten.clone.default: lambda x, memory_format=None: _like(x, None, memory_format),
    aten.masked_fill.Scalar: lambda x, mask, value: _pointwise([x, mask], x.dtype),
    aten.embedding.default: lambda table, index, *_, **__: torch.empty(
        (*index.shape, table.shape[1]), dtype=table.dtype, device=META
    ),
    aten.roll.default: lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=META),
    aten.convolution.default: _convolved,
    aten.avg_pool2d.default: _scaled(aten.avg_pool2d.default),
    aten.upsample_nearest2d.default: _scaled(aten.upsample_nearest2d.default),
    aten.native_group_norm.default: _group_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten.constant_pad_nd.default: _padded,
    aten.max_pool2d_with_indices.default: _max_pooled,
    aten.cat.default: _joined,
}
