"""Dual arguments: the value is the plain forward, bit for bit and buffer for buffer; the tangent is torch.func.jvp."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from cmt_kernels import OPS, Dual, meanflow_loss
from cmt_kernels.cases import backends_on, cases_of, implementation, map_tensors, tangent_rows, without_tangents
from cmt_kernels.dual import add, combine, concatenate, head, linear_map, multiply, rows, tangent, value
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.kernels.formulas import tangent_of


def dual_arguments(inputs: dict[str, Any]) -> list[str]:
    return [name for name, x in inputs.items() if isinstance(x, Dual)]


EXACT = {"rtol": 1e-10, "atol": 1e-10}
DUAL_CASES = [
    pytest.param(op, device, case, id=f"{op}-{device}-{case.id}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op in OPS
    if op != "meanflow_loss"
    for case in cases_of(op).CASES
    if dual_arguments(cases_of(op).inputs(case))
]
DUAL_OPS = sorted({p.values[0] for p in DUAL_CASES})
every_dual_case = pytest.mark.parametrize("op, device, case", DUAL_CASES)


def requiring_grad(inputs: dict[str, Any], op: str) -> dict[str, Any]:
    """Values and weights that want a gradient; tangents and tables do not."""
    inputs = map_tensors(torch.clone, inputs)
    for name in cases_of(op).GRADS:
        if inputs[name] is not None:
            value(inputs[name]).requires_grad_()
    return inputs


def mixtures(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every way to leave some of the dual arguments plain, except all of them."""
    names = dual_arguments(inputs)
    plain = [subset for n in range(len(names)) for subset in combinations(names, n)]
    return [inputs | {name: inputs[name].value for name in subset} for subset in plain]


@pytest.mark.parametrize("op", [*DUAL_OPS, "meanflow_loss"])
def test_cases_cover_the_row_counts(op: str) -> None:
    assert set(tangent_rows(8)) <= {case.k for case in cases_of(op).CASES if case.B == 8}


@every_dual_case
def test_value_is_the_plain_forward(op: str, device: str, case: Any) -> None:
    for name in backends_on(op, device):
        function = implementation(op, name)
        for dtype in cases_of(op).DTYPES:
            inputs = cases_of(op).inputs(case, dtype, device)
            assert torch.equal(function(**inputs).value, function(**without_tangents(inputs))), (name, dtype)


@every_dual_case
def test_tangent_is_the_jvp(op: str, device: str, case: Any) -> None:
    inputs = cases_of(op).inputs(case, torch.float64, device)
    function = implementation(op, "reference")
    for mixture in mixtures(inputs):
        plain, duals = without_tangents(mixture), {name: mixture[name] for name in dual_arguments(mixture)}
        with sdpa_kernel(SDPBackend.MATH):
            exact = tangent_of(lambda **values: function(**plain | values), duals)  # noqa: B023
        y = function(**mixture)
        assert y.tangent.shape == (case.k, *y.value.shape[1:])
        torch.testing.assert_close(y.tangent, exact[: case.k], **EXACT)


@every_dual_case
def test_tangent_is_linear(op: str, device: str, case: Any) -> None:
    inputs = cases_of(op).inputs(case, torch.float64, device)
    names = dual_arguments(inputs)
    function = implementation(op, "reference")

    def along(*weights: float) -> Tensor:
        """The tangent along weights[0] times the tangents of the case plus weights[1] times their cosines."""
        directions = {n: weights[0] * inputs[n].tangent + weights[1] * inputs[n].tangent.cos() for n in names}
        return function(**inputs | {n: Dual(inputs[n].value, x_dot) for n, x_dot in directions.items()}).tangent

    assert not along(0.0, 0.0).count_nonzero()
    torch.testing.assert_close(along(-2.5, 0.75), -2.5 * along(1.0, 0.0) + 0.75 * along(0.0, 1.0), **EXACT)


@every_dual_case
def test_tangent_leaves_no_trace_for_backward(op: str, device: str, case: Any) -> None:
    for name in backends_on(op, device):
        function = implementation(op, name)
        saved: dict[str, list[tuple[torch.Size, torch.dtype, int]]] = {}
        for kind, convert in (("plain", without_tangents), ("dual", lambda x: x)):
            record = saved.setdefault(kind, [])

            def pack(x: Tensor, record: list = record) -> Tensor:
                record.append((x.shape, x.dtype, x.untyped_storage().nbytes()))
                return x

            inputs = requiring_grad(convert(cases_of(op).inputs(case, device=device)), op)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                y = function(**inputs)
        assert saved["dual"] == saved["plain"], name
        assert y.value.requires_grad == bool(cases_of(op).GRADS)
        assert not y.tangent.requires_grad and y.tangent.grad_fn is None


@pytest.mark.parametrize("case", [c for c in cases_of("meanflow_loss").CASES if c.k is not None], ids=lambda c: c.id)
def test_meanflow_loss_reads_the_tangent_of_the_first_rows(case: Any) -> None:
    inputs = cases_of("meanflow_loss").inputs(case, torch.float64)
    u = inputs["u"]
    step = (inputs["t"] - inputs["r"])[: case.k].view(-1, *[1] * len(case.shape))
    v = inputs["v"].clone()
    v[: case.k] -= step * u.tangent
    for ours, theirs in zip(meanflow_loss(**inputs), meanflow_loss(**inputs | {"u": u.value, "v": v})):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_meanflow_target_has_no_gradient() -> None:
    case = next(case for case in cases_of("meanflow_loss").CASES if case.k)
    inputs = cases_of("meanflow_loss").inputs(case, torch.float64)
    u = inputs["u"].value.requires_grad_()
    inputs["v"].requires_grad_()
    loss, squared = meanflow_loss(**inputs)
    loss.sum().backward()
    assert inputs["v"].grad is None and not squared.requires_grad and u.grad.count_nonzero() == u.numel()


def test_add_and_linear_map() -> None:
    a, b = Dual(torch.randn(4, 3), torch.randn(2, 3)), Dual(torch.randn(4, 3), torch.randn(2, 3))
    assert torch.equal(add(a, b).value, a.value + b.value) and torch.equal(add(a, b).tangent, a.tangent + b.tangent)
    assert torch.equal(add(a, b.value).tangent, a.tangent) and torch.equal(add(a.value, b).tangent, b.tangent)
    assert isinstance(add(a.value, b.value), Tensor)
    doubled = linear_map(lambda x: 2 * x.flatten(1), a)
    assert torch.equal(doubled.value, 2 * a.value) and torch.equal(doubled.tangent, 2 * a.tangent)
    leaf = a.value.clone().requires_grad_()
    assert linear_map(lambda x: leaf[0] * x, a).value.requires_grad
    assert not linear_map(lambda x: leaf[0] * x, a).tangent.requires_grad


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize(
    "function",
    [lambda a, b: combine(a, 0.3, b, -1.7), multiply, concatenate],
    ids=["combine", "multiply", "concatenate"],
)
def test_sums_products_and_joins_of_duals(function: Any, which: tuple[int, ...]) -> None:
    values = [torch.randn(4, 3, 2, dtype=torch.float64) for _ in range(2)]
    dots = [torch.randn(2, 3, 2, dtype=torch.float64) if i in which else torch.zeros(2, 3, 2).double() for i in (0, 1)]
    y = function(*(Dual(x, dots[i]) if i in which else x for i, x in enumerate(values)))
    plain = function(*values)
    assert isinstance(plain, Tensor) and torch.equal(y.value, plain)
    _, exact = torch.func.jvp(function, tuple(x[:2] for x in values), tuple(dots))
    torch.testing.assert_close(y.tangent, exact, **EXACT)


def test_a_product_broadcasts_after_the_first_dimension() -> None:
    wide, thin = torch.randn(4, 3, 2, 2).double(), torch.randn(4, 3, 1, 1).double()
    y = multiply(wide, Dual(thin, thin[:2].cos()))
    assert torch.equal(y.tangent, wide[:2] * thin[:2].cos()) and y.tangent.shape == (2, 3, 2, 2)


def test_rows() -> None:
    a = Dual(torch.randn(4, 3, requires_grad=True), torch.randn(2, 3))
    assert rows(a, a.value, None) == 2 and rows(a.value) is None and tangent(a.value) is None
    assert torch.equal(head(a, 2), a.value[:2]) and not head(a, 2).requires_grad
    with pytest.raises(AssertionError, match="different row counts"):
        rows(a, Dual(a.value, torch.randn(1, 3)))
    with pytest.raises(AssertionError, match="different row counts"):
        add(a, Dual(a.value, torch.randn(4, 3)))
