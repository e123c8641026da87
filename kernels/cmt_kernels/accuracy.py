"""How far from the exact answer a right implementation may be: the rule of the tests, for any order of summation.

An implementation errs at most twice as much as plain torch at the same dtype, plus twice what rounding the exact answer
costs. One run of plain torch does not say how much that is: its error is a draw, which for a single number is often
luckily small, and it belongs to the order in which that torch on that device happens to add up. A product over 72 terms
errs by 0.5e-6 where a GPU adds in pieces and by 1.3e-6 where the same GPU, given the matrix transposed, adds one after the
other; both are right. So plain torch is run several times and its largest error counts:

* as it is, where the inputs are;
* on the CPU, on neighbours of the inputs (every number itself or the next one towards zero, at random, the exact answer
  being that of the same neighbours), so that every rounding is drawn anew; with each float32 sum and product added up one
  term after the other in a random order, the most that an order not chosen for the numbers' sake costs; and with scalars
  rounded to float32, as a kernel takes them (1 - 0.9 is off by 2.4e-8 then, in torch's fused AdamW too).

The rule is relative to what was measured: an error three times that of the worst of these fails, and so do products in
tf32 or bf16 and a term left out (tests/kernels/test_accuracy.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cmt_kernels.cases import allowed, map_tensors, wide

DRAWS = 5  # neighbours
PIECES = 1024  # of the longest sums, which are added up by pieces

aten = torch.ops.aten


Call = Callable[[dict[str, Any]], list[Tensor]]


def limits(plain: Call, inputs: dict[str, Any], draws: int = DRAWS, exact: Call | None = None) -> list[float]:
    """What each tensor of plain(inputs) may err by, whoever computes it: max |y - exact|.

    plain: an op in plain torch; exact: the answer, by default what plain gives in float64. Both may change their inputs.
    """
    exact = exact or (lambda inputs: plain(wide(inputs)))
    found = [_allowed(plain(_copied(inputs)), exact(_copied(inputs)))]
    on_cpu = map_tensors(lambda x: x.cpu(), inputs)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        near = map_tensors(lambda x: neighbour(x, generator), on_cpu)  # noqa: B023
        with InTurn(generator), sdpa_kernel(SDPBackend.MATH):
            results = plain(as_a_kernel_takes(_copied(near)))
        found.append(_allowed(results, exact(_copied(near))))
    return torch.tensor(found, dtype=torch.float64).amax(0).tolist()  # a NaN stays one


def _allowed(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [allowed(y, truth) for y, truth in zip(results, exact, strict=True)]


def _copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return map_tensors(torch.clone, inputs)


def neighbour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every number of a tensor on the CPU itself or, at random, the next one towards zero; integers as they are."""
    if not x.is_floating_point():
        return x
    moved = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(moved, torch.nextafter(x, torch.zeros_like(x)), x)


def as_a_kernel_takes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Scalars, and tensors of float64, rounded to float32."""
    narrow = lambda x: torch.tensor(x, dtype=torch.float32).item() if isinstance(x, float) else x
    rounded = lambda x: x.float().double() if x.dtype == torch.float64 else x
    return tree_map(narrow, map_tensors(rounded, inputs))


class InTurn(TorchDispatchMode):
    """Inside, float32 products and sums of torch add one term after the other, in a random order.

    What torch does in one fused kernel (norms, convolutions) is left to it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        ours = SUMS.get(function)
        if ours and all(x.dtype == torch.float32 for x in args if isinstance(x, Tensor)) and not kwargs.get("dtype"):
            return ours(self._order, *args, **kwargs)
        return function(*args, **kwargs)

    def _order(self, n: int) -> list[Tensor]:
        """The terms 0 .. n - 1 in the order in which they are added, one by one or, of many, by pieces."""
        return list(torch.randperm(n, generator=self.generator).split(max(1, -(-n // PIECES)))) if n else []


def _bmm(order: Callable, a: Tensor, b: Tensor) -> Tensor:
    out = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
    for i in order(a.shape[2]):
        if len(i) == 1:
            out.addcmul_(a[:, :, i], b[:, i])
        else:
            out += a[:, :, i] @ b[:, i]
    return out


def _mm(order: Callable, a: Tensor, b: Tensor) -> Tensor:
    return _bmm(order, a[None], b[None])[0]


def _plus(product: Callable) -> Callable:
    """beta c + alpha a b of a product."""

    def call(order: Callable, c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        y = product(order, a, b)
        y = y if alpha == 1 else alpha * y
        return y if beta == 0 else y + (c if beta == 1 else beta * c)

    return call


def _sum(order: Callable, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    dims = sorted({d % max(x.ndim, 1) for d in ([dim] if isinstance(dim, int) else dim or range(x.ndim))})
    if not dims:
        return x.clone()
    terms = x.movedim(dims, list(range(len(dims)))).flatten(0, len(dims) - 1)
    out = x.new_zeros(terms.shape[1:])
    for i in order(len(terms)):
        out = out + (terms[i[0]] if len(i) == 1 else terms[i].sum(0))
    return out.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else out


def _mean(order: Callable, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    total = _sum(order, x, dim, keepdim)
    return total / (x.numel() // total.numel()) if total.numel() else total


def _norm(order: Callable, x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False) -> Tensor:
    if ord != 2:
        return torch.linalg.vector_norm(x, ord, dim, keepdim)
    return _sum(order, x * x, dim, keepdim).sqrt()


SUMS: dict[Any, Callable] = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.addmm.default: _plus(_mm),
    aten.baddbmm.default: _plus(_bmm),
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _norm,
}
