"""`torch.func` transforms and forward AD through every op: right, or refused by name; never a tangent of zero.

Derivatives are compared with those of the formulas by hand (`formulas.py`), vmap with a loop. In float64 a native op is
its reference, so what the kernels do shows in float32, the dtype of the refusals and of `test_every_transform`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cmt_kernels
import pytest
import torch
from cmt_kernels import OPS, Dual, _op, use
from cmt_kernels.cases import backends_on, cases_of, implementation, map_tensors, outputs, without_tangents
from cmt_kernels.dual import add, combine, concatenate, linear_map, multiply
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

from tests.fixtures import forked
from tests.kernels import interpreter
from tests.kernels.formulas import by_hand
from tests.kernels.test_ops import EXACT, assert_half_the_digits, with_leaves

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.quicken()
pytestmark = pytest.mark.usefixtures("nan_poison")


def plain_case(op: str) -> Any:
    """The first case without tangents; of the normalised qkv, the one with weights and RoPE."""
    return next(case for case in cases_of(op).CASES if getattr(case, "k", None) is None)


def tensors_of(op: str, floating: bool) -> list[str]:
    inputs = cases_of(op).inputs(plain_case(op))
    return [n for n, x in inputs.items() if isinstance(x, Tensor) and (x.is_floating_point() or not floating)]


IN_PLACE = ("adamw_ema", "weight_gradient")
SMOOTH = [op for op in OPS if op not in (*IN_PLACE, "random_bits")]
ARGUMENTS = [(op, name) for op in SMOOTH for name in tensors_of(op, True)]
MAPPED = [(op, name) for op in OPS if op not in IN_PLACE for name in tensors_of(op, False)]
DUAL_OPS = [op for op in OPS if any(getattr(case, "k", None) for case in cases_of(op).CASES)]
KERNELS = [(op, name) for op in OPS for name in backends_on(op, "cpu") if name != "reference"]
of_arguments = pytest.mark.parametrize("op, argument", ARGUMENTS)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    """The same of the Triton kernels, in a process that interprets them: what the dispatch would run, it refuses."""
    chosen = "triton or every_transform and (-x] or -qkv] or -u] or prediction]) or optimizer"
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", chosen]
    command = [*forked.python("interpreter"), "-m", "pytest", *options, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    ops = len(list(Path(_op.__file__).parent.glob("*/triton.py"))) - 1  # without _row
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > (len(TRANSFORMS) + 1) * ops, result.stdout


def call(op: str, argument: str, dtype: torch.dtype, run: Callable | None = None) -> tuple[Callable, Tensor, Tensor]:
    """The op as a function of one argument, that argument's value, and a direction."""
    inputs = cases_of(op).inputs(plain_case(op), dtype)
    x = inputs[argument]
    run = run or (lambda inputs: outputs(op, getattr(cmt_kernels, op), inputs))
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    return lambda x: tuple(run(inputs | {argument: x})), x, direction


def formula(op: str) -> Callable:
    return lambda inputs: by_hand(op, inputs)


def scalar(f: Callable) -> Callable[[Tensor], Tensor]:
    """A curved function of every result."""
    weigh = lambda y: y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return lambda x: sum(weigh(y).sum() + y.square().sum() for y in f(x))


def compare(op: str, got: Any, want: Any) -> None:
    """In float64 to rounding of the largest number; of path_point, whose noise is float32, to half the digits of that."""
    for y, truth in zip(got, want, strict=True):
        if op == "path_point":
            assert_half_the_digits([y.float()], [truth])
        else:
            rounding = EXACT["rtol"] * (1 + truth.abs().max().item())
            torch.testing.assert_close(y, truth, rtol=0, atol=rounding)


@of_arguments
def test_jvp_is_the_formula_s(op: str, argument: str) -> None:
    f, x, direction = call(op, argument, torch.float64)
    by, _, _ = call(op, argument, torch.float64, formula(op))
    compare(op, jvp(f, (x,), (direction,))[1], jvp(by, (x,), (direction,))[1])


@of_arguments
def test_second_derivatives_are_the_formula_s(op: str, argument: str) -> None:
    """Forward over reverse, reverse over forward, forward over forward, reverse over reverse."""
    f, x, direction = call(op, argument, torch.float64)
    by, _, _ = call(op, argument, torch.float64, formula(op))
    along = lambda f: lambda x: jvp(f, (x,), (direction,))[1]
    orders = (
        lambda f: along(grad(f)),
        lambda f: grad(along(f)),
        lambda f: along(along(f)),
        lambda f: grad(lambda x: (grad(f)(x) * direction).sum()),
    )
    for order in orders:
        compare(op, [order(scalar(f))(x)], [order(scalar(by))(x)])


@of_arguments
def test_every_transform(op: str, argument: str) -> None:
    """In float32, where kernels are: as the reference in float64, to half the digits."""
    f, x, direction = call(op, argument, torch.float32)
    exact, _, _ = call(op, argument, torch.float64)
    wide, dx = x.double(), direction.double()
    want = jvp(exact, (wide,), (dx,))[1]
    assert_half_the_digits(list(jvp(f, (x,), (direction,))[1]), list(want))
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(y) for y in f(forward_ad.make_dual(x, direction))]
        got = [torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals]
    assert_half_the_digits(got, list(want))
    assert_half_the_digits(list(linearize(f, x)[1](direction)), list(want))
    assert_half_the_digits([grad(scalar(f))(x)], [grad(scalar(exact))(wide)])
    pair, wides = torch.stack((x, x + direction)), torch.stack((wide, wide + dx))
    assert_half_the_digits([vmap(grad(scalar(f)))(pair)], [torch.stack([grad(scalar(exact))(w) for w in wides])])
    got = vmap(lambda x: jvp(f, (x,), (direction,))[1])(pair)
    each = zip(*(jvp(exact, (w,), (dx,))[1] for w in wides))
    assert_half_the_digits(list(got), [torch.stack(ys) for ys in each])


@pytest.mark.parametrize("op, argument", MAPPED)
def test_vmap_is_a_loop(op: str, argument: str) -> None:
    f, x, direction = call(op, argument, torch.float64)
    other = x + direction if x.is_floating_point() else x.flip(0)
    got, want = vmap(f)(torch.stack((x, other))), [torch.stack(ys) for ys in zip(f(x), f(other))]
    torch.testing.assert_close(list(got), want, **EXACT)


@pytest.mark.parametrize("argument", ["value", "tangent", "both"])
@pytest.mark.parametrize("op", DUAL_OPS)
def test_vmap_over_a_dual_is_a_loop(op: str, argument: str) -> None:
    case = next(case for case in cases_of(op).CASES if getattr(case, "k", None) and case.k < case.B)
    inputs = cases_of(op).inputs(case, torch.float64)
    name = next(name for name, x in inputs.items() if isinstance(x, Dual))
    axes = {"value": Dual(0, None), "tangent": Dual(None, 0), "both": Dual(0, 0)}[argument]
    x = inputs[name]
    doubled = Dual(*(torch.stack((m, 1.5 * m)) if axis == 0 else m for m, axis in zip(x, axes)))
    f = lambda x: tuple(outputs(op, getattr(cmt_kernels, op), inputs | {name: Dual(*x)}))
    got = vmap(f, in_dims=(tuple(axes),))(tuple(doubled))
    each = [Dual(*(m[i] if axis == 0 else m for m, axis in zip(doubled, axes))) for i in range(2)]
    torch.testing.assert_close(list(got), [torch.stack(ys) for ys in zip(*map(f, each))], **EXACT)


@pytest.mark.parametrize("op", DUAL_OPS)
def test_a_dual_inside_a_derivative(op: str) -> None:
    """Backward it is the value's gradient, as always. Forward it is refused: a tangent's own derivative is not known."""
    case = next(case for case in cases_of(op).CASES if getattr(case, "k", None))
    inputs = cases_of(op).inputs(case, torch.float64)
    name = next(name for name, x in inputs.items() if isinstance(x, Dual))
    x = inputs[name]
    f = lambda v, d: outputs(op, getattr(cmt_kernels, op), inputs | {name: Dual(v, d)})
    leaf = x.value.clone().requires_grad_()
    results = [y for y in f(leaf, x.tangent) if y.requires_grad]
    (want,) = torch.autograd.grad([scalar(lambda _: results)(leaf)], leaf)
    torch.testing.assert_close(grad(lambda v: scalar(lambda v: f(v, x.tangent)[:1])(v))(x.value), want, **EXACT)
    if op == "meanflow_loss":  # its tangent belongs to the target, which is a constant of the loss
        by = lambda v: tuple(by_hand(op, inputs | {name: Dual(v, x.tangent)}))
        got = jvp(lambda v: tuple(f(v, x.tangent)), (x.value,), (x.value,))[1]
        torch.testing.assert_close(got, jvp(by, (x.value,), (x.value,))[1], **EXACT)
        assert not any(y.any() for y in jvp(lambda d: tuple(f(x.value, d)), (x.tangent,), (x.tangent,))[1])
        return
    for g, member in ((lambda v: f(v, x.tangent), x.value), (lambda d: f(x.value, d), x.tangent)):
        with pytest.raises(RuntimeError, match="a Dual inside torch.func.jvp"):
            jvp(g, (member,), (member,))
        with pytest.raises(RuntimeError, match="a Dual inside torch.autograd.forward_ad"), forward_ad.dual_level():
            g(forward_ad.make_dual(member, member))


def test_arithmetic_of_duals_inside_a_forward_derivative_is_refused() -> None:
    x, d = torch.randn(3, 2), torch.randn(2, 2)
    functions = {
        "add": lambda a: add(a, a),
        "combine": lambda a: combine(a, 2.0, a, 3.0),
        "multiply": lambda a: multiply(a, a),
        "concatenate": lambda a: concatenate(a, a),
        "linear_map": lambda a: linear_map(lambda x: 2 * x, a),
    }
    for function in functions.values():
        function(Dual(x, d))
        with pytest.raises(RuntimeError, match="a Dual inside torch.func.jvp"):
            jvp(lambda x, function=function: tuple(function(Dual(x, d))), (x,), (x,))


TRANSFORMS: dict[str, Callable[[Callable, Tensor], Any]] = {
    "torch.func.jvp": lambda f, x: jvp(f, (x,), (x,)),
    "torch.func.vmap": lambda f, x: vmap(f)(torch.stack((x, x))),
    "torch.func.grad or vjp": lambda f, x: torch.func.vjp(f, x),
    "torch.autograd.forward_ad.dual_level": lambda f, x: in_dual_level(f, x),
}


def in_dual_level(f: Callable, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op, name", KERNELS)
def test_a_kernel_refuses(op: str, name: str, transform: str) -> None:
    """Called past the dispatch, and where it is forced: by the op's name, the transform's and the way out."""
    argument = (tensors_of(op, True) or tensors_of(op, False))[0]
    says = rf"{op}: its {name} kernel has no rule for {transform}.*CMT_KERNELS={op}:reference"
    past = lambda inputs: outputs(op, implementation(op, name), inputs)
    for run in (past, None):
        f, x, _ = call(op, argument, torch.float32, run)
        if not x.is_floating_point():
            f, x = lambda ids, f=f: f(ids.long()), x.float()
        f(x.clone())  # it runs
        with use(f"{op}:{name}"), pytest.raises(RuntimeError, match=says):
            TRANSFORMS[transform](f, x)


def test_an_optimizer_step_has_no_derivative_but_maps() -> None:
    module = cases_of("adamw_ema")
    case = module.CASES[4]  # clipped, decayed, with EMA tracks
    one, two = module.inputs(case), module.inputs(case)
    two |= {name: 2 * two[name] for name in ("p", "g", "m", "v")}
    buffers = ("p", "g", "m", "v", "emas")
    rest = {name: x for name, x in one.items() if name not in buffers}
    stacked = [torch.stack((one[n], two[n])) for n in buffers[:4]]
    stacked.append([torch.stack(es) for es in zip(one["emas"], two["emas"])])
    got = vmap(lambda p, g, m, v, emas: cmt_kernels.adamw_ema(p, g, m, v, emas, **rest))(*stacked)
    with use("adamw_ema:reference"):
        want = torch.stack([cmt_kernels.adamw_ema(**one), cmt_kernels.adamw_ema(**two)])
    torch.testing.assert_close(got, want)
    for name, x in zip(buffers[:4], stacked):
        torch.testing.assert_close(x, torch.stack((one[name], two[name])))
    for transform in (t for name, t in TRANSFORMS.items() if name != "torch.func.vmap"):
        with pytest.raises(RuntimeError, match="adamw_ema: a step .* has no derivative"):
            transform(lambda g: cmt_kernels.adamw_ema(**module.inputs(case) | {"g": g}), one["g"])


def test_a_gradient_that_is_added_in_place_has_no_derivative() -> None:
    inputs = cases_of("weight_gradient").inputs(plain_case("weight_gradient"))
    for name, transform in TRANSFORMS.items():
        if name != "torch.func.vmap":
            with pytest.raises(RuntimeError, match="weight_gradient: it changes g in place and has no derivative"):
                transform(lambda x: cmt_kernels.weight_gradient(**inputs | {"x": x}) or x, inputs["x"])


@pytest.mark.parametrize("op, name", [p for p in KERNELS if cases_of(p[0]).GRADS])
def test_the_gradient_of_a_kernel_refuses_a_tangent(op: str, name: str) -> None:
    """Its graph was made outside; forward AD comes with the gradient. A batch of gradients is mapped, and right."""
    inputs, leaves = with_leaves(op, cases_of(op).inputs(plain_case(op)))
    y = outputs(op, implementation(op, name), inputs)[0]
    back = lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True)
    g = torch.randn_like(y)
    back(g)
    with pytest.raises(RuntimeError, match=f"{op}: the gradient of its kernel has no rule for torch.autograd"):
        in_dual_level(back, g)
    with pytest.raises(RuntimeError, match=f"{op}: the gradient of its kernel has no rule for torch.func.jvp"):
        jvp(back, (g,), (g,))
    with forward_ad.dual_level():
        back(g)  # nothing here has a tangent
    batched = torch.autograd.grad(y, leaves, torch.stack((g, 2 * g)), retain_graph=True, is_grads_batched=True)
    for both, one in zip(batched, back(g)):
        torch.testing.assert_close(both, torch.stack((one, 2 * one)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_jacobians_and_hessians_of_a_block(dtype: torch.dtype) -> None:
    """Several ops after one another, the first of them natively: jacfwd, jacrev, hessian."""
    x, weight, c = (torch.randn(*shape, dtype=dtype) for shape in ((2, 3, 4), (4, 4), (2, 4)))

    def block(ops: Any) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            h = ops(
                "gelu",
                x=ops("linear", x=ops("modulated_norm", x=x, shift=c, scale=c), weight=weight, bias=None),
                bias=None,
            )
            return ops("gated_residual", x=x, branch=h, gate=c, bias=None)

        return f

    ours = block(lambda op, **inputs: getattr(cmt_kernels, op)(**inputs))
    hand = block(lambda op, **inputs: by_hand(op, inputs)[0])
    total = lambda f: lambda x: (f(x) ** 2).sum()
    for derivative in (jacfwd(ours), jacrev(ours)):
        assert_half_the_digits([derivative(x)], [jacfwd(hand)(x.double().to(x))])
    assert_half_the_digits([hessian(total(ours))(x)], [hessian(total(hand))(x)])


@pytest.mark.parametrize("op, argument", [next(p for p in ARGUMENTS if p[0] == op) for op in SMOOTH])
def test_compiled(op: str, argument: str) -> None:
    """A transform inside compiled code, and forward AD around code compiled before it, as in eager code."""
    public, inputs = getattr(cmt_kernels, op), cases_of(op).inputs(plain_case(op))
    _, x, direction = call(op, argument, torch.float32)

    def f(x: Tensor) -> tuple[Tensor, ...]:
        y = public(**inputs | {argument: x})
        return y if isinstance(y, tuple) else (y,)

    want = jvp(f, (x,), (direction,))[1]
    torch._dynamo.reset()
    inside = torch.compile(lambda x, d: jvp(f, (x,), (d,))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inside(x, direction), want)
    mapped = torch.compile(lambda x: vmap(f)(x), fullgraph=True, backend="aot_eager")
    pair = torch.stack((x, x + direction))
    torch.testing.assert_close(mapped(pair), vmap(f)(pair))
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), f(x))
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(y).tangent for y in compiled(forward_ad.make_dual(x, direction))]
    got = [torch.zeros_like(w) if y is None else y for y, w in zip(duals, want)]
    torch.testing.assert_close(got, list(want))
    torch.testing.assert_close(compiled(x), f(x))


def test_jvp_of_a_compiled_op_is_refused_or_right() -> None:
    """torch refuses to trace it; whatever a later torch does, the tangent is there."""
    x, direction = torch.randn(3, 8), torch.randn(3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(cmt_kernels.gelu, fullgraph=True, backend="aot_eager")
    compiled(x)
    try:
        got = jvp(compiled, (x,), (direction,))[1]
    except torch._dynamo.exc.Unsupported:
        return
    torch.testing.assert_close(got, jvp(cmt_kernels.gelu, (x,), (direction,))[1])


def test_the_choice_under_a_transform_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cmt_kernels.table("cpu")
    vmap(cmt_kernels.gelu)(torch.randn(2, 3))
    assert cmt_kernels.table("cpu") == before and _op.backend("gelu").__module__.endswith(before["gelu"])
    assert _op._resolved[_op.TRANSFORMED]["gelu"][0] == "reference"
    with use("gelu:reference"):
        vmap(cmt_kernels.gelu)(torch.randn(2, 3))
    monkeypatch.setattr(cmt_kernels.transforms, "_levels", lambda: pytest.fail("eager calls look at two flags alone"))
    for op in OPS:
        getattr(cmt_kernels, op)(**without_tangents(map_tensors(torch.clone, cases_of(op).inputs(plain_case(op)))))
