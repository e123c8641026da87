"""Which library computes a plain attention: what is measured, remembered, refused. The clock and the card are made up."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cmt_kernels.attention import primal, small
from cmt_kernels.attention import triton as primal_op
from cmt_kernels.attention.reference import attention as reference
from torch import Tensor

CPU = torch.device("cpu")
KEY = (8, 2, 16, torch.float32, CPU)


TORCH_SAYS = (  # seen on an H100 with torch 2.11, for a float32 call
    "Memory efficient kernel not used because: (Triggered internally at sdp_utils.cpp:986.)",
    "Memory Efficient attention has been runtime disabled. (Triggered internally at sdp_utils_cpp.h:552.)",
    "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:988.)",
    "Expected query, key and value to all be of dtype: {Half, BFloat16}. Got Query dtype: float",
    "cuDNN attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:706.)",
)


def broken(qkv: Tensor) -> Tensor:
    for line in TORCH_SAYS:
        warnings.warn(line, UserWarning, stacklevel=1)
    raise RuntimeError("no kernel for this card")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Four made-up libraries, one of them wrong and one absent, and an empty cache. Returns the names that were run."""
    called: list[str] = []

    def named(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda qkv: called.append(name) or function(qkv)

    made_up = {"slow": reference, "fast": reference, "wrong": lambda x: reference(1.01 * x), "absent": broken}
    monkeypatch.setattr(primal, "LIBRARIES", {name: named(name, f) for name, f in made_up.items()})
    monkeypatch.setattr(primal, "TOKENS", 64)
    monkeypatch.setattr(primal, "_remembered", {})
    monkeypatch.setattr(primal, "machine", lambda device: "a card")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return called


@pytest.fixture
def clock(libraries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(call: Callable[[], object]) -> float:
        call()
        return {"slow": 2.0, "fast": 1.0}[libraries[-1]]

    monkeypatch.setattr(primal, "measure", lambda *key, true=primal.measure: true(*key, milliseconds))


def test_fastest_accurate_library_comes_first(clock: None) -> None:
    names, report = primal.measure(*KEY)
    assert names == ["fast", "slow"] and report["fast"] == 1.0 and report["slow"] == 2.0
    assert report["wrong"].startswith("errs by") and "no kernel for this card" in report["absent"]


def test_a_library_that_cannot_run_does_not_fill_the_log_and_what_we_say_ourselves_stays(
    clock: None, libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ours(qkv: Tensor) -> Tensor:
        warnings.warn("attention forward T8: tiles 1 used", stacklevel=1)
        return reference(qkv)

    monkeypatch.setitem(primal.LIBRARIES, "ours", ours)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        primal.measure(*KEY)
    assert {str(w.message) for w in seen} == {"attention forward T8: tiles 1 used"}


def test_measured_once_and_kept_for_the_next_process(
    clock: None, libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert primal.order(*KEY) == ["fast", "slow"] and primal.table() == {"T8 d16 float32 cuda:None": "fast"}
    before = len(libraries)
    assert primal.order(*KEY) == ["fast", "slow"] and len(libraries) == before
    primal._remembered.clear()  # as in a new process
    assert primal.order(*KEY) == ["fast", "slow"] and len(libraries) == before
    assert json.loads(primal.cache_file().read_text())["a card"]["T8-d16-float32"]["order"] == ["fast", "slow"]
    primal._remembered.clear()
    monkeypatch.setattr(primal, "machine", lambda device: "another card")
    assert primal.order(*KEY) == ["fast", "slow"] and len(libraries) > before
    assert set(json.loads(primal.cache_file().read_text())) == {"a card", "another card"}


def test_unreadable_cache_is_measured_again(clock: None) -> None:
    primal.cache_file().parent.mkdir(parents=True)
    primal.cache_file().write_text("{")
    assert primal.order(*KEY) == ["fast", "slow"]


def test_measured_op_calls_the_first_library(clock: None, libraries: list[str]) -> None:
    qkv = torch.randn(2, 8, 3, 2, 16)
    with torch.no_grad():
        y = torch.ops.cmt.attention_measured(qkv)
    assert libraries[-1] == "fast" and torch.equal(y, reference(qkv))
    torch.library.opcheck(
        torch.ops.cmt.attention_measured.default, (qkv,), test_utils=("test_schema", "test_faketensor")
    )


def test_forced_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMT_ATTENTION", raising=False)
    assert primal.forced() is None
    monkeypatch.setenv("CMT_ATTENTION", "sdpa_flash")
    assert primal.forced() == "sdpa_flash"
    monkeypatch.setenv("CMT_ATTENTION", "flash")
    with pytest.raises(ValueError, match="sdpa_flash"):
        primal.forced()


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("name, module", [("flash_attn_3", "flash_attn_interface"), ("sdpa_flash", "")])
def test_libraries_read_packed_qkv(monkeypatch: pytest.MonkeyPatch, name: str, module: str, as_tuple: bool) -> None:
    """Torch's own flash on a CPU, and a library with the signature of flash-attn: (B, T, H, d) in and out."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, None]:
        y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (y, None) if as_tuple else y

    if module:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    qkv = torch.randn(2, 7, 3, 2, 16)
    torch.testing.assert_close(primal.LIBRARIES[name](qkv), reference(qkv))


class WrongGradient(torch.autograd.Function):
    """Attention whose value is right and whose gradient is a hundredth too large."""

    @staticmethod
    def forward(ctx, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        return reference(qkv)

    @staticmethod
    def backward(ctx, do: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        with torch.enable_grad():
            x = qkv.detach().requires_grad_()
            return 1.01 * torch.autograd.grad(reference(x), x, do)[0]


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """trained(ms of ours, ms of flash): flash is right, cuDNN's gradient is wrong, efficient adds in any order."""
    order, called = torch.Generator().manual_seed(0), []

    def scattered(qkv: Tensor) -> Tensor:
        return reference(qkv) + 1e-7 * torch.rand((), generator=order)

    functions = (reference, reference, WrongGradient.apply, scattered)
    named = {n: lambda x, n=n, f=f: called.append(n) or f(x) for n, f in zip(small.TRAINED, functions)}
    monkeypatch.setattr(primal, "LIBRARIES", named | {"flash_attn_2": lambda x: pytest.fail("not every torch has it")})
    monkeypatch.setattr(primal, "TOKENS", 64)
    monkeypatch.setattr(primal, "machine", lambda device: "a card")
    monkeypatch.setattr(primal.proof, "refusal", lambda few: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def trained(**ms: float) -> str:
        clock = lambda call: call() and ms[called[-1]]
        return primal.trained(8, 16, torch.float32, CPU, clock)

    return trained


def test_training_takes_the_fastest_library_that_is_right_and_repeats_its_bits(training: Callable[..., str]) -> None:
    assert training(triton=2.0, sdpa_flash=1.0) == "sdpa_flash"
    report = json.loads(primal.cache_file().read_text())["a card"]["T8-d16-float32-trained"]["report"]
    assert report["sdpa_cudnn"].startswith("errs by") and report["sdpa_efficient"] == "does not repeat its bits"
    assert training(triton=1.0, sdpa_flash=9.0) == "sdpa_flash"  # remembered


def test_training_keeps_our_kernel_where_it_is_about_as_fast(training: Callable[..., str]) -> None:
    assert training(triton=1.0, sdpa_flash=0.97) == "triton"


def test_a_stage_s_choice_is_what_a_plain_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, called = torch.randn(2, 8, 3, 2, 16), []
    libraries = {n: lambda x, n=n: called.append(n) or reference(x) for n in small.TRAINED}
    monkeypatch.setattr(primal, "LIBRARIES", libraries)
    monkeypatch.delenv("CMT_ATTENTION", raising=False)
    op = primal_op.attention
    with small.using({small.label(8, 16, torch.float32): "sdpa_cudnn"}):
        op(qkv)
        op(qkv[:, :4])
    op(qkv)
    assert called == ["sdpa_cudnn", "triton", "triton"]
