"""`pytest bench --benchmark-only`: every op, backend and case of the bench, checked against float64 before it is timed."""

from __future__ import annotations

import os

import pytest
import torch
from cmt_kernels import OPS
from cmt_kernels.cases import backends_on, cases_of, implementation, mutated

from bench.kernels.ops import Truth, check, resize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCH = int(os.environ["BENCH_BATCH"]) if os.environ.get("BENCH_BATCH") else None
ROWS = [
    pytest.param(op, case, name, id=f"{op}-{case.id}-{name}")
    for op in OPS
    for case in (resize(c, BATCH) for c in cases_of(op).BENCH)
    for name in backends_on(op, DEVICE)
]


@pytest.mark.parametrize("op, case, name", ROWS)
def test_op(benchmark, op: str, case, name: str) -> None:
    dtype = DTYPE if DTYPE in cases_of(op).DTYPES else torch.float32
    function = implementation(op, name)
    _, wrong = check(Truth(op, case, dtype, DEVICE), function)
    assert not wrong, wrong
    inputs = cases_of(op).inputs(case, dtype, DEVICE)
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    benchmark.extra_info |= {"nbytes": cases_of(op).nbytes(case, dtype.itemsize), "mutates": list(mutated(op))}
    benchmark.group = f"{op} {case.id}"

    @benchmark
    def call() -> None:
        function(**inputs)
        wait()
