"""The Triton kernels of attention in Triton's interpreter, on a CPU, against float64; and their launch as torch ops.

TRITON_INTERPRET must be set before triton is imported, so this file runs itself once in a process of its own, where
every check below prints one line; each test reads its line. The interpreter's bf16 dot is wrong: float32 and float16.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import traceback
from pathlib import Path

import pytest
import torch
from cmt_kernels import Dual
from cmt_kernels.accuracy import limits
from cmt_kernels.attention.cases import Case, inputs
from cmt_kernels.attention.reference import attention as reference
from cmt_kernels.cases import allowed, error

from tests.fixtures import forked
from tests.kernels import interpreter

ROOT = Path(__file__).parents[2]
CASES = (
    Case(4, 1, 1, 64, 1),
    Case(4, 7, 2, 36),
    Case(4, 7, 1, 36, 0),
    Case(4, 7, 1, 72, 1),
    Case(2, 33, 1, 64, 2),
    Case(2, 77, 1, 72, 1),
    Case(1, 32, 1, 128, 1),
    Case(1, 33, 1, 80, 1),
    Case(1, 33, 1, 96, 1),
    Case(2, 33, 1, 8, 1),
)
LAYOUTS = {
    "contiguous": lambda x: x,
    "strided": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


INF, NAN = float("inf"), float("nan")
# (B, T, 3, 1, d) random numbers, each of these a factor or what takes the place of some of them
EXTREMES = {
    "logits-of-3e9": lambda x: (
        (2 * x).round() * torch.tensor([2.0**14, 2.0**14, 1.0]).view(3, 1, 1)
    ),  # no sum is rounded
    "one-huge-query": lambda x: one_query((2 * x).round(), 2.0**33),
    "equal-1e4": lambda x: torch.full_like(x, 1e4),
    "equal-logits-of-1e9": lambda x: torch.cat((torch.full_like(x[:, :, :2], 2e4), x[:, :, 2:]), dim=2),
    "values-of-3e38": lambda x: torch.cat((x[:, :, :2], torch.full_like(x[:, :, 2:], 3e38)), dim=2),
    "denormals": lambda x: x * 1e-40,
    "zeros": torch.zeros_like,
    "one-key-of-minus-inf": lambda x: keys(x, slice(4, 5), -INF),
    "first-block-of-minus-inf": lambda x: keys(x, slice(0, 16), -INF),
    "last-key-of-minus-inf": lambda x: keys(x, slice(-1, None), -INF),
    "keys-of-minus-inf": lambda x: keys(x, slice(None), -INF),
    "one-key-of-inf": lambda x: keys(x, slice(4, 5), INF),
    "nan-query": lambda x: one_query(x, NAN),
    "inf-value": lambda x: x.index_put((torch.tensor(0), torch.tensor(3), torch.tensor(2)), torch.tensor(INF)),
}


def keys(x: torch.Tensor, which: slice, number: float) -> torch.Tensor:
    """Queries above zero, and some keys of the first row of the batch one number: logits of +-inf, not NaN."""
    x = torch.cat((x[:, :, :1].abs() + 0.1, x[:, :, 1:]), dim=2)
    x[0, which, 1] = number
    return x


def one_query(x: torch.Tensor, factor: float) -> torch.Tensor:
    x = x.clone()
    x[0, 2, 0] *= factor
    return x


def softmax_itself(qkv: torch.Tensor | Dual) -> torch.Tensor | Dual:
    """Attention as its formula says, without a fused kernel, for autograd."""
    q, k, v = (qkv.value if isinstance(qkv, Dual) else qkv).permute(2, 0, 3, 1, 4)
    y = (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v).transpose(1, 2).flatten(2)
    return Dual(y, reference(qkv).tangent) if isinstance(qkv, Dual) else y


def laid_out(case: Case, dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The value of the case as a leaf that wants a gradient, and its tangent if it has one."""
    qkv = inputs(case, dtype)["qkv"]
    x, x_dot = qkv if isinstance(qkv, Dual) else (qkv, None)
    return LAYOUTS[layout](x).requires_grad_(), None if x_dot is None else LAYOUTS[layout](x_dot)


def everything(function, x: torch.Tensor, x_dot: torch.Tensor | None, layout: str = "contiguous") -> list:
    """Value, gradient along a fixed direction, and the tangent if there is one."""
    y = function(x if x_dot is None else Dual(x, x_dot))
    y, tangents = (y.value, [y.tangent]) if isinstance(y, Dual) else (y, [])
    return [y.detach(), torch.autograd.grad(y, x, LAYOUTS[layout](direction_of(y)))[0], *tangents]


def direction_of(y: torch.Tensor) -> torch.Tensor:
    # not rounded alike for all dtypes: at T = 1 plain torch's gradient is exact, as its softmax of one number is 1, and what
    # takes p from the logsumexp would have to be (4.8e-7 in dv here); the direction's own rounding is the least that counts
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def check_accuracy(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Forward, gradient and tangent err by no more than the rule allows (`cmt_kernels.accuracy`); NaN-poisoned."""
    from cmt_kernels.attention.triton import attention

    x, x_dot = laid_out(case, dtype, layout)
    wide = [None if z is None else z.detach().double().requires_grad_() for z in (x, x_dot)]
    exact = everything(reference, *wide)
    plain = everything(reference, x, x_dot)
    got = everything(attention, x, x_dot, layout)
    most = limits(
        lambda given: everything(reference, given["x"].requires_grad_(), given["x_dot"]),
        {"x": x.detach(), "x_dot": x_dot},
    )
    names = ("value", "gradient", "tangent")
    for name, y, yardstick, truth, limit in zip(names, got, plain, exact, most, strict=False):
        assert (y.shape, y.dtype, y.requires_grad) == (yardstick.shape, yardstick.dtype, False), name
        assert error(y, truth) <= limit, f"{name} errs by {error(y, truth):.2e}, more than {limit:.2e}"


def check_bits(case: Case, dtype: torch.dtype) -> None:
    """The value and its gradient are bitwise those of the plain call, which a second run repeats."""
    from cmt_kernels.attention.triton import attention

    x, x_dot = laid_out(case, dtype, "contiguous")
    plain = everything(attention, x, None)
    for again in (everything(attention, x, x_dot), everything(attention, x, None)):
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=False))


def check_extreme(name: str, backend: str) -> None:
    """Value, gradient and tangent are finite exactly where softmax itself in float64 is, and as near it as in float32."""
    from cmt_kernels.attention.triton import attention

    x, x_dot = (EXTREMES[name](y) if i == 0 else y for i, y in enumerate(inputs(Case(2, 33, 1, 16, 2))["qkv"]))
    got = everything({"triton": attention, "reference": reference}[backend], x.requires_grad_(), x_dot)
    plain = everything(softmax_itself, x, x_dot)
    exact = everything(softmax_itself, x.detach().double().requires_grad_(), x_dot.double())
    for part, y, yardstick, truth in zip(("value", "gradient", "tangent"), got, plain, exact, strict=True):
        finite = truth.isfinite()
        if part != "value" and "3e38" in name:  # products of a value and a gradient pass float32 in plain torch too
            continue
        assert torch.equal(y.isfinite(), finite), f"{part}: {int((y.isfinite() != finite).sum())} differ in finiteness"
        wrong, limit = error(y[finite], truth[finite]), allowed(yardstick[finite], truth[finite])
        limit += x.shape[1] * 2.0**-149  # each of T products may be denormal
        if part == "gradient":
            limit += cancelled(x.detach().nan_to_num(0, 0, 0), direction_of(got[0]))
        assert wrong <= limit, f"{part} errs by {wrong:.2e}, allowed {limit:.2e}"


def cancelled(x: torch.Tensor, do: torch.Tensor) -> float:
    """What rounding of dP and delta, two sums of d products whose difference may be zero, costs dq and dk."""
    size, d = x.abs().amax(dim=(0, 1, 3, 4)).double(), x.shape[-1]
    return (d**1.5 * torch.finfo(x.dtype).eps * do.abs().max().double() * size[2] * size[:2].max()).item()


def check_ops() -> None:
    """Schema, fakes, autograd registration and AOT dispatch of every op."""
    import cmt_kernels.attention.triton  # noqa: F401

    x, x_dot = laid_out(Case(2, 5, 1, 8, 1), torch.float32, "contiguous")
    o, _, norms = (y.detach() for y in torch.ops.cmt.attention(x))
    plain = x.detach()
    torch.library.opcheck(torch.ops.cmt.attention.default, (x,))
    torch.library.opcheck(torch.ops.cmt.attention.default, (x, x_dot))
    torch.library.opcheck(torch.ops.cmt.attention.default, (x, x_dot[:0]))
    torch.library.opcheck(torch.ops.cmt.attention_backward.default, (plain, o, norms, torch.randn_like(o)))


def check_compile() -> None:
    """One graph whose value, gradient and tangent are eager's bits; the tangent carries no gradient."""
    import cmt_kernels

    x, x_dot = laid_out(Case(2, 7, 1, 36, 1), torch.float32, "contiguous")
    with cmt_kernels.use("attention:triton"):
        compiled = torch.compile(cmt_kernels.attention, fullgraph=True, backend="aot_eager")
        for tangent in (None, x_dot):
            got, eager = (everything(f, x, tangent) for f in (compiled, cmt_kernels.attention))
            assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(got, eager, strict=True))
        assert got[2].count_nonzero()


def check_saved() -> None:
    """Backward keeps qkv, the output and two numbers per query; nothing of the tangent."""
    from cmt_kernels.attention.triton import attention

    x, x_dot = laid_out(Case(3, 7, 2, 36, 3), torch.float32, "contiguous")
    seen: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: seen.append(y) or y, lambda y: y):
        y = attention(Dual(x, x_dot))
    assert sum(z.nbytes for z in seen) == x.nbytes + y.value.nbytes + 2 * 4 * 3 * 2 * 7
    assert y.value.requires_grad and not y.tangent.requires_grad


def check_refusals() -> None:
    """What the kernels cannot do raises a ValueError that says so."""
    from cmt_kernels.attention.triton import attention

    x = torch.randn(2, 5, 3, 1, 16)
    for wrong in (
        x.double(),
        x[:, :, :2],
        Dual(x, x.half()),
        Dual(x, x.repeat(2, 1, 1, 1, 1)),
        x.new_ones(1, 1, 3, 1, 257),
    ):
        with pytest.raises(ValueError, match="attention"):
            attention(wrong)


def checks() -> dict[str, object]:
    table = {f"float32-{c.id}": (check_accuracy, c, torch.float32, "contiguous") for c in CASES}
    table |= {f"float16-{c.id}": (check_accuracy, c, torch.float16, "contiguous") for c in CASES[4:6]}
    table |= {f"{name}-{c.id}": (check_accuracy, c, torch.float32, name) for name in LAYOUTS for c in CASES[3:4]}
    bits = ((CASES[3], torch.float32), (CASES[5], torch.float16))
    table |= {f"bits-{dtype}-{c.id}": (check_bits, c, dtype) for c, dtype in bits}
    table |= {
        f"{backend}-{name}": (check_extreme, name, backend) for backend in ("triton", "reference") for name in EXTREMES
    }
    return table | {f.__name__: (f,) for f in (check_ops, check_compile, check_saved, check_refusals)}


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [*forked.python("interpreter"), "-m", "tests.kernels.test_attention_interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", checks())
def test_interpreted(name: str, results: dict[str, str]) -> None:
    assert results[name] == "ok", results[name].replace("\\n", "\n")


def main() -> None:
    torch.set_num_threads(1)
    interpreter.lighten()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # what a kernel forgets to write is NaN
    for name, (check, *arguments) in checks().items():
        try:
            check(*arguments)
            print(name, "ok", sep="\t")
        except Exception:
            print(name, traceback.format_exc().replace("\n", "\\n"), sep="\t")


if __name__ == "__main__":
    main()
