"""The Triton kernels of the solver, the path, the losses and the optimizer, in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when it is imported, so this file runs itself in a process of its own: without the
variable it is one test that does so, with it the tests below. The rule of accuracy is that of test_ops.py. The lower
precision here is float16: the interpreter truncates where a GPU rounds to bfloat16.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import cmt_kernels
import pytest
import torch
from cmt_kernels import Dual, philox, use
from cmt_kernels.accuracy import limits
from cmt_kernels.cases import allowed, cases_of, implementation, map_tensors, mutated, outputs, wide
from cmt_kernels.philox import Key
from torch import Tensor

from tests.fixtures import forked
from tests.kernels import interpreter
from tests.kernels.formulas import by_hand
from tests.kernels.test_ops import LAYOUTS, assert_accurate, gradients, gradients_of_reference, reference, with_leaves

SMALL = ("solver_step", "path_point", "meanflow_loss", "consistency_loss", "adamw_ema")
LOSSES = ("meanflow_loss", "consistency_loss")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.lighten()

here = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter in a process of its own")
pytestmark = pytest.mark.usefixtures("nan_poison")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    command = [*forked.python("interpreter"), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert passed > len(CASES) and "1 skipped" in result.stdout, result.stdout


CASES = [pytest.param(op, case, id=f"{op}-{case.id}") for op in SMALL for case in cases_of(op).CASES]


def dtypes(op: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if op == "adamw_ema" else (torch.float32, torch.float16)


def triton(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    return outputs(op, implementation(op, "triton"), inputs)


def gradients_of_triton(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    return gradients(op, partial(triton, op), inputs)


def exactly(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    """The formula in float64 on the same numbers, noise included."""
    return (by_hand if op == "path_point" else reference)(op, wide(inputs))


@here
@pytest.mark.parametrize("op, case", CASES)
def test_forward(op: str, case: Any) -> None:
    module = cases_of(op)
    for dtype in dtypes(op):
        exact, plain = exactly(op, module.inputs(case, dtype)), reference(op, module.inputs(case, dtype))
        most = limits(partial(reference, op), module.inputs(case, dtype), exact=partial(exactly, op))
        for layout in ("contiguous", "misaligned" if mutated(op) else "strided"):
            assert_accurate(triton(op, map_tensors(LAYOUTS[layout], module.inputs(case, dtype))), plain, exact, most)


@here
@pytest.mark.parametrize("op, case", [p for p in CASES if p.values[0] in LOSSES])
def test_gradient(op: str, case: Any) -> None:
    module = cases_of(op)
    for dtype in dtypes(op):
        inputs = module.inputs(case, dtype)
        exact, plain = (gradients_of_reference(op, x) for x in (wide(inputs), inputs))
        most = limits(partial(gradients_of_reference, op), inputs)
        for layout in ("contiguous", "strided"):
            laid_out = map_tensors(LAYOUTS[layout], inputs)
            assert_accurate(gradients(op, partial(triton, op), laid_out, layout), plain, exact, most)


@here
@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("n", [4096, 4097, 3 * 4096 + 5])
def test_images_of_several_chunks(op: str, n: int) -> None:
    module = cases_of(op)
    case = module.Case(3, (n,), **({"k": 2} if op == "meanflow_loss" else {}))
    inputs = module.inputs(case)
    for plain, call in ((reference, triton), (gradients_of_reference, gradients_of_triton)):
        most = limits(partial(plain, op), inputs)
        assert_accurate(call(op, inputs), plain(op, inputs), plain(op, wide(inputs)), most)


@here
@pytest.mark.parametrize("op", [op for op in SMALL if op not in ("adamw_ema", "path_point")])
def test_float64_is_float64(op: str) -> None:
    for case in cases_of(op).CASES:
        inputs = cases_of(op).inputs(case, torch.float64)
        torch.testing.assert_close(triton(op, inputs), by_hand(op, inputs), rtol=1e-12, atol=1e-12)


@here
@pytest.mark.parametrize("op", LOSSES)
def test_nothing_is_written_for_a_gradient_nobody_wants(op: str) -> None:
    inputs, _ = with_leaves(op, cases_of(op).inputs(cases_of(op).CASES[0]))
    with_graph = triton(op, inputs)
    assert with_graph[0].requires_grad and not any(y.requires_grad for y in with_graph[1:])
    with torch.no_grad():
        without = triton(op, inputs)
    assert not without[0].requires_grad and torch.equal(with_graph[0], without[0])


@here
def test_rows_without_a_tangent_do_not_notice_the_others() -> None:
    case = next(case for case in cases_of("meanflow_loss").CASES if case.k and case.k < case.B)
    inputs = cases_of("meanflow_loss").inputs(case)
    loss, squared = triton("meanflow_loss", inputs)
    plain = triton("meanflow_loss", inputs | {"u": inputs["u"].value})
    assert torch.equal(loss[case.k :], plain[0][case.k :]) and torch.equal(squared[case.k :], plain[1][case.k :])
    assert not torch.equal(loss[: case.k], plain[0][: case.k])


@here
@pytest.mark.parametrize("op", LOSSES)
def test_a_second_derivative_is_refused(op: str) -> None:
    inputs, leaves = with_leaves(op, cases_of(op).inputs(cases_of(op).CASES[0]))
    (gradient,) = torch.autograd.grad(triton(op, inputs)[0].sum(), leaves, create_graph=True)
    with pytest.raises((AssertionError, RuntimeError), match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), leaves)


@here
@pytest.mark.parametrize("key", [Key(0, 0, 0, 0), Key(2**40 + 3, 1, 50_000, 2), Key(2**32 - 1, 2**31, 2**31 - 1, 11)])
def test_the_integers_are_the_reference_s_bit_for_bit(key: Key) -> None:
    from cmt_kernels.path_point.triton import integers

    sample = torch.tensor([0, 1, 1_000_003, 2**31, 2**32 - 1, 2**40 + 7])
    for blocks in (1, 257):
        assert torch.equal(integers(key, sample, blocks), philox.integers(key, sample, blocks))


@here
def test_noise_is_the_reference_s_to_the_last_digits() -> None:
    """Same integers, another libm: x_t at alpha 0, sigma 1 is the noise; the error against float64 is no larger."""
    from tests.kernels.formulas import normal

    key, sample, zero = Key(5, 1, 7, 0), torch.arange(9), torch.zeros(9)
    noise, v = implementation("path_point", "triton")(torch.zeros(9, 501), zero, zero + 1, zero, zero + 2, key, sample)
    plain, exact = philox.normal(key, sample, (501,)), normal(key, sample.tolist(), 501, torch.float64)
    assert_accurate([noise], [plain], [exact], [allowed(plain, exact)])
    assert torch.equal(v, 2 * noise) and noise.std().sub(1).abs() < 0.05


@here
def test_noise_depends_on_the_sample_and_not_on_the_batch() -> None:
    case = cases_of("path_point").CASES[0]
    inputs = cases_of("path_point").inputs(case)
    whole = triton("path_point", inputs)
    part = triton("path_point", map_tensors(lambda x: x[2:4], inputs))
    assert all(torch.equal(a[2:4], b) for a, b in zip(whole, part))


@here
@pytest.mark.parametrize("P, tracks", [(5, 5), (4095, 4), (4097, 2), (70_001, 1)])
def test_optimizer_of_other_sizes_and_more_tracks(P: int, tracks: int) -> None:
    module = cases_of("adamw_ema")
    betas = {"ema_betas": [0.9, 0.99, 0.999, 0.9999, 0.5][:tracks]}

    def fresh() -> dict[str, Any]:
        inputs = module.inputs(module.Case(P, 0, 3, 1.0, 0.01))
        return inputs | betas | {"emas": [inputs["p"] * (1 + i) for i in range(tracks)]}

    plain = partial(reference, "adamw_ema")
    assert_accurate(triton("adamw_ema", fresh()), plain(fresh()), plain(wide(fresh())), limits(plain, fresh()))


@here
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_changes_nothing() -> None:
    inputs = cases_of("adamw_ema").inputs(cases_of("adamw_ema").CASES[2])
    inputs["g"][3] = float("nan")
    held = lambda: [inputs["p"], inputs["g"], inputs["m"], inputs["v"], *inputs["emas"]]
    before = [x.clone() for x in held()]
    assert implementation("adamw_ema", "triton")(**inputs).isnan()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, held(), strict=True))
    with pytest.raises(ValueError, match="float32"):
        implementation("adamw_ema", "triton")(**wide(inputs))


@here
@pytest.mark.parametrize("op", SMALL)
def test_compiled_in_one_graph(op: str) -> None:
    module = cases_of(op)
    case = next((case for case in module.CASES if 0 < (getattr(case, "k", None) or 0) < case.B), module.CASES[-1])

    def run(compiled: bool) -> tuple[list[Tensor], list[Tensor]]:
        inputs, leaves = with_leaves(op, module.inputs(case))
        function = getattr(cmt_kernels, op)
        ys = outputs(op, torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function, inputs)
        return ys, list(torch.autograd.grad(ys[0].sum(), leaves)) if leaves else []

    torch._dynamo.reset()
    with use(f"{op}:triton"):
        for ours, theirs in zip(run(True), run(False)):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@here
@pytest.mark.parametrize("op", SMALL)
def test_opcheck(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake and autograd registration of the launch itself. AOT dispatch asks for a gradient of every output,
    so of second derivatives, which the losses refuse: there it is checked without a graph."""
    module = importlib.import_module(f"cmt_kernels.{op}.triton")
    launch, calls = module._launch, []
    monkeypatch.setattr(module, "_launch", lambda *args: calls.append(args) or launch(*args))
    inputs, _ = with_leaves(op, cases_of(op).inputs(cases_of(op).CASES[2]))
    getattr(module, op)(**inputs)
    if op in LOSSES:
        torch.library.opcheck(
            launch, calls[0], test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
    torch.library.opcheck(launch, map_tensors(torch.Tensor.detach, calls[0]))


@here
def test_a_step_writes_into_its_slot_of_the_trajectory() -> None:
    module = cases_of("solver_step")
    for case in module.CASES:
        inputs = module.inputs(case)
        trajectory = torch.empty(3, *inputs["x"].shape)
        trajectory[0] = inputs["x"]
        y, *others = implementation("solver_step", "triton")(**inputs | {"x": trajectory[0], "y": trajectory[1]})
        fresh, *wanted = implementation("solver_step", "triton")(**inputs)
        assert y.data_ptr() == trajectory[1].data_ptr() and torch.equal(trajectory[1], fresh)
        assert torch.equal(trajectory[0], inputs["x"]) and trajectory[2].isnan().all()
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(others, wanted))


@here
def test_unknown_distance_and_ragged_shapes_raise() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="manhattan"):
        implementation("consistency_loss", "triton")(x, x, "manhattan")
    with pytest.raises(AssertionError):
        implementation("consistency_loss", "triton")(x, x[:1])
    with pytest.raises(AssertionError):
        implementation("solver_step", "triton")(x, x[:1], None, None, torch.ones(8))
    with pytest.raises(AssertionError):
        implementation("meanflow_loss", "triton")(Dual(x, x), x[:1], x[:, 0], x[:, 0])
