"""The dispatch: what is forced runs or raises, what is not forced is the first that can run."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cmt_kernels
import pytest
import torch
from cmt_kernels import OPS, _op, available, silu, table, use
from cmt_kernels._op import DEVICES, ORDER, backend
from cmt_kernels.cases import cases_of

from tests.fixtures import forked

X = torch.randn(2, 3)


def missing(op: str) -> str:
    return next(name for name in ORDER if name not in available(op))


def run_python(code: str, kernels: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"CMT_KERNELS": kernels, "PYTHONPATH": str(Path(_op.__file__).parents[1])}
    return subprocess.run([*forked.python("torch"), "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Give silu a native backend that returns zeros, with what is said about it."""
    if importlib.util.find_spec("cmt_kernels.silu.native"):
        pytest.skip("silu has a native backend")
    monkeypatch.setattr(_op, "_resolved", {device: {op: [] for op in OPS} for device in DEVICES})
    monkeypatch.setattr(
        sys.modules["cmt_kernels.silu"], "__path__", [*sys.modules["cmt_kernels.silu"].__path__, str(tmp_path)]
    )

    def planted(more: str = "") -> None:
        (tmp_path / "native.py").write_text(f"def silu(x):\n    return x * 0\n{more}\n")
        importlib.invalidate_caches()

    yield planted
    sys.modules.pop("cmt_kernels.silu.native", None)


@pytest.mark.parametrize("device", [None, *DEVICES])
def test_table_covers_every_op_with_what_can_run(device: str | None) -> None:
    assert set(table(device)) == set(OPS) and len(OPS) == 27
    for op, name in table(device).items():
        assert name == available(op, device)[0] and "reference" in available(op, device)


def test_the_device_is_that_of_the_tensor(plant: Callable) -> None:
    plant()
    assert table("cpu")["silu"] == table("cuda")["silu"] == "native" and "native" not in available("silu", "other")
    assert not silu(X).count_nonzero()
    elsewhere = silu(X.to("meta"))
    assert elsewhere.device.type == "meta" and _op._resolved["other"]["silu"][0] != "native"
    with use("silu:native"), pytest.raises(RuntimeError, match="native of silu: native kernels run on"):
        silu(X.to("meta"))


def test_a_backend_may_be_unavailable_on_one_device(plant: Callable) -> None:
    plant("def unavailable(device):\n    return 'built without CUDA' if device == 'cuda' else None")
    assert available("silu", "cpu")[0] == "native" and "native" not in available("silu", "cuda")
    with use("native"), pytest.raises(RuntimeError, match="native of silu: built without CUDA"):
        _op._resolve("silu", "cuda")


def test_a_reason_without_a_device(plant: Callable) -> None:
    plant("def unavailable():\n    return 'no compiler'")
    assert "native" not in available("silu", "cpu") + available("silu", "cuda")


def test_a_loser_is_avoided_but_can_be_asked_for(plant: Callable) -> None:
    plant("def loses(device):\n    return 'bench/results/cpu/a.json' if device == 'cpu' else None")
    assert available("silu", "cpu")[-2:] == ["reference", "native"] and available("silu", "cuda")[0] == "native"
    assert table("cpu")["silu"] != "native" == table("cuda")["silu"]
    assert silu(X).count_nonzero()
    with use("silu:native"):
        assert not silu(X).count_nonzero()


def test_the_choice_is_made_again_in_compiled_code(plant: Callable) -> None:
    plant()
    torch._dynamo.reset()
    compiled = torch.compile(silu, fullgraph=True, backend="eager")
    assert not compiled(X).count_nonzero()
    with use("reference"):
        assert torch.equal(compiled(X), silu(X)) and compiled(X).count_nonzero()
    assert not compiled(X).count_nonzero()


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET" in _op._misplaced("triton", "cpu") and _op._misplaced("triton", "cuda") is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _op._misplaced("triton", "cpu") is None and _op._misplaced("triton", "other")


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
    monkeypatch.setattr(_op, "_resolved", {device: {op: [] for op in OPS} for device in DEVICES})
    with use(missing("silu")):
        pass
    assert backend("silu")(X).shape == X.shape


def test_later_parts_win() -> None:
    with use("apex,silu:reference"):  # a backend of adamw_ema alone
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


def test_a_call_knows_its_case():
    """What a profiler takes FLOPs and bytes from: the op's own parameters, bound as the public function passes them."""
    for op in OPS:
        module, parameters = cases_of(op), inspect.signature(getattr(cmt_kernels, op)).parameters.values()
        assert list(inspect.signature(module.case_of).parameters) == [p.name for p in parameters], op
        for case in module.CASES:
            given = module.inputs(case)
            found = module.case_of(*(given.get(p.name, p.default) for p in parameters))
            assert module.flops(found) == module.flops(case), (op, case.id)
            assert module.nbytes(found, 4) == module.nbytes(case, 4), (op, case.id)


def test_through_wraps_calls_inside_and_leaves_nothing_behind():
    seen, x = [], torch.randn(3, 4)

    def wrap(op, function):
        return lambda *given: seen.append(op) or function(*given)

    want = cmt_kernels.silu(x)
    before = {device: {op: list(chosen) for op, chosen in ops.items()} for device, ops in _op._resolved.items()}
    with pytest.raises(KeyError), cmt_kernels.through(wrap, "cpu", ("silu", "gelu")):
        assert torch.equal(cmt_kernels.silu(x), want) and cmt_kernels.gelu(x[None]) is not None
        cmt_kernels.clip(x, 1.0)
        raise KeyError
    assert seen == ["silu", "gelu"] and torch.equal(cmt_kernels.silu(x), want) and seen == ["silu", "gelu"]
    after = _op._resolved["cpu"]
    assert all(after[op] == before["cpu"][op] for op in OPS if before["cpu"][op])
