"""Numbers that are not finite, and wrong kernels, planted in a network that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cmt_kernels import Dual
from cmt_kernels._op import through
from torch import Tensor, nn

from cmt_fast import engine
from cmt_fast.runtime import distributed
from cmt_fast.train.batches import BatchProvider

KINDS = ("loss", "gradient", "tangent")


class _Backwards(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.full_like(g, torch.nan)


def _spoilt(out: Any, kind: str) -> Any:
    if kind == "tangent":
        return Dual(out.value, out.tangent * torch.nan) if isinstance(out, Dual) else out
    spoil = _Backwards.apply if kind == "gradient" else lambda x: x * torch.nan
    if isinstance(out, Dual):
        return Dual(spoil(out.value), out.tangent)
    return spoil(out)


@contextlib.contextmanager
def nan(kind: str, layer: str, when: Callable[[int], bool], rank: int = 0) -> Iterator[list[int]]:
    """Inside, networks that engines are built of give NaN at `layer` at the steps of `when` (number of steps before), on one
    rank: in its output ("loss"), in the gradient that passes it, in its tangent. Yields the steps at which that was so.
    """
    with _layer(layer, lambda out: _spoilt(out, kind), lambda step: when(step) and distributed.rank() == rank) as hit:
        yield hit


def kernel(op: str, change: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
    """Inside, `op` on the CPU gives what `change` makes of its result, and not in plain torch: a wrong kernel."""

    def wrong(_: str, right: Callable) -> Callable:
        return lambda *args, **more: change(right(*args, **more))

    return through(wrong, "cpu", [op])


@contextlib.contextmanager
def _layer(layer: str, change: Callable[[Any], Any], when: Callable[[int], bool]) -> Iterator[list[int]]:
    at, hit, draw, build = [-1], list[int](), BatchProvider.draw, engine.build

    def drawn(self: BatchProvider, step: int, part: int = 0) -> Any:
        at[0] = step
        return draw(self, step, part)

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        if not when(at[0]):
            return None
        hit.append(at[0])
        return change(out)

    def built(run: Any, net: nn.Module, *more: Any, **options: Any) -> Any:
        net.get_submodule(layer).register_forward_hook(hook)
        return build(run, net, *more, **options)

    BatchProvider.draw, engine.build = drawn, built  # type: ignore[method-assign]
    try:
        yield hit
    finally:
        BatchProvider.draw, engine.build = draw, build  # type: ignore[method-assign]
