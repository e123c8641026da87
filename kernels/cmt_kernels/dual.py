"""Dual numbers: a value and its derivative along one direction, as two ordinary tensors.

MeanFlow needs `u` and `du/dt` from one forward. Forward-mode AD in torch does not compose with
compile, fused attention, checkpointing or ZeRO, so every op and layer here takes `Tensor | Dual`
and a module's `forward` is written once.

* `value`: (B, ...), carries gradients as usual.
* `tangent`: (k, ...) with k <= B, belongs to the **first k rows** of `value`. It never requires
  grad and nothing is saved for it: tangent arithmetic runs under `tangent_rule()`, which is `no_grad`, on detached values.
  So it has no derivative of its own, and a Dual inside `torch.func.jvp` or `forward_ad.dual_level` is refused.

The value of a dual forward is bitwise the value of the plain forward: the ops compute it by the
same call, and the tangent beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cmt_kernels import transforms


class Dual(NamedTuple):
    """value: (B, ...); tangent: (k, ...), the derivative of the first k rows.

    A NamedTuple rather than a dataclass: DeepSpeed's hooks look inside tuples.
    """

    value: Tensor
    tangent: Tensor


def value(x: Tensor | Dual) -> Tensor:
    """The value: (B, ...)."""
    return x.value if isinstance(x, Dual) else x


def tangent(x: Tensor | Dual | None) -> Tensor | None:
    """The tangent (k, ...), or None for a plain tensor (a constant)."""
    return x.tangent if isinstance(x, Dual) else None


def tangent_rule() -> torch.no_grad:
    """What tangent arithmetic runs under: no_grad. Raises RuntimeError where a derivative of it is taken by forward AD."""
    if transforms.forward():
        raise RuntimeError(
            f"a Dual inside {transforms.names()}: tangents are constants here and their derivative would be zero; "
            "differentiate plain tensors, or take the tangent by the Dual alone"
        )
    return torch.no_grad()


def head(x: Tensor | Dual, k: int) -> Tensor:
    """The first k rows of the value, detached: what a tangent rule reads. (k, ...)."""
    return value(x)[:k].detach()


def rows(*xs: Tensor | Dual | None) -> int | None:
    """k, the number of rows with tangents among the arguments; None if all are plain.

    Raises AssertionError when two arguments disagree: tangents of one forward belong to the same rows.
    """
    counts = {x.tangent.shape[0] for x in xs if isinstance(x, Dual)}
    assert len(counts) <= 1, f"tangents of different row counts in one op: {sorted(counts)}"
    return counts.pop() if counts else None


def linear_map(f: Callable[[Tensor], Tensor], x: Tensor | Dual) -> Tensor | Dual:
    """Apply a map that is linear and acts row by row (reshape, permute, scaling) to both halves."""
    if not isinstance(x, Dual):
        return f(x)
    y = f(x.value)
    with tangent_rule():
        return Dual(y, f(x.tangent))


def in_dtype(x: Tensor | Dual, dtype: torch.dtype) -> Tensor | Dual:
    """Both halves in a dtype."""
    if not isinstance(x, Dual):
        return x.to(dtype)
    return Dual(x.value.to(dtype), x.tangent.to(dtype))


def chunks(x: Tensor | Dual, n: int) -> list[Tensor | Dual]:
    """The n equal pieces of the last dimension. Cut once, so their gradients are put together once, not n times."""
    if not isinstance(x, Dual):
        return list(x.chunk(n, dim=-1))
    return [Dual(v, dot) for v, dot in zip(x.value.chunk(n, dim=-1), x.tangent.chunk(n, dim=-1))]


def add(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    """a + b, (B, ...) each; a plain summand is a constant."""
    total = value(a) + value(b)
    a_dot, b_dot = tangent(a), tangent(b)
    if a_dot is None and b_dot is None:
        return total
    rows(a, b)
    with tangent_rule():
        return Dual(total, b_dot if a_dot is None else a_dot if b_dot is None else a_dot + b_dot)


def combine(a: Tensor | Dual, weight_a: float, b: Tensor | Dual, weight_b: float) -> Tensor | Dual:
    """weight_a a + weight_b b, (B, ...) each; a plain summand is a constant."""
    f = lambda x, y: torch.add(x * weight_a, y, alpha=weight_b)
    total = f(value(a), value(b))
    a_dot, b_dot = tangent(a), tangent(b)
    if a_dot is None and b_dot is None:
        return total
    rows(a, b)
    with tangent_rule():
        return Dual(
            total, b_dot * weight_b if a_dot is None else a_dot * weight_a if b_dot is None else f(a_dot, b_dot)
        )


def multiply(a: Tensor | Dual, b: Tensor | Dual) -> Tensor | Dual:
    """a b, (B, ...) each, broadcast after the first dimension; a plain factor is a constant. a b. + a. b."""
    product = value(a) * value(b)
    k = rows(a, b)
    if k is None:
        return product
    with tangent_rule():
        parts = [x_dot * head(y, k) for x_dot, y in ((tangent(a), b), (tangent(b), a)) if x_dot is not None]
        return Dual(product, sum(parts[1:], parts[0]).expand_as(product[:k]))


def concatenate(a: Tensor | Dual, b: Tensor | Dual, dim: int = 1) -> Tensor | Dual:
    """a and b side by side along `dim`, not the first; a plain part is a constant."""
    joined = torch.cat((value(a), value(b)), dim=dim)
    k = rows(a, b)
    if k is None:
        return joined
    with tangent_rule():
        dots = [torch.zeros_like(value(x)[:k]) if tangent(x) is None else tangent(x) for x in (a, b)]
        return Dual(joined, torch.cat(dots, dim=dim))
