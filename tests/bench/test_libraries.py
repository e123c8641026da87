"""Rows of other libraries in the bench of ops: they are found where they can be imported, and checked like ours."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from cmt_kernels import Dual
from cmt_kernels.cases import cases_of

from bench.kernels import libraries, ops


def plant(monkeypatch, name: str, **contents) -> None:
    """An importable module of this name, with its parents."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__spec__ = importlib_spec(module.__name__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def importlib_spec(name: str):
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None)


class LayerNorm:
    apply = staticmethod(lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps))


class Attention:
    """The two calls that are made of the library, by torch's own forward-mode AD."""

    fwd = staticmethod(lambda q, k, v: torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
    fwd_dual = fwd


def case_of(op: str, dual: bool):
    return next(c for c in cases_of(op).CASES if (0 < (c.k or 0) < c.B) == dual and (dual or c.k is None))


def test_only_what_can_be_imported_has_a_row() -> None:
    inputs = cases_of("modulated_norm").inputs(case_of("modulated_norm", False))
    assert libraries.of("modulated_norm", inputs, "cpu") == {} and libraries.of("gelu", {}, "cuda") == {}
    found = libraries.of("modulated_norm", inputs, "cuda")
    assert set(found) == {name for name, (package, _) in libraries.NORMS.items() if libraries._here(package)}


def test_a_library_is_checked_like_a_backend(monkeypatch) -> None:
    plant(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=LayerNorm)
    case = case_of("modulated_norm", False)
    function = libraries.of("modulated_norm", cases_of("modulated_norm").inputs(case), "cuda")["liger"]
    assert ops.check(ops.Truth("modulated_norm", case, torch.float32, "cpu"), function)[1] == ""
    monkeypatch.setattr(LayerNorm, "apply", staticmethod(lambda x, weight, bias, eps: x))
    assert "errs by" in ops.check(ops.Truth("modulated_norm", case, torch.float32, "cpu"), function)[1]


@pytest.mark.parametrize("k", [2, 8])
def test_the_dual_row_of_attention_gives_value_and_tangent(monkeypatch, k: int) -> None:
    plant(monkeypatch, "jvp_flash_attention.jvp_attention", JVPAttn=Attention)
    module = cases_of("attention")
    case = next(c for c in module.CASES if c.k == k and c.B == 8)
    inputs = module.inputs(case)
    function = libraries.of("attention", inputs, "cuda")["jvp-flash"]
    assert isinstance(function(**inputs), Dual)
    assert ops.check(ops.Truth("attention", case, torch.float32, "cpu"), function)[1] == ""
