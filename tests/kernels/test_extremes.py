"""Extreme numbers through every op on every backend: finite exactly where the truth is, and near it (extremes.py).

Here run the backends of this machine; csrc/cuda, emulated, and the Triton kernels, interpreted, in a process each.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cmt_kernels import OPS, Dual, _native
from cmt_kernels._native import build
from cmt_kernels.cases import backends_on, implementation

from tests.fixtures import forked
from tests.kernels import emulated
from tests.kernels.extreme_limits import LIMITS
from tests.kernels.extremes import NO_FLOATS, PLANS, limit_of, rows

BACKENDS = [
    pytest.param(op, name, device, id=f"{op}-{name}-{device}", marks=[pytest.mark.gpu] * (device == "cuda"))
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op in PLANS
    for name in backends_on(op, device)
]
INTERPRETED = ("adamw_ema", "attention", "consistency_loss", "gated_residual", "gelu", "meanflow_loss", "modulated_norm",
               "mp_silu", "mp_sum", "path_point", "pixel_norm", "qk_norm", "solver_step")  # fmt: skip
pytestmark = pytest.mark.usefixtures("nan_poison")


def test_every_op_is_planted() -> None:
    assert set(PLANS) | set(NO_FLOATS) == set(OPS)


@pytest.mark.parametrize("op, name, device", BACKENDS)
def test_finite_where_the_truth_is_and_near_it(op: str, name: str, device: str) -> None:
    found = list(rows(op, name, device))
    assert [row for row in found if row.differs and limit_of(row) is None] == []
    if device == "cpu":  # a limit that plain torch no longer has is taken out
        met = {limit_of(row) for row in found}
        assert all(
            limit in met
            for limit in LIMITS
            if limit.op == op and name in limit.backends and device in limit.devices and limit.everywhere
        )


def table_of(command: list[str], level: str = "torch", **environment: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | forked.ENVIRONMENTS.get(level, {}) | environment
    root = Path(__file__).parents[2]
    done = subprocess.run([*forked.python(level), *command], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(bool(os.environ.get("CMT_NATIVE_LIBRARY")), reason="this process runs another library already")
def test_cuda_sources_emulated() -> None:
    emulated.library()
    said = table_of(["-m", "tests.kernels.extremes", "native"], **emulated.environment())
    assert "0 differences in finiteness, 0 errors" in said and all(f"{op} native" in said for op in NATIVE), said


NATIVE = ("gated_residual", "gelu", "modulated_norm", "mp_cat", "mp_silu", "mp_sum", "pixel_norm", "qk_norm",
          "unit_weight")  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_interpreted() -> None:
    said = table_of(
        ["-m", "tests.kernels.extremes", "few", "triton", *INTERPRETED],
        "interpreter",
        **forked.ENVIRONMENTS["interpreter"],
    )
    assert "0 differences in finiteness, 0 errors" in said, said
    assert all(f"\n{op} triton" in said for op in INTERPRETED), said


@pytest.mark.skipif(_native.unavailable("cpu") is not None, reason=str(_native.unavailable("cpu")))
def test_slope_of_gelu_far_out() -> None:
    """Right to 2e-7 at every exponent of fp32: a clamp inside the exponential would make it 4.5 at 1e13."""
    x = torch.cat([sign * 2.0 ** torch.arange(-149.0, 128.0) for sign in (1, -1)])[None]
    got = implementation("gelu", "native")(Dual(x, torch.ones_like(x)))
    v = x.double()
    p = (2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)
    s, t = torch.sigmoid(2 * p), torch.sigmoid(-2 * p)
    slope = s + v * s * t * (8 / torch.pi) ** 0.5 * (1 + 0.134145 * v * v)
    assert (got.tangent - slope).abs().max() < 2e-7
    assert ((got.value - v * s).abs() / v.abs().clamp(min=1)).max() < 2e-7
