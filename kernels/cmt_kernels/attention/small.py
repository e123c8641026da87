"""What a stage chose for its attentions (`using`), and the choice on a CPU: softmax(q k^T) v as it stands, or SDPA.

On a GPU `primal.trained` chooses among libraries, for stages without tangents. What follows is of a CPU and few tokens.

Torch's fused attention saves the T x T matrices, which for T <= 64 would stay in cache anyway, and its backward in bf16 is
slow on some processors: 11 times fp32's on one with AVX512-BF16, where the plain formula halved a step. `choose` times both,
forward and backward, for a (T, head dim, dtype); `using` makes choices hold for what runs inside. Outside of it, and for
a shape without a choice, it is SDPA: a choice moves last bits, so it is a stage's, kept in its checkpoints, and never
a process's. A Dual's value takes what the plain call of its shape takes. Under torch.compile SDPA stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_kernels import processor

TOKENS = 64  # up to which the plain formula is asked
HEADS, ROWS = 4, 4096  # of a timed call: heads, and heads times tokens times the batch
PLAIN, SDPA = "softmax", "sdpa"
NAMES = (PLAIN, SDPA)

TRAINED = ("triton", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient")  # on a GPU: those of `primal`

_chosen: Mapping[str, str] = {}


def label(tokens: int, dim: int, dtype: torch.dtype) -> str:
    """A shape's name in a checkpoint."""
    return f"T{tokens} d{dim} {str(dtype).removeprefix('torch.')}"


def chosen(qkv: Tensor) -> str | None:
    """What the stage chose for qkv (B, T, 3, H, d); None where it chose nothing, and under torch.compile."""
    if not _chosen or torch.compiler.is_compiling():
        return None
    return _chosen.get(label(qkv.shape[1], qkv.shape[-1], qkv.dtype))


def plain(qkv: Tensor) -> bool:
    """Whether the value of qkv (B, T, 3, H, d) is the formula's by choice."""
    return qkv.is_cpu and chosen(qkv) == PLAIN


def library(qkv: Tensor) -> str:
    """The library of `primal` that trains qkv (B, T, 3, H, d), of rows without tangents."""
    name = chosen(qkv)
    return name if name in TRAINED else "triton"


@contextlib.contextmanager
def using(choices: Mapping[str, str]) -> Iterator[None]:
    """Inside, these shapes take what was chosen, {label: name}. Raises ValueError for a name that is none."""
    global _chosen
    wrong = {name for name in choices.values() if name not in (*NAMES, *TRAINED)}
    if wrong:
        names = ", ".join(map(repr, sorted(map(str, wrong))))
        raise ValueError(f"attention by {names}; the choices are {', '.join((*NAMES, *TRAINED))}")
    before, _chosen = _chosen, dict(choices)
    try:
        yield
    finally:
        _chosen = before


def speed(tokens: int, dim: int, dtype: torch.dtype) -> float:
    """How many times as fast as SDPA the formula is here, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        qkv = torch.randn(max(1, ROWS // (HEADS * tokens)), tokens, 3, HEADS, dim, generator=generator).to(dtype)
        do = torch.randn(len(qkv), HEADS, tokens, dim, generator=generator).to(dtype)
        qkv.requires_grad_()

        def call(attend: Callable) -> Callable[[], object]:
            return lambda: torch.autograd.grad(attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0)), qkv, do)

        usual, other = call(F.scaled_dot_product_attention), call(formula)
        return processor.ratio(f"attention {label(tokens, dim, dtype)}", usual, other)


def choose(tokens: int, dim: int, dtype: torch.dtype) -> str:
    """The faster of the two, SDPA unless the formula is `processor.WORTH` times as fast."""
    if tokens > TOKENS or not processor.timed():
        return SDPA
    return PLAIN if speed(tokens, dim, dtype) >= processor.WORTH else SDPA


def weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of (B, H, T, d) each -> P (B, H, T, T)."""
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT, dim=-1)


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """P v of (B, H, T, d) each."""
    return weights(q, k) @ v
