"""What the `cases.py` of every op shares: ids, seeded inputs, and the yardstick of the tests and the bench.

An op's `cases.py` holds

* `Case`: sizes, options and `k`, the rows with a tangent (None: plain tensors);
* `CASES`: small and odd, for the tests; `BENCH`: the sizes of a DiT-B/2 at batch 8, for the bench;
* `DTYPES` to test in; `GRADS`: arguments with a gradient; where there are any, `MUTATED`: arguments changed in place,
  and `SCRATCH`: arguments that a backend may overwrite with anything;
* `inputs(case, dtype, device)`: the keyword arguments of one call, the same numbers on every call;
* `case_of(...)`: the op's own parameters, from a call that was made -> its Case;
* `nbytes(case, itemsize)`: every input read once and every output written once; `flops(case)`: 2 a multiply-add,
  1 an elementary function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from cmt_kernels._op import available
from cmt_kernels.dual import Dual

LOW = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class BaseCase:
    @property
    def id(self) -> str:
        """Readable name: `B5-T77-D72-bias-k1`; options that are off leave no trace."""
        return "-".join(filter(None, (_label(f.name, getattr(self, f.name)) for f in fields(self))))


def _label(name: str, setting: Any) -> str:
    if setting is None or setting is False or setting == 0.0 and isinstance(setting, float):
        return ""
    if setting is True:
        return name
    if isinstance(setting, str):
        return setting
    if isinstance(setting, tuple):
        return "x".join(map(str, setting))
    return f"{name}{setting:g}" if isinstance(setting, float) else f"{name}{setting}"


def tangent_rows(batch: int) -> tuple[int | None, ...]:
    """The k that every op with tangents is tested at: None, 0, 1, B/4, B."""
    return None, 0, 1, batch // 4, batch


class Draw:
    """Random numbers of one call: drawn in float64 on the CPU, so that dtype and device only round and move them."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (mean + std * x).to(self.device, self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * x).to(self.device, self.dtype)

    def integers(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def dual(self, k: int | None, *shape: int, std: float = 1.0) -> Tensor | Dual:
        """(B, ...) with a tangent (k, ...); a plain tensor for k None."""
        x = self.normal(*shape, std=std)
        return x if k is None else Dual(x, self.normal(k, *shape[1:]))


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"cmt_kernels.{op}.cases")


def implementation(op: str, backend: str) -> Callable:
    """The function of one backend, past the dispatch."""
    return getattr(importlib.import_module(f"cmt_kernels.{op}.{backend}"), op)


def backends_on(op: str, device: str) -> list[str]:
    """Backends of `op` that can run here on tensors of this device, fastest first."""
    return available(op, device)


def mutated(op: str) -> tuple[str, ...]:
    return getattr(cases_of(op), "MUTATED", ())


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply f to every tensor of nested arguments, inside a Dual too."""
    return tree_map_only(Tensor, f, tree)


def wide(tree: Any) -> Any:
    """The same numbers in float64."""
    return map_tensors(lambda x: x.double() if x.is_floating_point() else x, tree)


def without_tangents(tree: Any) -> Any:
    """Each Dual replaced by its value."""
    return tree_map(lambda x: x.value if isinstance(x, Dual) else x, tree, is_leaf=lambda x: isinstance(x, Dual))


def outputs(op: str, function: Callable, inputs: dict[str, Any]) -> list[Tensor]:
    """Every tensor one call gives or changes: its results, values before tangents, then the MUTATED arguments."""
    results = function(**inputs)
    found = tree_flatten([results, [inputs[name] for name in mutated(op)]])[0]
    return [y for y in found if y is not None]


def error(y: Tensor, exact: Tensor) -> float:
    """max |y - exact|, in float64; 0 for no elements, NaN if y has one."""
    return (y.double() - exact.double()).abs().max().item() if y.numel() else 0.0


def allowed(yardstick: Tensor, exact: Tensor) -> float:
    """Twice the error of plain torch at its dtype, plus twice what rounding the exact answer to that dtype costs.

    Of one run of plain torch: right for tensors of many numbers that are added up as torch does. `accuracy.limits` is for any.
    """
    return 2 * (error(yardstick, exact) + error(exact.to(yardstick.dtype), exact))
