"""The rule of accuracy: no order of a sum breaks it, no real fault passes it.

The faults: inputs that lost the digits that tf32 or bf16 lacks, a term of a sum left out, a row not written, errors three
times those of a plain sum. The harmless: any order, products added by a tree, scalars that are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cmt_kernels import OPS
from cmt_kernels.accuracy import SUMS, InTurn, limits, neighbour
from cmt_kernels.adamw_ema.reference import adamw_ema
from cmt_kernels.cases import allowed, cases_of, error, map_tensors, outputs, wide
from torch import Tensor

from tests.kernels.test_ops import gradients_of_reference, reference

FP32 = [op for op in OPS if torch.float32 in cases_of(op).DTYPES and op != "random_bits"]
LINEAR = [case for case in cases_of("linear").CASES if case.k is None]
EXACT_MM = lambda a, b: a.double() @ b.double()


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 with so many bits of mantissa: 10 is tf32, 7 bf16."""
    if x.dtype != torch.float32:
        return x
    drop = 23 - bits
    return ((x.view(torch.int32) + (1 << (drop - 1))) >> drop << drop).view(torch.float32)


# ------------------------------------------------------------------------------------------ torch, one term at a time


def arguments(name: str) -> tuple[tuple[Tensor, ...], Callable, int]:
    """Inputs of an intercepted function, its value of |inputs| (what its error is a share of), and terms a result."""
    a, b, c = torch.randn(3, 7, 41), torch.randn(3, 41, 5), torch.randn(3, 7, 5)
    return {
        "mm": ((a[0], b[0]), torch.mm, 41),
        "bmm": ((a, b), torch.bmm, 41),
        "addmm": ((c[0], a[0], b[0]), partial(torch.addmm, beta=0.5, alpha=-3.0), 43),
        "baddbmm": ((c, a, b), partial(torch.baddbmm, beta=0.0, alpha=0.25), 43),
        "sum": ((a,), torch.sum, 3 * 7 * 41),
        "sum of two dims": ((a,), partial(torch.sum, dim=(0, -1), keepdim=True), 3 * 41),
        "a long sum": ((torch.randn(5000),), torch.sum, 5000),
        "mean": ((a,), torch.mean, 3 * 7 * 41),
        "mean of a dim": ((a,), partial(torch.mean, dim=1), 8),
        "linalg_vector_norm": ((a,), torch.linalg.vector_norm, 3 * 7 * 41),
    }[name]


NAMES = ("mm", "bmm", "addmm", "baddbmm", "sum", "sum of two dims", "a long sum", "mean", "mean of a dim",
         "linalg_vector_norm")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_sum_in_turn_is_the_sum(name: str) -> None:
    inputs, function, terms = arguments(name)
    exact = function(*(x.double() for x in inputs))
    size = function(*(x.double().abs() for x in inputs)).abs()
    if name == "addmm":  # its factors have signs of their own
        size = 0.5 * inputs[0].double().abs() + 3.0 * EXACT_MM(inputs[1].abs(), inputs[2].abs())
    seen = []
    for seed in range(4):
        with InTurn(torch.Generator().manual_seed(seed)):
            seen.append(function(*inputs))
        assert seen[-1].shape == exact.shape and seen[-1].dtype == torch.float32
        assert ((seen[-1].double() - exact).abs() <= (terms + 2) * 2.0**-24 * size).all()  # of any order (Higham, 2002)
    assert any(not torch.equal(y, seen[0]) for y in seen[1:]), "the order is not random"


def test_every_intercepted_function_is_tried_and_others_are_torchs() -> None:
    called: set[Any] = set()
    with pytest.MonkeyPatch.context() as patch:
        for key, function in SUMS.items():
            patch.setitem(SUMS, key, lambda *a, key=key, f=function, **more: called.add(key) or f(*a, **more))
        for name in NAMES:
            inputs, function, _ = arguments(name)
            with InTurn(torch.Generator()):
                function(*inputs)
    assert called == set(SUMS)
    x = torch.randn(9, 9)
    with InTurn(torch.Generator()):
        assert torch.equal(x.bfloat16() @ x.bfloat16(), TRUE_BF16(x)) and x.double().sum().dtype == torch.float64
        assert torch.zeros(0, 4).sum(0).tolist() == [0.0] * 4 and torch.zeros(3, 0).mm(torch.zeros(0, 2)).sum() == 0


def TRUE_BF16(x: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return x.bfloat16() @ x.bfloat16()


def test_neighbours() -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 1e-45, 3e38, 0.1] * 50)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        y = neighbour(x.to(dtype), torch.Generator().manual_seed(0))
        moved = (y != x.to(dtype)).double().mean().item()
        assert 0.2 < moved < 0.6 and (y.abs() <= x.to(dtype).abs()).all() and y.dtype == dtype
        assert ((y - x.to(dtype)).abs() <= x.to(dtype).abs() * torch.finfo(dtype).eps + 1e-45).all()
    assert torch.equal(neighbour(torch.arange(3), torch.Generator()), torch.arange(3))


# ---------------------------------------------------------------------------------------------- any order is right


def one_by_one(a: Tensor, b: Tensor, order: Tensor) -> Tensor:
    out = a.new_zeros(len(a), b.shape[1])
    for i in order:
        out = out + a[:, i, None] * b[i]
    return out


def by_pieces(a: Tensor, b: Tensor, size: int) -> Tensor:
    """Like a GPU's product: a sum of each piece, then a sum of the pieces."""
    return sum(one_by_one(a[:, i], b[i], torch.arange(len(i))) for i in torch.arange(len(b)).split(size))


def by_a_tree(a: Tensor, b: Tensor) -> Tensor:
    terms = list(a.mT[:, :, None] * b[:, None])
    while len(terms) > 1:
        terms = [sum(terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def products(inputs: dict[str, Any], product: Callable) -> list[Tensor]:
    """linear's value and its gradients of x and weight, by this product; the direction is that of test_ops."""
    x, w, bias = inputs["x"], inputs["weight"], inputs["bias"]
    shape, x = x.shape, x.flatten(0, -2)
    y = product(x, w.mT) + (0 if bias is None else bias)
    direction = torch.randn((*shape[:-1], len(w)), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d = direction.bfloat16().to(x).flatten(0, -2)
    return [y.view(*shape[:-1], -1), product(d, w).view(shape), product(d.mT, x)]


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_any_order_of_a_product_is_within_the_rule(case: Any) -> None:
    inputs = cases_of("linear").inputs(case, torch.float32)
    exact = products(inputs, EXACT_MM)
    most = limits(partial(reference, "linear"), inputs) + limits(partial(gradients_of_reference, "linear"), inputs)[:2]
    orders = {f"random {seed}": lambda n, seed=seed: torch.randperm(n, generator=torch.Generator().manual_seed(90 + seed))
              for seed in range(8)}  # fmt: skip
    orders |= {"first to last": torch.arange, "last to first": lambda n: torch.arange(n).flip(0)}
    made = {name: partial(lambda a, b, o: one_by_one(a, b, o(len(b))), o=order) for name, order in orders.items()}
    made |= {"tree": by_a_tree} | {f"pieces of {n}": partial(by_pieces, size=n) for n in (4, 16, 64)}
    tree = products(inputs, by_a_tree)
    refused = 0  # by twice the error of one run of a torch that adds by a tree
    for name, product in made.items():
        for i, (y, truth) in enumerate(zip(products(inputs, product), exact, strict=True)):
            assert error(y, truth) <= most[i], (name, i, error(y, truth) / most[i])
            refused += error(y, truth) > allowed(tree[i], truth)
    assert refused or case.D < 72, "one run of one order would have done here"


def as_fused(p, g, m, v, emas, ema_betas, step, lr, betas, eps, weight_decay, max_norm, half) -> Tensor:
    """torch's fused AdamW as its CUDA kernel computes it: betas are float32 before 1 - beta is taken."""
    one, two = (torch.tensor(beta, dtype=torch.float32) for beta in betas)
    norm = torch.linalg.vector_norm(g)
    if max_norm > 0:
        g = g * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    p.mul_(1 - lr * weight_decay)
    m.copy_(one * m + (1 - one) * g)
    v.copy_(two * v + (1 - two) * g * g)
    denominator = v.sqrt() / (1 - betas[1] ** step) ** 0.5 + eps
    p.sub_(lr / (1 - betas[0] ** step) * m / denominator)
    for e, beta in zip(emas, ema_betas):
        e.lerp_(p, 1 - beta)
    if half is not None:
        half.copy_(p)
    return norm


def test_scalars_in_float32_are_within_the_rule() -> None:
    refused = 0
    for case in cases_of("adamw_ema").CASES:
        fresh = lambda: cases_of("adamw_ema").inputs(case)  # noqa: B023
        got, exact, plain = (outputs("adamw_ema", f, x) for f, x in (
            (as_fused, fresh()), (adamw_ema, wide(fresh())), (adamw_ema, fresh())))  # fmt: skip
        most = limits(partial(reference, "adamw_ema"), fresh())
        for y, yardstick, truth, limit in zip(got, plain, exact, most, strict=True):
            assert error(y, truth) <= limit
            refused += error(y, truth) > allowed(yardstick, truth)
    assert refused, "one run of plain torch would have done here"


# ----------------------------------------------------------------------------------------------- faults are faults


@pytest.mark.parametrize("op", FP32)
@pytest.mark.parametrize("bits", [10, 7], ids=["tf32", "bf16"])
def test_lost_digits_are_seen_in_every_op(op: str, bits: int) -> None:
    module, tried = cases_of(op), 0
    for case in module.CASES:
        for of in (reference, gradients_of_reference) if module.GRADS else (reference,):
            fresh = lambda: module.inputs(case, torch.float32)  # noqa: B023
            lost = lambda: map_tensors(partial(rounded, bits=bits), fresh())  # noqa: B023
            exact, got = of(op, wide(fresh())), of(op, lost())
            if not any(map(error, of(op, wide(lost())), exact)):
                continue  # nothing to compute, or a gradient that no input changes
            most = limits(partial(of, op), fresh())
            assert any(error(y, truth) > 10 * limit for y, truth, limit in zip(got, exact, most, strict=True)), case.id
            tried += 1
    assert tried


@pytest.mark.parametrize("op", FP32)
def test_a_row_that_is_not_written_is_seen_in_every_op(op: str) -> None:
    module = cases_of(op)
    for case in module.CASES:
        fresh = lambda: module.inputs(case, torch.float32)  # noqa: B023
        exact = reference(op, wide(fresh()))
        for y, truth, limit in zip(reference(op, fresh()), exact, limits(partial(reference, op), fresh()), strict=True):
            if truth.numel() and y.is_floating_point() and truth.flatten()[-1]:
                y[(-1,) * y.ndim] = 0.0
                assert error(y, truth) > limit


FAULTS = {
    "one term left out": lambda a, b: one_by_one(a, b, torch.arange(1, len(b))),
    "tf32 products": lambda a, b: rounded(a, 10) @ rounded(b, 10),
    "sums in bf16": lambda a, b: sum((x[:, None] * y).bfloat16() for x, y in zip(a.mT, b)).float(),
    "three times the error": lambda a, b: 3 * one_by_one(a, b, torch.arange(len(b))).double() - 2 * EXACT_MM(a, b),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_a_faulty_product_is_refused(case: Any, fault: str) -> None:
    inputs = cases_of("linear").inputs(case, torch.float32) | {"bias": None}
    exact = products(inputs, EXACT_MM)
    most = limits(partial(reference, "linear"), inputs) + limits(partial(gradients_of_reference, "linear"), inputs)[:2]
    got = products(inputs, FAULTS[fault])
    beyond = [error(y, truth) / limit for y, truth, limit in zip(got, exact, most, strict=True)]
    assert max(beyond) > 1, beyond
