"""The dispatch: what is forced runs or raises, what is not forced is the first that can run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cmt_kernels import OPS, _op, available, silu, table, use
from cmt_kernels._op import ORDER, backend

X = torch.randn(2, 3)


def missing(op: str) -> str:
    return next(name for name in ORDER if name not in available(op))


def run_python(code: str, kernels: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CMT_KERNELS": kernels, "PYTHONPATH": str(Path(_op.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_table_covers_every_op_with_what_can_run() -> None:
    assert set(table()) == set(OPS) and len(OPS) == 14
    for op, name in table().items():
        assert name == available(op)[0] and "reference" in available(op)


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_that_is_missing_raises(op: str) -> None:
    for spelling in (missing(op), f"{op}:{missing(op)}"):
        with use(spelling), pytest.raises(RuntimeError) as caught:
            backend(op)
        assert op in str(caught.value) and missing(op) in str(caught.value)


@pytest.mark.parametrize(
    "spelling, culprit",
    [
        ("attnetion:reference", "attnetion"),
        ("cuda", "cuda"),
        ("attention:cuda", "cuda"),
        ("reference,silu:fast", "fast"),
    ],
)
def test_unknown_names_raise(spelling: str, culprit: str) -> None:
    with use(spelling), pytest.raises(ValueError, match=culprit):
        silu(X)


def test_use_forces_one_op_or_all_and_restores() -> None:
    before = table()
    with use("reference"):
        assert set(table().values()) == {"reference"}
        with use("silu:reference"):
            assert table() == before | {"silu": "reference"}
        assert set(table().values()) == {"reference"}
    assert table() == before
    with pytest.raises(KeyError), use("reference"):
        raise KeyError
    assert table() == before


def test_use_leaves_nothing_behind_for_ops_that_had_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_resolved", {op: [] for op in OPS})
    with use(missing("silu")):
        pass
    assert backend("silu")(X).shape == X.shape


def test_later_parts_win() -> None:
    with use(f"{missing('silu')},silu:reference"):
        assert backend("silu")(X).shape == X.shape
        with pytest.raises(RuntimeError, match="gelu"):
            backend("gelu")


def test_environment_forces_a_backend() -> None:
    result = run_python("import cmt_kernels; print(cmt_kernels.table())", "adamw_ema:reference, gelu:reference")
    assert result.returncode == 0, result.stderr
    assert "'adamw_ema': 'reference'" in result.stdout


def test_environment_with_a_missing_backend_raises() -> None:
    result = run_python("import cmt_kernels; cmt_kernels.table()", f"silu:{missing('silu')}")
    assert result.returncode != 0 and f"RuntimeError: CMT_KERNELS asks for {missing('silu')} of silu" in result.stderr
