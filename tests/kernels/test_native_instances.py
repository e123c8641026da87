"""Every instance of the native kernels against the reference: each width of a row and of a head that they are compiled for,
whole and not, more than one tile of columns, tangents on some rows. On a GPU they are the CUDA kernels; test_emulation.py runs
these on the CUDA sources without one.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import Any

import pytest
import torch
from cmt_kernels import _native
from cmt_kernels.cases import cases_of, implementation, map_tensors, outputs

from tests.kernels.test_ops import LAYOUTS, assert_accurate, gradients, gradients_of_reference, most, reference, right

WIDTHS = (
    1,
    13,
    256,
    264,
    512,
    520,
    760,
    1000,
    1024,
    1151,
    1280,
)  # two to five vectors of 256; 1, 13 and 1151 are not whole
HEADS = (2, 34, 64, 66, 96, 100, 128, 136, 256)  # two, three, four and eight pairs a lane
ODD_HEADS = (1, 7, 63, 95, 127, 255)


def tokens(width: int) -> int:
    """Rows of an image: enough that the largest error of plain torch, which is the yardstick, is not luck."""
    return min(max(3, 1500 // width), 100)


def instances() -> list[tuple[str, Any]]:
    """(op, case): small, and together every kernel that is compiled."""
    norm, gate, gelu, qk = (cases_of(op) for op in ("modulated_norm", "gated_residual", "gelu", "qk_norm"))
    found = [
        ("modulated_norm", norm.Case(2, tokens(D), D, k, s)) for D in WIDTHS for k in (None, 1) for s in (False, True)
    ]
    found += [
        ("gated_residual", gate.Case(2, tokens(D), D, bias, 1, s))
        for D in (13, 264)
        for bias in (False, True)
        for s in (False, True)
    ]
    found += [("gelu", gelu.Case(2, tokens(D), D, bias, 1)) for D in (13, 264) for bias in (False, True)]
    # sums of more partials, or images, than a column has threads
    found += [("gelu", gelu.Case(4, 300, 13, True, 1)), ("gated_residual", gate.Case(20, 3, 40, True, 1))]
    cat, silu, total, pixel = (cases_of(op) for op in ("mp_cat", "mp_silu", "mp_sum", "pixel_norm"))
    found += [("mp_cat", cat.Case(3, 17, D, E, k)) for D, E in ((13, 300), (264, 8)) for k in (None, 1)]
    found += [("mp_silu", silu.Case(2, tokens(D), D, scaled, 1)) for D in (13, 264) for scaled in (False, True)]
    found += [("mp_silu", silu.Case(2, 1200, 13, True, 1))]  # more partial sums than a column has threads
    found += [
        ("mp_sum", total.Case(3, shape, 0.3, limit, 1)) for shape in ((7, 151), (8, 128)) for limit in (None, 1.5)
    ]
    found += [("pixel_norm", pixel.Case(5, (D, tokens(D)), 1, k)) for D in (13, 64, 72, 264, 1000) for k in (None, 2)]
    unit = cases_of("unit_weight")
    found += [
        ("unit_weight", unit.Case(3, 600, n, last)) for n in (1, 3) for last in (False, True)
    ]  # several tiles a row
    found += [("qk_norm", qk.Case(2, tokens(9 * d), 3, d, True, True, k)) for d in HEADS for k in (None, 1)]
    found += [("qk_norm", qk.Case(2, tokens(9 * d), 3, d, True, False, 1)) for d in ODD_HEADS]
    return found


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAID_OUT = ("contiguous", "misaligned")
emulated = os.environ.get("CMT_ISA") == "emu"
pytestmark = [
    pytest.mark.usefixtures("nan_poison"),
    pytest.mark.skipif(_native.unavailable("cpu") is not None, reason=str(_native.unavailable("cpu"))),
]
each_device = pytest.mark.parametrize(
    "device", [pytest.param(d, marks=[pytest.mark.gpu] * (d == "cuda")) for d in DEVICES]
)


@each_device
@pytest.mark.parametrize("op, case", [pytest.param(*i, id=f"{i[0]}-native-{i[1].id}") for i in instances()])
def test_instance(op: str, case: Any, device: str) -> None:
    function = implementation(op, "native")
    for dtype in cases_of(op).DTYPES:
        inputs = cases_of(op).inputs(case, dtype, device)
        exact, plain = right(op, case, dtype, device, reference)
        exact_grads, plain_grads = right(op, case, dtype, device, gradients_of_reference)
        for layout in LAID_OUT:
            laid_out = map_tensors(LAYOUTS[layout], inputs)
            assert_accurate(outputs(op, function, laid_out), plain, exact, most(op, case, dtype, device, reference))
            ours = gradients(op, partial(outputs, op, function), laid_out, layout)
            assert_accurate(ours, plain_grads, exact_grads, most(op, case, dtype, device, gradients_of_reference))


def unit_weight_in_bf16(inside: bool, device: str = "cpu") -> list[torch.Tensor]:
    """A weight as autocast reads it, channels-last, and its gradient by one in bf16; not `inside`: cast outside of the op."""
    module = cases_of("unit_weight")
    inputs = module.inputs(module.Case(5, 300, 3, True), torch.float32, device)
    w = inputs["weight"].requires_grad_()
    dtype = torch.bfloat16 if inside else None
    y = implementation("unit_weight", "native")(**inputs, dtype=dtype)
    direction = torch.cos(torch.arange(y.numel(), device=device)).view(y.shape).bfloat16()
    (gradient,) = torch.autograd.grad(y, w, direction.to(y.dtype))
    return [y.detach().bfloat16(), gradient]


@each_device
def test_unit_weight_in_bf16_native(device: str) -> None:
    """The cast inside changes no bit."""
    ours, theirs = unit_weight_in_bf16(True, device), unit_weight_in_bf16(False, device)
    assert all(map(torch.equal, ours, theirs)) and ours[0].is_contiguous(memory_format=torch.channels_last)


@each_device
def test_what_the_cuda_kernels_do_not_take_raises(device: str) -> None:
    if device == "cpu" and not emulated:
        pytest.skip("the CPU kernels take every width")
    for op, case, limit in (
        ("modulated_norm", cases_of("modulated_norm").Case(1, 1, 1281), "at most 1280"),
        ("qk_norm", cases_of("qk_norm").Case(1, 1, 1, 258), "up to 256"),
    ):
        with pytest.raises(RuntimeError, match=limit):
            implementation(op, "native")(**cases_of(op).inputs(case, torch.float32, device))


def digest() -> str:
    """Of every bit that the native ops give for the instances and, of random_bits, for its cases, on the CPU."""
    total = hashlib.sha256()
    bits = cases_of("random_bits")
    for case in bits.CASES:
        for y in outputs("random_bits", implementation("random_bits", "native"), bits.inputs(case)):
            total.update(y.numpy().tobytes())
    for y in unit_weight_in_bf16(True):
        total.update(y.float().numpy().tobytes())
    for op, case in instances():
        call = partial(outputs, op, implementation(op, "native"))
        for dtype in cases_of(op).DTYPES:
            inputs = cases_of(op).inputs(case, dtype)
            for y in [*call(inputs), *gradients(op, call, inputs)]:
                total.update(y.detach().float().numpy().tobytes())
    return total.hexdigest()
