"""The native ops: what test_ops.py does not ask of every backend. Bits, threads, instruction sets, refusals."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cmt_kernels import Dual, _native, unit_weight, use
from cmt_kernels._op import backend
from cmt_kernels.cases import cases_of, implementation, map_tensors, outputs, without_tangents
from torch import Tensor

from tests.fixtures import forked

OPS = ("gated_residual", "gelu", "modulated_norm", "mp_cat", "mp_silu", "mp_sum", "pixel_norm", "qk_norm")
built = pytest.mark.skipif(_native.unavailable("cpu") is not None, reason=str(_native.unavailable("cpu")))
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def big(op: str, dtype: torch.dtype, k: int | None = 2) -> dict[str, Any]:
    """Enough rows that two threads and several chunks of a column sum have work."""
    module = cases_of(op)
    sizes = {"B": 3, "T": 300, "k": k}
    shaped = {"shape": (200, 300, 1)}
    case = {
        "qk_norm": lambda: module.Case(**sizes, H=2, d=64),
        "mp_cat": lambda: module.Case(**sizes, D=200, E=40),
        "mp_sum": lambda: module.Case(B=3, **shaped, limit=1.5, k=k),
        "pixel_norm": lambda: module.Case(B=3, **shaped, k=k),
    }.get(op, lambda: module.Case(**sizes, D=200))()
    return module.inputs(case, dtype)


def leaves_of(op: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    inputs, leaves = dict(inputs), []
    for name in cases_of(op).GRADS:
        x = inputs[name]
        if x is not None:
            leaf = (x.value if isinstance(x, Dual) else x).clone().requires_grad_()
            inputs[name] = x._replace(value=leaf) if isinstance(x, Dual) else leaf
            leaves.append(leaf)
    return inputs, leaves


def run(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients of one native call."""
    inputs, leaves = leaves_of(op, inputs)
    results = outputs(op, implementation(op, "native"), inputs)
    direction = torch.cos(torch.arange(results[0].numel())).view(results[0].shape).to(results[0].dtype)
    return [y.detach() for y in results] + list(torch.autograd.grad(results[0], leaves, direction))


def arguments(op: str, requires_grad: bool) -> tuple:
    """The arguments of torch.ops.cmt.<op>, for opcheck; its native.py imported, where shapes and gradient are registered."""
    implementation(op, "native")
    draw = lambda *shape: torch.randn(shape, requires_grad=requires_grad)
    tangent = lambda *shape: torch.randn(shape)
    return {
        "gelu": (draw(3, 5, 20), draw(20), tangent(2, 5, 20)),
        "modulated_norm": (draw(3, 5, 20), draw(3, 20), draw(3, 20), tangent(2, 5, 20), None, tangent(2, 20), 1e-6),
        "gated_residual": (draw(3, 5, 20), draw(3, 5, 20), draw(3, 20), draw(20), None, tangent(2, 5, 20), None),
        "mp_cat": (draw(3, 5, 20), draw(3, 5, 12), None, tangent(2, 5, 12), 0.8, 1.2),
        "mp_silu": (draw(3, 5, 20), draw(3, 20), tangent(2, 5, 20), None),
        "mp_sum": (draw(3, 5, 20), draw(3, 5, 20), None, tangent(2, 5, 20), 0.9, 0.4, 1.0),
        "pixel_norm": (draw(3, 5, 20), tangent(2, 5, 20), 1e-4),
        "qk_norm": (draw(3, 5, 3, 2, 6), draw(6), draw(6), tangent(5, 3), tangent(5, 3), tangent(1, 5, 3, 2, 6), 1e-6),
    }[op]


@built
@each_op
def test_opcheck(op: str) -> None:
    for requires_grad in (False, True):
        torch.library.opcheck(getattr(torch.ops.cmt, op).default, arguments(op, requires_grad))


@built
@each_op
def test_opcheck_of_the_backward(op: str) -> None:
    x = arguments(op, False)
    y, *rest = getattr(torch.ops.cmt, op)(*x)
    saved = {
        "gelu": lambda: (x[0], x[1]),
        "modulated_norm": lambda: (x[0], x[2], rest[-1], x[0]),
        "gated_residual": lambda: (x[1], x[2], x[3]),
        "mp_cat": lambda: (20, *x[4:]),
        "mp_silu": lambda: (x[0], x[1], x[0]),
        "mp_sum": lambda: (y, *x[4:]),
        "pixel_norm": lambda: (y, rest[-1]),
        "qk_norm": lambda: (*x[:5], x[6]),
    }[op]()
    torch.library.opcheck(getattr(torch.ops.cmt, f"{op}_backward").default, (torch.randn_like(y), *saved))


@built
@each_op
@each_dtype
def test_value_has_the_same_bits_without_tangents(op: str, dtype: torch.dtype) -> None:
    for k in (0, 1, 3):
        inputs = big(op, dtype, k)
        dual, plain = implementation(op, "native")(**inputs), implementation(op, "native")(**without_tangents(inputs))
        assert torch.equal(dual.value, plain) and dual.tangent.shape[0] == k


@built
@each_op
@each_dtype
def test_threads_change_no_bit(op: str, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(op, big(op, dtype)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@built
@each_op
def test_chunks_of_a_modulation_need_no_copy(op: str) -> None:
    """shift, scale and gate come as slices of one wide linear; the bits are those of contiguous tensors."""
    wide = lambda x: torch.cat((x, x, x), dim=-1)[..., x.shape[-1] : 2 * x.shape[-1]] if x.ndim == 2 else x
    inputs = big(op, torch.float32)
    function = implementation(op, "native")
    sliced = outputs(op, function, map_tensors(wide, inputs) if op != "qk_norm" else inputs)
    assert all(torch.equal(a, b) for a, b in zip(sliced, outputs(op, function, inputs), strict=True))


ISA = """
from functools import partial
import torch
from cmt_kernels.accuracy import limits
from cmt_kernels.cases import cases_of, implementation, outputs, error, wide
for op in ("gated_residual", "gelu", "modulated_norm", "mp_cat", "mp_silu", "mp_sum", "pixel_norm", "qk_norm"):
    module = cases_of(op)
    for case in module.CASES:
        for dtype in module.DTYPES:
            plain = partial(outputs, op, implementation(op, "reference"))
            got = outputs(op, implementation(op, "native"), module.inputs(case, dtype))
            exact, most = plain(wide(module.inputs(case, dtype))), limits(plain, module.inputs(case, dtype))
            assert all(error(y, e) <= m for y, e, m in zip(got, exact, most)), (op, case.id)
x = torch.linspace(-12, 12, 4099)
print(torch.ops.cmt.gelu(x, None, None)[0].view(torch.int32).sum().item())
"""


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = str(Path(_native.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([*forked.python("torch"), "-c", code], env=environment, capture_output=True, text=True)


@built
def test_every_instruction_set_is_accurate_and_rounds_alike() -> None:
    sums = {}
    for isa in ("base", "v3", "v4"):
        done = in_a_process(ISA, CMT_ISA=isa)
        if "this processor does not have" in done.stderr or "this build has base" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        sums[isa] = done.stdout
    assert "base" in sums and len(set(sums.values())) == 1, sums


@built
def test_an_instruction_set_that_is_not_there_raises() -> None:
    done = in_a_process("import torch, cmt_kernels; cmt_kernels.gelu(torch.ones(3))", CMT_ISA="v9")
    assert done.returncode != 0 and "CMT_ISA=v9" in done.stderr


def test_without_a_library_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_native, "LIBRARY", tmp_path / "cmt_native.so")
    monkeypatch.setattr(_native, "RECORD", tmp_path / "build.json")
    try:
        for record, expected in (
            (None, "cmt_kernels._native.build"),
            ('{"line": "not built: no C++ compiler"}', "no C\\+\\+"),
        ):
            if record:
                _native.RECORD.write_text(record)
            _native._load.cache_clear()
            with use("gelu:native"), pytest.raises(RuntimeError, match=f"is not built.*{expected}"):
                backend("gelu")
        (tmp_path / "cmt_native.so").write_bytes(b"not a library")
        monkeypatch.setattr(_native, "stale", lambda: None)
        _native._load.cache_clear()
        assert "does not load" in _native.unavailable("cpu")
    finally:
        _native._load.cache_clear()


@built
@each_op
def test_dtypes(op: str) -> None:
    function = implementation(op, "native")
    exact = outputs(op, implementation(op, "reference"), big(op, torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(outputs(op, function, big(op, torch.float64)), exact, strict=True))
    with pytest.raises(TypeError, match=f"{op}.*float16"):
        function(**big(op, torch.float16))


@built
@each_op
def test_a_device_without_kernels_raises(op: str) -> None:
    assert "no kernels for xpu" in _native.unavailable("xpu")
    with pytest.raises(RuntimeError, match=f"{op}.*no kernels for meta"):
        implementation(op, "native")(**map_tensors(lambda x: x.to("meta"), big(op, torch.float32)))


@built
@pytest.mark.parametrize(
    "op, more", [*((op, {}) for op in OPS), *((op, {"also_x": True}) for op in ("modulated_norm", "mp_silu"))]
)
def test_second_derivative_raises(op: str, more: dict[str, bool]) -> None:
    inputs, leaves = leaves_of(op, big(op, torch.float32, None))
    y = implementation(op, "native")(**inputs, **more)
    y = y[0] + y[1] if more else y
    (g,) = torch.autograd.grad(y.square().sum(), leaves[-1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(g.sum(), leaves)


@built
def test_shapes_are_checked() -> None:
    x, v, native = torch.ones(2, 3, 8), torch.ones(2, 8), torch.ops.cmt
    for call, culprit in (
        (lambda: native.gelu(x, torch.ones(7), None), "bias"),
        (lambda: native.gelu(x, None, torch.ones(3, 3, 8)), "tangents"),
        (lambda: native.modulated_norm(x, v, v[:1], None, None, None, 1e-6), "scale"),
        (lambda: native.modulated_norm(x, v, v.bfloat16(), None, None, None, 1e-6), "scale"),
        (lambda: native.gated_residual(x, x[:, :2], v, None, None, None, None), "branch"),
        (lambda: native.mp_cat(x, x[:, :2], None, None, 1.0, 1.0), "b has the wrong shape"),
        (lambda: native.mp_silu(x, v[:1], None, None), "scale"),
        (lambda: native.mp_sum(x, x.bfloat16(), None, None, 1.0, 1.0, 1.0), "b has another dtype"),
        (lambda: native.pixel_norm(x[0], None, 1e-4), "x must be"),
        (lambda: native.qk_norm(torch.ones(2, 3, 3, 1, 8), v[0], None, None, None, None, 1e-6), "q_weight"),
    ):
        with pytest.raises(RuntimeError, match=culprit):
            call()


@built
def test_gelu_far_out_and_nan() -> None:
    x = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, float("nan")])
    y = implementation("gelu", "native")(x)
    assert torch.equal(y[3:7], x[3:7]) and y[:3].abs().max() < 1e-30 and y[7].isnan()
    half = implementation("gelu", "native")(x.bfloat16())
    assert half[7].isnan() and half[:7].isfinite().all()


@built
def test_no_memory_is_torch_s_own_error() -> None:
    """In forward and backward; a trainer that halves its batch catches this one."""
    huge = torch.ones(1, 1, 1).expand(2**20, 2**20, 2**10)  # 2^52 bytes, were it ever copied
    with pytest.raises(torch.OutOfMemoryError, match="out of memory: a tensor of 1048576 x 1048576 x 1024 numbers"):
        implementation("gelu", "native")(huge)
    x = torch.ones(2, 3, 8, requires_grad=True)
    y = implementation("gelu", "native")(x)
    failing = _native._told(lambda ctx, grad: torch.ops.cmt.gelu(huge, None, None))
    with pytest.raises(torch.OutOfMemoryError):
        failing(None, torch.ones_like(y))
    other = RuntimeError("gelu: bias has the wrong shape")
    assert _native.told(other) is other


@built
@each_op
def test_nothing_to_do(op: str) -> None:
    cut = lambda x: x[:, :, :0] if x.ndim == 4 else x[:, :0] if x.ndim > 4 or x.ndim == 3 else x
    inputs = map_tensors(cut, big(op, torch.float32))
    if op == "qk_norm":
        inputs |= {"cos": inputs["cos"][:0], "sin": inputs["sin"][:0]}
    *_, last = run(op, inputs)
    assert last.count_nonzero() == 0


@built
@each_op
@each_dtype
def test_where_the_compiler_fuses_better_it_does(op: str, dtype: torch.dtype) -> None:
    """A compiled call of a beaten op in bfloat16 is plain torch; every other holds the native op."""
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    with use(f"{op}:native"):
        call = torch.compile(lambda inputs: outputs(op, implementation(op, "native"), inputs), backend=keep)
        call(big(op, dtype))
    beaten = op in _native.FUSED and dtype == torch.bfloat16
    assert any(f"cmt.{op}" in target for target in seen) != beaten, seen


@built
def test_random_bits_are_the_reference_s_on_every_instruction_set() -> None:
    from cmt_kernels.random_bits import cases, native, reference

    for case in cases.CASES:
        assert torch.equal(native.random_bits(**cases.inputs(case)), reference.random_bits(**cases.inputs(case)))
    code = "import torch; from cmt_kernels.random_bits.native import random_bits as f; " + (
        "print(f((7, 1, 2, 3), torch.arange(5), 37).flatten().tolist())"
    )
    wanted = reference.random_bits((7, 1, 2, 3), torch.arange(5), 37).flatten().tolist()
    for isa in ("base", "v3", "v4"):
        done = in_a_process(code, CMT_ISA=isa)
        if "this processor does not have" not in done.stderr and "this build has base" not in done.stderr:
            assert done.stdout.strip() == str(wanted), isa + done.stderr


@built
def test_opcheck_of_random_bits() -> None:
    implementation("random_bits", "native")
    torch.library.opcheck(torch.ops.cmt.random_bits.default, (torch.arange(5), 3, 1, 2, 3, 4))


@built
def test_random_bits_refuse_what_is_no_row_of_ids() -> None:
    implementation("random_bits", "native")
    for sample in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="random_bits: sample must be"):
            torch.ops.cmt.random_bits(sample, 3, 1, 2, 3, 4)


@built
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 5)])
def test_a_weight_is_kept_as_the_parameter_that_it_is(shape: tuple[int, ...]) -> None:
    """ZeRO 3 releases a parameter after its forward and gathers it for its backward: no view may hold what it released."""
    weight, kept = torch.nn.Parameter(torch.randn(shape)), []
    with (
        use("unit_weight:native"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        y = unit_weight(weight, 0.3, True)
    assert [x is weight for x in kept if x.numel() >= weight.numel()] == [True]
    with use("unit_weight:reference"):
        (expected,) = torch.autograd.grad(unit_weight(weight, 0.3, True).square().sum(), weight)
    with use("unit_weight:native"):
        y = unit_weight(weight, 0.3, True)
    whole = weight.data.clone()
    weight.data = torch.empty(0)
    weight.data = whole
    y.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    with use("unit_weight:native"):
        (g,) = torch.autograd.grad(unit_weight(weight).square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(g.sum(), weight)
