"""The CUDA sources compile for every architecture, and no kernel spills: read from ptxas, without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.kernels import resources_cuda

pytestmark = pytest.mark.skipif(resources_cuda.missing() is not None, reason=str(resources_cuda.missing()))

SPILLS = """
__global__ void __launch_bounds__(1024, 2) greedy_kernel(const float* x, float* y) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = held[95 - i] * held[i];
}
"""


ASKED = [a for a in resources_cuda.ARCHITECTURES if os.environ.get("CMT_GATES", a) in (a, a.rstrip("a"))]


@pytest.mark.parametrize("arch", ASKED)
@pytest.mark.parametrize("source", resources_cuda.sources(), ids=lambda source: source.stem)
def test_no_kernel_spills(source: Path, arch: str) -> None:
    rows = resources_cuda.parse(source.stem, resources_cuda.compile_log(source, arch))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names), "kernels of one source share a name"
    assert not [row for row in rows if row["spill_bytes"] or row["local_bytes"]]
    assert all(row["arch"] == f"sm_{arch}" and 0 < row["registers"] <= 255 for row in rows)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    source = tmp_path / "greedy.cu"
    source.write_text(SPILLS)
    (row,) = resources_cuda.parse("greedy", resources_cuda.compile_log(source, "80"))
    assert row["spill_bytes"] > 0 and row["name"] == "greedy_kernel-fp32"


def test_a_log_that_is_not_understood_raises() -> None:
    with pytest.raises(ValueError, match="0 kernels, 0 understood"):
        resources_cuda.parse("gelu", "")
