"""Networks without memory: built to be counted, on the meta device, where drawing numbers would import a compiler for seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cmt_fast.models.shapes import Shapes

# what puts numbers into a tensor: methods, and the functions of torch.nn.init
WRITES = {"normal_", "uniform_", "erfinv_", "clamp_", "fill_", "zero_", "mul_", "add_", "copy_"}
WRITES |= {"zeros_", "ones_", "constant_", "trunc_normal_"}
WRITES |= {f"{family}_{kind}_" for family in ("xavier", "kaiming") for kind in ("uniform", "normal")}


class _NoDraws(TorchFunctionMode):
    """Tensors keep their shapes and get no numbers."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in WRITES:
            return args[0] if args else kwargs["tensor"]
        if func is torch.Tensor.mul and isinstance(args[1], (int, float)):
            return args[0]
        return (torch.empty if func in (torch.randn, torch.rand) else func)(*args, **kwargs)


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Inside: modules are built with shapes alone; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]), _NoDraws(), Shapes(), torch.device("meta"):
        yield
