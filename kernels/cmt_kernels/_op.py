"""The dispatch: which implementation of an op runs. All of it is on this page.

A backend is a module `cmt_kernels/<op>/<backend>.py` with a function of the op's own name. Each op
resolves once per process, to the first backend that exists and can run here. `CMT_KERNELS=reference`
(or `CMT_KERNELS=attention:triton,gelu:reference`) and `with use("reference"):` force one; what is
forced and cannot run raises and says why: there is no silent fallback.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ORDER = ("native", "triton", "torch", "apex", "reference")
OPS = tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/reference.py")))

_resolved: dict[str, list] = {op: [] for op in OPS}  # op -> [name, function], empty until the op first runs
_forced: str | None = os.environ.get("CMT_KERNELS") or None


def _exists(op: str, name: str) -> bool:
    return importlib.util.find_spec(f"cmt_kernels.{op}.{name}") is not None


def _load(op: str, name: str) -> tuple[Callable | None, str]:
    """The backend's function, or None and the reason. A module may define `unavailable() -> str | None`."""
    if not _exists(op, name):
        return None, f"there is no {name} backend of {op}"
    module = importlib.import_module(f"cmt_kernels.{op}.{name}")
    reason = getattr(module, "unavailable", lambda: None)()
    return (None, reason) if reason else (getattr(module, op), "")


def _wanted(op: str) -> str | None:
    """What CMT_KERNELS or use() asks of this op: `name` for every op, `op:name` for one."""
    wanted = None
    for part in (_forced or "").split(","):
        key, _, name = part.strip().rpartition(":")
        if key and key not in OPS:
            raise ValueError(f"CMT_KERNELS names the op {key!r}; the ops are {', '.join(OPS)}")
        if part and name not in ORDER:
            raise ValueError(f"CMT_KERNELS names the backend {name!r}; the backends are {', '.join(ORDER)}")
        if name and key in ("", op):
            wanted = name
    return wanted


@torch.compiler.assume_constant_result
def _resolve(op: str) -> None:
    """Fill `_resolved[op]` if it is empty. torch.compile cannot trace an import, so it runs this while it traces."""
    if _resolved[op]:
        return
    wanted = _wanted(op)
    for name in (wanted,) if wanted else ORDER:
        function, reason = _load(op, name)
        if function is not None:
            _resolved[op] += (name, function)
            break
        if wanted:
            raise RuntimeError(f"CMT_KERNELS asks for {wanted} of {op}: {reason}")


def backend(op: str) -> Callable:
    """The function that runs for `op` on this machine. Raises RuntimeError if a forced backend cannot run."""
    _resolve(op)
    return _resolved[op][1]


def available(op: str) -> list[str]:
    """Names of the backends of `op` that can run here, fastest first."""
    return [name for name in ORDER if _load(op, name)[0] is not None]


def table() -> dict[str, str]:
    """op -> backend that runs here; printed at the start of a run and stored with it."""
    for op in OPS:
        backend(op)
    return {op: _resolved[op][0] for op in OPS}


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend inside a `with`: `use("reference")` or `use("attention:triton")`."""
    global _forced
    before, kept = _forced, {op: list(chosen) for op, chosen in _resolved.items()}
    _forced = name
    for chosen in _resolved.values():
        chosen.clear()
    try:
        yield
    finally:
        _forced = before
        for op, chosen in _resolved.items():
            chosen[:] = kept[op]
