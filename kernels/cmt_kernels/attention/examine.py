"""A few random rows through attention's kernels and through float64 in plain torch: is one choice of tiles right?

The rows lie in memory as those of the real call do, because a kernel's code depends on strides and alignment. Each
output is judged per query (and head): |y - exact| / |exact| as vectors. What is allowed is what rounding may do in any
order of summation: a few roundings to the dtype, and sums of T and of d terms in float32.

What a proof costs is mostly what a process pays when it first uses a kernel of torch in float64: 10 to 80 ms each on an
H100's host (2026-11-27), where the comparison of a later shape takes 3. So float64 is used throughout, of a backward's
inputs too, and what can be compared on the CPU is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmt_kernels.attention import reference
from cmt_kernels.dual import Dual

ROWS = 2  # the first with the tangent, so a Dual's launch proves the kernel of the rows without one too
COMPARED = 2**23  # elements of T x T matrices in float64 that a proof may take, two heads at least
Run = Callable[..., tuple[Tensor, ...]]


@dataclass
class Verdict:
    """Of one candidate. errors: output -> the largest relative error of a query; allowed: what rounding may do;
    fault: why it did not run; ms: time of the comparison; compile_ms: of the first run, which compiles."""

    right: bool
    errors: dict[str, float] = field(default_factory=dict)
    allowed: float = 0.0
    fault: str = ""
    ms: float = 0.0
    compile_ms: float = 0.0

    def __str__(self) -> str:
        wrong = [f"{name} errs by {e:.1e}" for name, e in self.errors.items() if not e <= self.allowed]
        return self.fault or (f"{', '.join(wrong)}, allowed {self.allowed:.1e}" if wrong else "right")


@dataclass(frozen=True)
class Sample:
    """kind: "forward" or "backward"; inputs: what the kernels take; exact, on the CPU: output -> (ROWS or 1, T, ..., heads, d).
    Of a backward's o and norms the heads that nobody compares are zeros."""

    kind: str
    inputs: tuple[Tensor | None, ...]
    heads: list[int]
    exact: dict[str, Tensor]
    ms: float


def allowed(dtype: torch.dtype, t: int, d: int) -> float:
    """Four roundings to the dtype (p or ds, its product's partner, the output, one to spare), each at most eps / 2, and
    float32 sums of T and of d terms, whose error in any order is at most the count times eps / 2, four times over."""
    return 2 * torch.finfo(dtype).eps + 2 * (t + d) * torch.finfo(torch.float32).eps


def layout(x: Tensor) -> tuple[int, ...]:
    """What code depends on besides sizes: the strides inside a row, then its stride and its address to 16 bytes."""
    strides, size = x.stride(), x.element_size()
    return *strides[1:], strides[0] * size % 16 // size, x.data_ptr() % 16 // size


def alike(x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """(rows, ...) random numbers with the layout of x (B, ...)."""
    *strides, row, offset = layout(x)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape[1:], strides))
    step = x.stride(0) if len(x) >= rows and x.stride(0) < span else -(-span // 16) * 16 + row
    numbers = torch.randn(offset + (rows - 1) * step + span, generator=generator, device=x.device).to(x.dtype)
    return numbers.as_strided((rows, *x.shape[1:]), (step, *strides), offset)


def draw(kind: str, qkv: Tensor, other: Tensor | None) -> Sample:
    """The question to put to kernels for a call with qkv (B, T, 3, H, d) and its tangent or, backward, do (B, T, H d)."""
    start = time.perf_counter()
    _, t, _, h, d = qkv.shape
    generator = torch.Generator(qkv.device).manual_seed(0)
    x = alike(qkv, ROWS, generator)
    z = None if other is None else alike(other, ROWS if kind == "backward" else 1, generator)
    count = h if ROWS * h * t * t <= COMPARED else min(h, max(2, COMPARED // (ROWS * t * t)))
    heads = sorted({round(i * (h - 1) / max(1, count - 1)) for i in range(count)})
    few = x[:, :, :, _those(heads, h)].double()
    y = reference.attention(
        few if z is None or kind == "backward" else Dual(few, z[:, :, :, _those(heads, h)].double())
    )
    if kind == "backward":
        o, norms = x.new_zeros(ROWS, t, h, d), x.new_zeros(ROWS, h, 2, t, dtype=torch.float32)
        o[:, :, _those(heads, h)] = y.unflatten(2, (len(heads), d)).to(x.dtype)
        norms[:, _those(heads, h)] = reference.norms(few)
        inputs = (x, o.flatten(2), norms, z)
        do = z.unflatten(2, (h, d))[:, :, _those(heads, h)].double()
        exact = {"gradient": reference.gradient(few, do.flatten(2)).cpu()}
    else:
        inputs = (x, z)
        exact = dict(zip(("value", "tangent"), y if isinstance(y, Dual) else (y,)))
        exact = {name: y.unflatten(2, (len(heads), d)).cpu() for name, y in exact.items()}
    return Sample(kind, inputs, heads, exact, 1e3 * (time.perf_counter() - start))


def examine(sample: Sample, run: Run) -> Verdict:
    """Whether run(*inputs), `forward` or `backward` of `triton_launches` with tiles, gives the exact outputs, twice alike."""
    qkv = sample.inputs[0]
    _, t, _, h, d = qkv.shape
    start = time.perf_counter()
    try:
        first = _outputs(sample, run(*sample.inputs), h, d)
        _wait(qkv)
        compiled = time.perf_counter()
        again = _outputs(sample, run(*sample.inputs), h, d)
        errors = {name: _relative(y, sample.exact[name]) for name, y in again.items()}
        repeats = all(torch.equal(y, again[name]) for name, y in first.items())
    except torch.OutOfMemoryError:
        raise  # says nothing about the tiles
    except Exception as fault:  # tiles that do not run here are not right here; why is kept
        text = str(fault).splitlines()
        return Verdict(False, fault=f"{type(fault).__name__}: {text[0] if text else ''}")
    verdict = Verdict(False, errors, allowed(qkv.dtype, t, d))
    verdict.right = all(e <= verdict.allowed for e in errors.values()) and repeats  # a NaN error is not right
    if str(verdict) == "right" and not repeats:
        verdict.fault = "two runs differ"
    verdict.ms = sample.ms + 1e3 * (time.perf_counter() - compiled)
    verdict.compile_ms = 1e3 * (compiled - start)
    return verdict


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _those(heads: list[int], h: int) -> list[int] | slice:
    """An index of these heads of h."""
    return heads if len(heads) < h else slice(None)


def _outputs(sample: Sample, got: tuple[Tensor, ...] | Tensor, h: int, d: int) -> dict[str, Tensor]:
    """The outputs that have an exact twin, of the compared heads, in the memory of the CPU."""
    if sample.kind == "backward":
        return {"gradient": got.cpu()[:, :, :, sample.heads]}
    return {name: y.cpu().unflatten(2, (h, d))[:, :, sample.heads] for name, y in zip(sample.exact, got)}


def _relative(y: Tensor, exact: Tensor) -> float:
    """The largest |y - exact| of a query and head over its |exact|, or over the mean of those where it is small."""
    over = (2, 4) if exact.ndim == 5 else 3
    size = exact.norm(dim=over)
    return ((y.double() - exact).norm(dim=over) / size.clamp_min(size.mean())).max().item()
