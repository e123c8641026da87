"""Torch's own attention is given only what its fused kernels can read, wherever a user's tensor begins in memory.

On a GPU such a read ends the process's use of the device, so here the CPU stands for it: torch's attention is replaced by
one that refuses what the GPU's could not read, forward and backward.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cmt_kernels import Dual
from cmt_kernels.attention import primal, reference
from torch import Tensor
from torch.nn.attention import SDPBackend

SHAPE = (2, 5, 3, 2, 8)  # a token's q, k and v are multiples of 16 bytes in both dtypes: q, k and v begin as qkv does


def refuse(*xs: Tensor) -> None:
    if any(x.data_ptr() % reference.BOUNDARY for x in xs):
        raise RuntimeError("misaligned address")


class Picky(torch.autograd.Function):
    """scaled_dot_product_attention that refuses a tensor which does not begin at 16 bytes."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        refuse(q, k, v)
        ctx.save_for_backward(q, k, v)
        # laid out as torch's flash attention lays it out: the gradient of a transposed result reaches backward as a view
        return TRUE(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, ...]:
        refuse(do)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(TRUE(*leaves), leaves, do)


TRUE = F.scaled_dot_product_attention


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FUSED", ("cpu",))
    monkeypatch.setattr(F, "scaled_dot_product_attention", Picky.apply)


def misaligned(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", ["plain", "dual", "primal"])
def test_a_tensor_that_begins_anywhere_is_computed(picky: None, dtype: torch.dtype, how: str) -> None:
    x, direction = torch.randn(SHAPE, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    call = {
        "plain": reference.attention,
        "dual": lambda x: reference.attention(Dual(x, misaligned(x[:1].detach()))).value,
        "primal": lambda x: primal._sdpa(SDPBackend.MATH, x),
    }[how]
    results = []
    for lay in (lambda x: x, misaligned):
        leaf = lay(x).requires_grad_()
        y = call(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, lay(direction))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_begins_at_a_boundary_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FUSED", ("cpu",))
    x = torch.randn(SHAPE)
    odd = misaligned(x)
    assert reference.aligned(x) is x and reference.aligned(odd) is not odd and torch.equal(reference.aligned(odd), x)
    monkeypatch.undo()
    assert reference.aligned(odd) is odd  # a CPU's attention reads from anywhere


def test_flash_attn_is_given_what_it_can_read(picky: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(*qkv: Tensor) -> Tensor:
        refuse(*qkv)
        return qkv[0]

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    assert primal._flash("flash_attn", misaligned(torch.randn(SHAPE))).shape == (2, 5, 16)
