"""Extreme numbers through every op: what is planted where, and how a result is judged.

    python -m tests.kernels.extremes [few] [op or backend ...]                    the table op x backend x value: differences;
                                                                                  few: fewer values and smaller rows
    python -m tests.kernels.emulated -m tests.kernels.extremes native             the CUDA sources, emulated
    TRITON_INTERPRET=1 python -m tests.kernels.extremes triton                    the Triton kernels, interpreted

**Planting.** One argument of a call is changed. Of its rows (dim 0) one is made of the value alone, one has it once a line, one
has both signs of it among its own numbers, and one is left alone. A vector is planted in these three ways one after the other.

**How large.** An argument in which the op is linear (tangent, gradient, weight, gate, factor of a product) takes its
largest value 2^-20 below that of the dtype: it scales out of the answer, and larger is only the overflow of a sum's terms.
Every other goes to the end of the dtype.

**Truth** is the reference in float64 on the same numbers, but for three ops whose float64 has not the digits (`truth_of`).
A result must be finite exactly where the truth, rounded to the dtype, is; and where both are, near it: in units of its
line's largest number the error is at most twice that of plain torch plus one rounding, as in test_ops.py; where plain torch
has not half the digits of the dtype itself, it is no yardstick, and half the digits are asked for. Lines are units of their
own because one of them may be 1e38 times another. No unit is below
* the dtype's smallest normal number;
* of a tangent or a gradient: what float64 resolves of the one that it is linear in, and what the op makes of an ordinary
  one of that size: equal numbers minus their mean are 0, and no line to measure in;
* of attention, whose tangent and gradient are differences of products with two of q, k and v: such a product.
The reference in bfloat16 is only asked to be finite: it rounds every step, and is the yardstick there.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cmt_kernels import OPS, Dual
from cmt_kernels.accuracy import as_a_kernel_takes
from cmt_kernels.cases import backends_on, cases_of, implementation, map_tensors, outputs, wide
from torch import Tensor

from tests.kernels import interpreter
from tests.kernels.extreme_limits import LIMITS, Limit
from tests.kernels.formulas import by_hand
from tests.kernels.test_ops import with_leaves

LARGEST = 3e38  # of fp32 and, rounded, of bf16
VALUES = (
    0.0,
    -0.0,
    1e-40,
    *(s * v for v in (10.2, 20.0, 100.0, 1e4, 1e13, 1e20, LARGEST, math.inf) for s in (1, -1)),
    math.nan,
)
HEADROOM = 2.0**-20
NO_FLOATS = ("random_bits",)
# for the slow interpreter, which takes milliseconds for a line of a row
FEW = (0.0, 1e-40, 10.2, -10.2, -1e13, 1e20, LARGEST, -LARGEST, -math.inf, math.nan)
SMALL = {"attention": {"H": 1}, "gelu": {"T": 1}, "gated_residual": {"T": 1}, "modulated_norm": {"T": 1},
         "qk_norm": {"T": 1, "H": 1}}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """sizes: of the op's Case, four rows; full: arguments that go to the end of the dtype; linear: the others that are
    planted, besides every tangent and the gradient. `qkv.0` is the slice [:, :, 0] of qkv."""

    sizes: dict[str, Any]
    full: tuple[str, ...] = ()
    linear: tuple[str, ...] = field(default=())


ROWS = {"B": 4, "T": 3, "D": 20, "k": 4}  # a row is no whole number of vectors of 8 or 16
PLANS = {
    "adamw_ema": Plan({"P": 40, "emas": 2, "clip": 1.0, "decay": 0.1}, ("g", "p", "v"), ("m",)),
    "attention": Plan({"B": 4, "T": 5, "H": 2, "d": 8, "k": 4}, (), ("qkv.0", "qkv.1", "qkv.2")),
    "clip": Plan({"B": 4, "D": 24, "k": 4}, ("x",)),
    "consistency_loss": Plan({"B": 4, "shape": (3, 8)}, ("prediction", "target")),
    "conv2d": Plan({"B": 4, "C": 3, "S": 4, "E": 5, "k": 4}, (), ("x", "weight", "bias")),
    "dropout": Plan({"B": 4, "shape": (3, 8), "k": 4}, ("x",)),
    "fourier_embedding": Plan({"B": 4, "n": 8, "k": 4}, ("t",), ("frequency",)),
    "gated_residual": Plan(dict(ROWS), ("x",), ("branch", "gate", "bias")),
    "gelu": Plan(dict(ROWS), ("x", "bias")),
    "group_norm": Plan({"B": 4, "C": 6, "S": 3, "G": 2, "k": 4}, ("x", "bias"), ("weight",)),
    "label_embedding": Plan({"B": 4, "D": 24, "C": 3}, ("table",)),
    "linear": Plan({"B": 4, "T": 3, "D": 24, "E": 16, "k": 4}, (), ("x", "weight", "bias")),
    "meanflow_loss": Plan({"B": 4, "shape": (3, 8), "k": 4}, ("u", "v")),
    "modulated_norm": Plan(dict(ROWS), ("x", "shift"), ("scale",)),
    "modulated_rms_norm": Plan(dict(ROWS), ("x", "shift"), ("weight", "scale")),
    "mp_cat": Plan({"B": 4, "T": 3, "D": 20, "E": 12, "k": 4}, (), ("a", "b")),
    "mp_silu": Plan(ROWS | {"T": 1}, (), ("x", "scale")),
    "mp_sum": Plan({"B": 4, "shape": (3, 20), "limit": 50.0, "k": 4}, ("a", "b")),
    "path_point": Plan({"B": 4, "shape": (3, 8)}, ("x_0",), ("sigma",)),
    "pixel_norm": Plan({"B": 4, "shape": (6, 3, 3), "k": 4}, ("x",)),
    "qk_norm": Plan({"B": 4, "T": 3, "H": 2, "d": 8, "k": 4}, ("qkv.0", "qkv.2"), ("q_weight",)),
    "silu": Plan({"B": 4, "D": 24, "k": 4}, ("x",)),
    "solver_step": Plan({"B": 4, "shape": (3, 8), "order": 2}, (), ("x", "f", "m1", "coefficients")),
    "weight_gradient": Plan({"B": 4, "T": 3, "D": 24, "E": 16}, ("g",), ("dy", "x")),
    "unit_weight": Plan({"E": 4, "D": 5, "n": 3, "last": True}, ("weight",)),
    "time_embedding": Plan({"B": 4, "dim": 8, "k": 4}, ("t",)),
}  # fmt: skip


def arguments(op: str) -> dict[str, bool]:
    """What is planted in an op -> whether it goes to the end of the dtype."""
    plan, module = PLANS[op], cases_of(op)
    inputs = module.inputs(module.Case(**plan.sizes))
    duals = [f"{name}.tangent" for name, x in inputs.items() if isinstance(x, Dual)]
    gradient = ["gradient"] if module.GRADS else []
    return dict.fromkeys(plan.full, True) | dict.fromkeys([*plan.linear, *duals, *gradient], False)


def planted(x: Tensor, value: float) -> Iterator[Tensor]:
    """x with the value in it: one tensor, or for a vector three."""
    mixed = torch.where(torch.arange(x.numel()).view(x.shape) % 3 == 0, value, x)
    mixed = torch.where(torch.arange(x.numel()).view(x.shape) % 3 == 1, -value, mixed).to(x.dtype)
    alone = torch.full_like(x, value)
    once = x.clone()
    if x.ndim == 1:
        once[len(x) // 2] = value
        yield from (alone, once, mixed)
        return
    once.view(-1, x.shape[-1])[
        torch.arange(x.numel() // x.shape[-1]), torch.arange(x.numel() // x.shape[-1]) % x.shape[-1]
    ] = value
    ways = (alone, once, mixed, x)
    yield torch.stack([ways[min(i, 3)][i] for i in range(len(x))])


def calls(
    op: str, argument: str, value: float, dtype: torch.dtype, device: str
) -> Iterator[tuple[dict, Tensor | None]]:
    """(inputs, the gradient's direction or None for the ordinary one) with the value planted in the argument."""
    module = cases_of(op)
    case = module.Case(**PLANS[op].sizes)
    name, _, part = argument.partition(".")
    if name == "gradient":
        y = outputs(op, implementation(op, "reference"), module.inputs(case, dtype))[0]
        for direction in planted(direction_of(y), value):
            yield module.inputs(case, dtype, device), direction.to(device)
        return
    x = module.inputs(case, dtype)[name]
    start = x.tangent if part == "tangent" else x.value if isinstance(x, Dual) else x
    for new in planted(start[:, :, int(part)].contiguous() if part.isdigit() else start, value):
        if part.isdigit():
            new = torch.cat([new[:, :, None] if i == int(part) else start[:, :, i : i + 1] for i in range(3)], 2)
        inputs = module.inputs(case, dtype, device)
        new = new.to(device)
        if isinstance(x, Dual):
            new = x._replace(**{"tangent" if part == "tangent" else "value": new})
            new = map_tensors(lambda y: y.to(device), new)
        yield inputs | {name: new}, None


def direction_of(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)


def largest(x: Tensor) -> Tensor:
    """The largest finite number of each row, (B,) float64."""
    return x.detach().reshape(len(x), -1).double().abs().nan_to_num(0, 0, 0).amax(1)


@dataclass
class Answers:
    """Every tensor that a call gives, on the CPU; `scales`: of what each is linear in, a tangent or the gradient, the
    largest number of a row, or None."""

    tensors: list[Tensor]
    scales: list[Tensor | None]


def answers(op: str, function: Any, inputs: dict[str, Any], direction: Tensor | None) -> Answers:
    """Results, values first, then what was changed in place, then the gradients of the first result."""
    inputs = map_tensors(torch.clone, inputs)
    terms = 2.0**52 * largest(inputs["qkv"].value) ** 2 if op == "attention" else 1.0
    inputs, leaves = with_leaves(op, inputs)
    found = outputs(op, function, inputs)
    tangents = [x.tangent for x in inputs.values() if isinstance(x, Dual)]
    scales: list[Tensor | None] = [None] * len(found)
    if tangents and len(found) > 1 and op not in ("meanflow_loss", "adamw_ema"):
        scales[1] = torch.stack([largest(t) for t in tangents]).amax(0) * terms
    results = [y.detach() for y in found]
    if leaves:
        y = found[0]
        direction = (direction_of(y) if direction is None else direction).to(y.device, y.dtype)
        results += torch.autograd.grad(y, leaves, direction)
        scales += [largest(direction) * terms] * len(leaves)
    return Answers([y.cpu() for y in results], [s if s is None else s.cpu() for s in scales])


def lines(y: Tensor, rows: int) -> Tensor:
    """(lines, numbers): the last dim is a line; of one number a row each is one."""
    return y.view(-1, 1) if y.ndim == 1 and len(y) == rows else y.reshape(-1, y.shape[-1] if y.ndim else 1)


def unit_of(truth: Tensor, ordinary: Tensor, scale: Tensor | None, of_ordinary: Tensor | None, least: float) -> Tensor:
    """(lines, 1): what the errors of each line are measured in."""
    rows = len(scale) if scale is not None else len(truth) if truth.ndim else 1
    truth, ordinary = (lines(x, rows) for x in (truth, ordinary))
    size = lambda x: torch.where(x.isfinite(), x, 0).abs().amax(1, keepdim=True)
    unit = size(truth).clamp(min=least)
    if scale is None:
        return unit
    whole = len(unit) % len(scale)  # a gradient of something without rows
    each, before = (
        x.amax() if whole else x.repeat_interleave(len(unit) // len(x))[:, None] for x in (scale, of_ordinary)
    )
    return torch.maximum(unit, torch.maximum(2.0**-52 * each, size(ordinary) * each / before))


def differences(got: Answers, plain: Answers, exact: Answers, ordinary: Answers) -> tuple[int, list[tuple]]:
    """(numbers of which one is finite and the other is not, of each tensor its error and plain torch's, in units).

    ordinary: the truth, with an ordinary tangent and gradient where one was planted.
    """
    count, errors = 0, []
    for i, (y, yardstick, truth) in enumerate(zip(got.tensors, plain.tensors, exact.tensors, strict=True)):
        assert (y.shape, y.dtype) == (yardstick.shape, yardstick.dtype)
        rounded = truth.to(y.dtype)
        count += int((y.isfinite() != rounded.isfinite()).sum())
        unit = unit_of(truth, ordinary.tensors[i], exact.scales[i], ordinary.scales[i], torch.finfo(y.dtype).tiny)
        y, yardstick, rounded, truth = (x.double().reshape(len(unit), -1) for x in (y, yardstick, rounded, truth))
        finite = rounded.isfinite()
        error = lambda x: torch.where(finite & x.isfinite(), (x - truth).abs(), 0).div(unit).amax().item()  # noqa: B023
        errors.append((error(y), error(yardstick) if (yardstick.isfinite() == finite).all() else math.inf))
    return count, errors


def gelu_exactly(x: Tensor | Dual, bias: Tensor) -> Tensor | Dual:
    """x sigmoid(2 p): in the reference's 1 + tanh p float64 has no digits left below -7."""
    v = x.value + bias
    p = math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
    slope = torch.sigmoid(2 * p) + v * torch.sigmoid(2 * p) * torch.sigmoid(-2 * p) * math.sqrt(8 / math.pi) * (
        1 + 0.134145 * v * v
    )
    return Dual(v * torch.sigmoid(2 * p), slope.detach() * x.tangent)


def truth_of(op: str) -> Any:
    """The function that is right, given float64."""
    function = implementation(op, "reference")
    if op == "gelu":
        return gelu_exactly
    if op == "path_point":  # its noise is float32 by definition, the truth's is not
        return lambda **inputs: by_hand(op, inputs)
    if op in ("modulated_norm", "group_norm"):  # about the first number: the mean of equal ones of 1e38 is off by 1e22
        start = lambda x: x[:, ::3, :1, :1].repeat_interleave(3, 1) if x.ndim == 4 else x[..., :1]  # 2 groups of 3
        return lambda x, **rest: function(x._replace(value=x.value - start(x.value.detach())), **rest)
    return function


@dataclass(frozen=True)
class Row:
    """Of one op, backend, dtype, argument and value."""

    op: str
    backend: str
    device: str
    dtype: str
    argument: str
    value: float
    finiteness: int  # numbers that are finite where the truth is not, or the reverse
    error: float  # the largest, over what is allowed

    @property
    def differs(self) -> bool:
        return self.finiteness > 0 or not self.error <= 1


def yardsticks(
    op: str, dtype: torch.dtype, argument: str, value: float, device: str
) -> tuple[list[tuple], Answers | None]:
    """What no backend changes: of each call its inputs, direction, truth, plain torch's answers, and its errors with scalars in
    fp32; and the truth of the op's ordinary inputs where a tangent or the gradient is planted. Kept for an op's backends."""
    if _kept.get("op") != op:
        _kept.clear()
        _kept["op"] = op
    if dtype not in _kept:
        module = cases_of(op)
        _kept[dtype] = answers(op, truth_of(op), wide(module.inputs(module.Case(**PLANS[op].sizes), dtype)), None)
    ordinary = _kept[dtype] if argument == "gradient" or argument.endswith(".tangent") else None
    key = dtype, argument, str(value), device  # 0.0 and -0.0 are equal as numbers
    if key not in _kept:
        made = []
        for inputs, direction in calls(op, argument, value, dtype, device):
            on_cpu = map_tensors(lambda x: x.cpu(), inputs)
            exact = answers(op, truth_of(op), wide(on_cpu), None if direction is None else direction.cpu().double())
            rounded = as_a_kernel_takes(
                map_tensors(torch.clone, inputs)
            )  # torch's own kernels take scalars in fp32 too
            plain, again = (answers(op, implementation(op, "reference"), x, direction) for x in (inputs, rounded))
            _, scalars = differences(again, plain, exact, ordinary or exact)
            made.append((inputs, direction, exact, plain, scalars))
        _kept[key] = made
    return _kept[key], ordinary


_kept: dict[Any, Any] = {}


def compared(
    op: str, backend: str, dtype: torch.dtype, argument: str, value: float, device: str
) -> tuple[int, list[list[tuple]]]:
    """Plant a value; what `differences` says of each call, counts added. Raises whatever the backend raises."""
    if abs(value) == LARGEST and not arguments(op)[argument]:
        value *= HEADROOM
    made, ordinary = yardsticks(op, dtype, argument, value, device)
    count, errors = 0, []
    for inputs, direction, exact, plain, scalars in made:
        got = plain if backend == "reference" else answers(op, implementation(op, backend), inputs, direction)
        n, each = differences(got, plain, exact, ordinary or exact)
        each = [(error, max(of_plain, other)) for (error, of_plain), (other, _) in zip(each, scalars, strict=True)]
        count, errors = count + n, [*errors, each]
    return count, errors


def rows(
    op: str, backend: str, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (), values: tuple[float, ...] = VALUES
) -> Iterator[Row]:
    """Every value in every argument of an op. Plain torch's error is a matter of luck: the largest over the values counts."""
    for dtype in dtypes or cases_of(op).DTYPES:
        eps = torch.finfo(dtype).eps
        for argument in arguments(op):
            found = [compared(op, backend, dtype, argument, value, device) for value in values]
            plain = [
                max([p for _, p in outs if p <= eps**0.5], default=0)
                for outs in zip(*(e for _, es in found for e in es))
            ]
            for value, (count, errors) in zip(values, found, strict=True):
                worst = 0.0
                for each in errors:
                    for largest_of_plain, (error, of_plain) in zip(plain, each, strict=True):
                        luck = 2 * largest_of_plain + eps
                        right = of_plain <= eps**0.5 and backend != "reference"
                        worst = max(worst, error / (min(luck, eps**0.5) if right else eps**0.5))
                if backend == "reference" and dtype == torch.bfloat16:
                    worst = 0.0
                yield Row(op, backend, device, str(dtype).removeprefix("torch."), argument, value, count, worst)


def limit_of(row: Row) -> Limit | None:
    """The limit that a row which differs falls under."""
    fits = lambda l: (
        (row.op == l.op and row.backend in l.backends and row.device in l.devices)
        and (row.argument in l.arguments and l.applies(row.value))
    )
    return next(filter(fits, LIMITS), None) if row.differs else None


def table(found: list[Row]) -> str:
    """op x backend x value: numbers that differ in finiteness, `!` for an error beyond what is allowed, () under a limit."""
    out = [" ".join([f"{'op backend':28}", *(f"{v:>7g}" for v in VALUES)])]
    for op, backend in dict.fromkeys((row.op, row.backend) for row in found):
        cells = []
        for v in VALUES:
            here = [row for row in found if (row.op, row.backend, str(row.value)) == (op, backend, str(v))]
            text = f"{sum(r.finiteness for r in here)}{'!' * any(not r.error <= 1 for r in here)}" if here else "-"
            cells.append(f"({text})" if any(map(limit_of, here)) else text)
        out.append(" ".join([f"{op + ' ' + backend:28}", *(f"{c:>7}" for c in cells)]))
    return "\n".join(out)


def main(names: list[str]) -> int:
    """Print a line of JSON a row that differs under no limit, the table and the limits; how many such rows."""
    few, names = "few" in names, [n for n in names if n != "few"]
    backends, ops = [n for n in names if n not in OPS], [n for n in names if n in OPS] or OPS
    found = []
    if few:
        for op, sizes in SMALL.items():
            PLANS[op].sizes.update(sizes)
        if "triton" in backends:
            interpreter.quicken()
    for op in [op for op in ops if op not in NO_FLOATS]:
        for backend in [b for b in backends_on(op, "cpu") if b in backends or not backends]:
            dtypes = (torch.float32,) if backend == "triton" else ()  # the interpreter truncates to bfloat16
            for row in rows(op, backend, dtypes=dtypes, values=FEW if few else VALUES):
                found.append(row)
                if row.differs and not limit_of(row):
                    print(json.dumps(row.__dict__), flush=True)
    bad = [row for row in found if row.differs and not limit_of(row)]
    print(table(found))
    for limit in dict.fromkeys(filter(None, map(limit_of, found))):
        print(f"({limit.op}, {' and '.join(limit.backends)}, {' and '.join(limit.arguments)}: {limit.why})")
    print(
        f"{len(found)} rows, {sum(r.finiteness for r in bad)} differences in finiteness, "
        f"{sum(not r.error <= 1 for r in bad)} errors beyond what is allowed; "
        f"{sum(limit_of(r) is not None for r in found)} rows under a limit"
    )
    return len(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
