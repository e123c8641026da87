"""Every op, over the backends that can run here, devices and cases.

One rule of accuracy and no tolerances: against float64, a backend errs at most twice as much as plain torch (the
reference backend) at the same dtype, whatever the order of its sums, plus twice the rounding of the exact answer
(`cmt_kernels.accuracy`). The reference itself must give the formula by hand in float64, and half the digits of the dtype in
a lower precision.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import cmt_kernels
import pytest
import torch
from cmt_kernels import OPS, Dual, available, use
from cmt_kernels.accuracy import limits
from cmt_kernels.cases import backends_on, cases_of, error, implementation, map_tensors, mutated, outputs, wide
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.kernels.formulas import by_hand

pytestmark = pytest.mark.usefixtures("nan_poison")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "strided": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim > 1 else x,
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}

IMPLEMENTATIONS = [
    pytest.param(op, name, device, id=f"{op}-{name}-{device}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op in OPS
    for name in backends_on(op, device)
]
OP_CASES = [pytest.param(op, case, id=f"{op}-{case.id}") for op in OPS for case in cases_of(op).CASES]
EVERY_CASE = [
    pytest.param(*i.values, case, layout, id=f"{i.id}-{case.id}-{layout}", marks=i.marks)
    for i in IMPLEMENTATIONS
    for case in cases_of(i.values[0]).CASES
    for layout in LAYOUTS
    if not (mutated(i.values[0]) and layout == "strided")  # buffers changed in place are flat
]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def assert_accurate(got: list[Tensor], plain: list[Tensor], exact: list[Tensor], most: list[float]) -> None:
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in plain]
    for i, (y, truth, limit) in enumerate(zip(got, exact, most, strict=True)):
        assert error(y, truth) <= limit, f"output {i}"


@functools.cache
def most(op: str, case: Any, dtype: torch.dtype, device: str, of: Callable) -> list[float]:
    """What the outputs (of: reference) or gradients (of: gradients_of_reference) of a case may err by."""
    return limits(partial(of, op), cases_of(op).inputs(case, dtype, device))


@functools.cache
def right(op: str, case: Any, dtype: torch.dtype, device: str, of: Callable) -> tuple[list[Tensor], list[Tensor]]:
    """What `of`, as in `most`, gives in float64 and in the dtype: computed once for all layouts and backends."""
    inputs = lambda: cases_of(op).inputs(case, dtype, device)
    return of(op, wide(inputs())), of(op, inputs())


def reference(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    return outputs(op, implementation(op, "reference"), inputs)


def assert_half_the_digits(got: list[Tensor], exact: list[Tensor]) -> None:
    for y, truth in zip(got, exact, strict=True):
        if not y.dtype.is_floating_point:
            assert torch.equal(y, truth)
            continue
        scale = truth.abs().max().item() if truth.numel() else 0.0
        assert error(y, truth) <= torch.finfo(y.dtype).eps ** 0.5 * scale


def with_leaves(op: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The inputs with the arguments of GRADS as leaves that want a gradient, and those leaves."""
    leaves = {}
    for name in cases_of(op).GRADS:
        x = inputs[name]
        if x is not None:
            leaves[name] = (x.value if isinstance(x, Dual) else x).detach().requires_grad_()
            inputs = inputs | {name: x._replace(value=leaves[name]) if isinstance(x, Dual) else leaves[name]}
    return inputs, list(leaves.values())


def gradients(
    op: str, call: Callable[[dict[str, Any]], list[Tensor]], inputs: dict[str, Any], layout: str = "contiguous"
) -> list[Tensor]:
    """Gradients of every output with a graph, along fixed random directions laid out like `layout`."""
    inputs, leaves = with_leaves(op, inputs)
    results = [y for y in call(inputs) if y.requires_grad]
    generator = torch.Generator().manual_seed(1)
    # numbers of bfloat16 are the same in every dtype: else the exact gradient would be that of other directions
    draw = lambda y: torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().to(y)
    directions = [LAYOUTS[layout](draw(y)) for y in results]
    return list(torch.autograd.grad(results, leaves, directions))


def gradients_of_reference(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    return gradients(op, partial(reference, op), inputs)


def test_poison() -> None:
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2, 2)).isnan().all()


@pytest.mark.parametrize("op", OPS)
def test_cases_are_well_formed(op: str) -> None:
    module = cases_of(op)
    names = list(inspect.signature(getattr(cmt_kernels, op)).parameters)
    ids = [case.id for case in module.CASES]
    assert len(set(ids)) == len(ids)
    for case in module.CASES:
        inputs = module.inputs(case)
        assert set(names[: len(inputs)]) == set(inputs)
        assert module.nbytes(case, 4) >= 0 and module.flops(case) >= 0
        again = outputs(op, implementation(op, "reference"), module.inputs(case))
        assert all(torch.equal(a, b) for a, b in zip(outputs(op, implementation(op, "reference"), inputs), again))


@pytest.mark.parametrize("op", OPS)
def test_backends_share_the_public_signature(op: str) -> None:
    public = inspect.signature(getattr(cmt_kernels, op))
    for name in available(op):
        assert inspect.signature(implementation(op, name)) == public, name


@pytest.mark.parametrize("op, case", OP_CASES)
def test_reference_is_the_formula(op: str, case: Any) -> None:
    module = cases_of(op)

    def fresh(dtype: torch.dtype) -> dict[str, Any]:
        return wide(module.inputs(case, dtype))

    if op != "path_point":  # its noise is float32 by definition
        torch.testing.assert_close(reference(op, fresh(torch.float64)), by_hand(op, fresh(torch.float64)), **EXACT)
    for dtype in module.DTYPES:
        assert_half_the_digits(reference(op, module.inputs(case, dtype)), by_hand(op, fresh(dtype)))
    if module.GRADS:
        ours, theirs = (gradients(op, partial(call, op), fresh(torch.float64)) for call in (reference, by_hand))
        torch.testing.assert_close(ours, theirs, **EXACT)
        for dtype in module.DTYPES:
            ours = gradients(op, partial(reference, op), module.inputs(case, dtype))
            assert_half_the_digits(ours, gradients(op, partial(by_hand, op), fresh(dtype)))


@pytest.mark.parametrize("op, name, device, case, layout", EVERY_CASE)
def test_forward(op: str, name: str, device: str, case: Any, layout: str) -> None:
    module = cases_of(op)
    for dtype in module.DTYPES:
        exact, plain = right(op, case, dtype, device, reference)
        inputs = map_tensors(LAYOUTS[layout], module.inputs(case, dtype, device))
        got = outputs(op, implementation(op, name), inputs)
        assert_accurate(got, plain, exact, most(op, case, dtype, device, reference))


@pytest.mark.parametrize("op, name, device, case, layout", [p for p in EVERY_CASE if cases_of(p.values[0]).GRADS])
def test_gradient(op: str, name: str, device: str, case: Any, layout: str) -> None:
    module = cases_of(op)
    for dtype in module.DTYPES:
        inputs = module.inputs(case, dtype, device)
        exact, plain = right(op, case, dtype, device, gradients_of_reference)
        laid_out = map_tensors(LAYOUTS[layout], inputs)
        got = gradients(op, partial(outputs, op, implementation(op, name)), laid_out, layout)
        assert_accurate(got, plain, exact, most(op, case, dtype, device, gradients_of_reference))


@pytest.mark.parametrize("op, case", [p for p in OP_CASES if cases_of(p.values[0]).GRADS])
def test_gradcheck(op: str, case: Any) -> None:
    inputs, leaves = with_leaves(op, cases_of(op).inputs(case, torch.float64))
    if op == "meanflow_loss":
        inputs["p"] = 0.0  # the weight is a constant of the gradient, which finite differences cannot know
    names = [name for name in cases_of(op).GRADS if inputs[name] is not None]

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        replaced = {n: inputs[n]._replace(value=x) if isinstance(inputs[n], Dual) else x for n, x in zip(names, xs)}
        return tuple(y for y in outputs(op, implementation(op, "reference"), inputs | replaced) if y.requires_grad)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("op", ["modulated_norm", "gated_residual", "gelu", "qk_norm"])
@pytest.mark.parametrize("dtype, other", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_output_has_the_dtype_of_one_argument(op: str, dtype: torch.dtype, other: torch.dtype) -> None:
    """Of shift in modulated_norm, which takes the residual stream and gives a branch; of the first elsewhere."""
    case = next(case for case in cases_of(op).CASES if case.k)
    inputs = cases_of(op).inputs(case, other)
    first = "shift" if op == "modulated_norm" else next(iter(inputs))
    inputs[first] = map_tensors(lambda x: x.to(dtype), inputs[first])
    for name in backends_on(op, "cpu"):
        assert {y.dtype for y in outputs(op, implementation(op, name), inputs)} == {dtype}, name


@pytest.mark.parametrize("op, name, device", [p for p in IMPLEMENTATIONS if not mutated(p.values[0])])
def test_compiled_is_eager(op: str, name: str, device: str) -> None:
    """One graph, traced before the op ever ran, with its gradient; the tangent survives. An optimizer is outside."""
    module = cases_of(op)
    case = next((case for case in module.CASES if 0 < (getattr(case, "k", None) or 0) < case.B), module.CASES[-1])
    dtype = module.DTYPES[0]
    torch._dynamo.reset()
    with use(f"{op}:{name}"):
        compiled = torch.compile(getattr(cmt_kernels, op), fullgraph=True, backend="aot_eager")
        inputs, leaves = with_leaves(op, module.inputs(case, dtype, device))
        got = outputs(op, compiled, inputs)
        eager_inputs, eager_leaves = with_leaves(op, module.inputs(case, dtype, device))
        eager = outputs(op, getattr(cmt_kernels, op), eager_inputs)
    torch.testing.assert_close(got, eager)
    if leaves:
        directions = [torch.ones_like(y) for y in eager if y.requires_grad]
        ours, theirs = (
            torch.autograd.grad([y for y in ys if y.requires_grad], xs, directions)
            for ys, xs in ((got, leaves), (eager, eager_leaves))
        )
        torch.testing.assert_close(ours, theirs)
    if getattr(case, "k", None) and op != "meanflow_loss":
        assert got[1].shape[0] == case.k and not got[1].requires_grad and got[1].count_nonzero() > 0


def test_linear_follows_autocast() -> None:
    case = next(case for case in cases_of("linear").CASES if case.k)
    with torch.autocast("cpu", torch.bfloat16):
        y = cmt_kernels.linear(**cases_of("linear").inputs(case))
    assert y.value.dtype == y.tangent.dtype == torch.bfloat16


@pytest.mark.parametrize("op", OPS)
def test_only_declared_arguments_change(op: str) -> None:
    for name in backends_on(op, "cpu"):
        for case in cases_of(op).CASES:
            inputs = cases_of(op).inputs(case)
            before = map_tensors(torch.clone, inputs)
            outputs(op, implementation(op, name), inputs)
            kept = [x for x in inputs if x not in mutated(op) + getattr(cases_of(op), "SCRATCH", ())]
            for x, y in zip(*(tree_leaves([tree[x] for x in kept]) for tree in (inputs, before)), strict=True):
                assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def gradients_through_norm(name: str, also_x: bool, dtype: torch.dtype, stream: torch.dtype) -> list[Tensor]:
    """y of modulated_norm, and the gradients where x is read by it and by a residual after it."""
    module = cases_of("modulated_norm")
    inputs = module.inputs(next(case for case in module.CASES if case.k), dtype)
    inputs["x"] = map_tensors(lambda x: x.to(stream), inputs["x"])
    inputs, leaves = with_leaves("modulated_norm", inputs)
    norm = implementation("modulated_norm", name)
    y, x = norm(**inputs, also_x=True) if also_x else (norm(**inputs), inputs["x"])
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(m.shape, generator=generator).to(m.dtype) for m in (y.value, x.value)]
    return [*y, x.tangent, *torch.autograd.grad((y.value, x.value), leaves, directions)]


@pytest.mark.parametrize("dtype, stream", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", [n for n in backends_on("modulated_norm", "cpu")])
def test_what_goes_through_the_norm_is_added_in_its_backward(
    name: str, dtype: torch.dtype, stream: torch.dtype
) -> None:
    """The same bits as autograd's addition, of a stream in float32: with bfloat16 there is one rounding less."""
    ours = gradients_through_norm(name, True, dtype, stream)
    assert all(map(torch.equal, ours, gradients_through_norm(name, False, dtype, stream)))


@pytest.mark.parametrize("name", backends_on("mp_silu", "cpu"))
@pytest.mark.parametrize("scaled", [False, True])
def test_what_goes_through_mp_silu_is_added_in_its_backward(name: str, scaled: bool) -> None:
    module, grads = cases_of("mp_silu"), []
    for also_x in (False, True):
        inputs, leaves = with_leaves("mp_silu", module.inputs(module.Case(3, 5, 24, scaled, 2)))
        y, x = implementation("mp_silu", name)(**inputs, also_x=True) if also_x else (
            implementation("mp_silu", name)(**inputs), inputs["x"])  # fmt: skip
        assert torch.equal(x.tangent, inputs["x"].tangent)
        grads.append(torch.autograd.grad(y.value.sin().sum() + x.value.cos().sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("op", ["modulated_norm", "gated_residual"])
@pytest.mark.parametrize("k", [None, 2])
def test_a_stream_in_float32_beside_bfloat16_has_the_bits_of_casts(op: str, k: int | None) -> None:
    """What the kernel reads and writes in bfloat16 is what casts around a kernel in float32 would give."""
    case = next(case for case in cases_of(op).CASES if case.stream and case.k == k)
    inputs = cases_of(op).inputs(case, torch.bfloat16)
    widened = map_tensors(torch.Tensor.float, inputs)
    for name in backends_on(op, "cpu"):
        function = implementation(op, name)
        got, plain = outputs(op, function, inputs), outputs(op, function, widened)
        assert all(torch.equal(y, z.to(y.dtype)) for y, z in zip(got, plain, strict=True)), name
        got, plain = (gradients(op, partial(outputs, op, function), x) for x in (inputs, widened))
        assert all(torch.equal(y, z.to(y.dtype)) for y, z in zip(got, plain, strict=True)), name
