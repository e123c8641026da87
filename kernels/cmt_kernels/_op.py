"""The dispatch: which implementation of an op runs. All of it is on this page.

A backend is a module `cmt_kernels/<op>/<backend>.py` with a function of the op's own name. Each op resolves once per
process and kind of device (that of its first tensor), to the first backend that exists, can run there and does not lose
there. `CMT_KERNELS=reference` (or `CMT_KERNELS=attention:triton,gelu:reference`) and `with use("reference"):` force
one; what is forced and cannot run raises and says why: there is no silent fallback.

A backend may say more about itself; `device` is "cpu", "cuda" or "other":

* `unavailable() -> str | None` or `unavailable(device) -> str | None`: why it cannot run. That Triton is installed and
  that a tensor is where Triton or a native kernel could run is known here already;
* `loses(device) -> str | None`: the measurement, in bench/results, in which another backend beat it. It then comes last
  in `available` and runs only when it is asked for.

Under the transforms of `torch.func` and inside `forward_ad.dual_level` the reference runs, whatever `table` says: no
kernel of ours has a rule for them, and the reference is the definition, only slower. A backend that was forced, and one
that is called past the dispatch, raises there. `transforms.py` tells when.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cmt_kernels import assembler, transforms
from cmt_kernels.dual import Dual, value

ORDER = ("native", "triton", "torch", "apex", "reference")
DEVICES = ("cpu", "cuda", "other")
TRANSFORMED = "under a transform"  # in place of a device: the tensors of torch.func and forward AD, wherever they are
OPS = tuple(sorted(p.parent.name for p in Path(__file__).parent.glob("*/reference.py")))

# device -> op -> [name, function], empty until the op first runs there
_resolved: dict[str, dict[str, list]] = {device: {op: [] for op in OPS} for device in (*DEVICES, TRANSFORMED)}
_forced: str | None = os.environ.get("CMT_KERNELS") or None


def _misplaced(name: str, device: str) -> str | None:
    """Why no op has this backend on this device, whatever its module says."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "triton" and device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"Triton kernels do not run on {device} tensors (on a CPU: only under TRITON_INTERPRET=1)"
    if name == "native" and device == "other":
        return "native kernels run on cpu and cuda tensors"
    return None


def _load(op: str, name: str, device: str) -> tuple[Callable | None, str, bool]:
    """(the backend's function, "", does it lose) or (None, the reason why it cannot run, False)."""
    if importlib.util.find_spec(f"cmt_kernels.{op}.{name}") is None:
        return None, f"there is no {name} backend of {op}", False
    reason = _misplaced(name, device)
    if reason:
        return None, reason, False
    if name == "triton" and device == "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        assembler.choose(assembler.card())  # before Triton compiles anything
    module = importlib.import_module(f"cmt_kernels.{op}.{name}")
    unavailable = getattr(module, "unavailable", lambda: None)
    reason = unavailable(device) if inspect.signature(unavailable).parameters else unavailable()
    if reason:
        return None, reason, False
    return getattr(module, op), "", bool(getattr(module, "loses", lambda device: None)(device))


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


def _resolve(op: str, device: str) -> None:
    """Fill `_resolved[device][op]` if it is empty."""
    if _resolved[device][op]:
        return
    name = _wanted(op)
    if device == TRANSFORMED and name not in (None, "reference"):
        transforms.refuse(op, name)
    name = name or ("reference" if device == TRANSFORMED else available(op, device)[0])
    function, reason, _ = _load(op, name, device)
    if function is None:
        raise RuntimeError(f"CMT_KERNELS asks for {name} of {op}: {reason}")
    _resolved[device][op] += (name, function)


# torch.compile cannot trace an import, so it runs this while it traces. What torch.compiler.assume_constant_result
# sets; that imports all of torch._dynamo, and Triton with it.
_resolve._dynamo_marked_constant = True


def _kind(device: str | None) -> str:
    """The kind of device meant: by default a GPU where there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device if device in DEVICES else "other"


def backend(op: str, x: Tensor | Dual | None = None) -> Callable:
    """The function that runs for `op` where the tensor x is; by default on this machine's GPU or else its CPU.

    The reference while a transform is active. Raises RuntimeError if a forced backend cannot run.
    """
    device = TRANSFORMED if transforms.active() else _kind(None if x is None else value(x).device.type)
    _resolve(op, device)
    return _resolved[device][op][1]


def available(op: str, device: str | None = None) -> list[str]:
    """Names of the backends of `op` that can run on a device, fastest first: the first is what runs unforced."""
    can_run = {name: _load(op, name, _kind(device)) for name in ORDER}
    return sorted((name for name in ORDER if can_run[name][0] is not None), key=lambda name: can_run[name][2])


def table(device: str | None = None) -> dict[str, str]:
    """op -> backend that runs on a device, outside of transforms; printed at the start of a run and stored with it."""
    device = _kind(device)
    for op in OPS:
        _resolve(op, device)
    return {op: _resolved[device][op][0] for op in OPS}


def without_native(device: str | None = None) -> str | None:
    """The line that a start says where no op is native on a device though it could be: why, and what computes instead.

    None where they are native, or where CMT_KERNELS or `use` chose.
    """
    from cmt_kernels import _native

    device = _kind(device)
    reason = None if _forced or device == "other" else _native.unavailable(device)
    if not reason:
        return None
    chosen = table(device)
    instead = [f"{op} {chosen[op]}" for op in OPS if importlib.util.find_spec(f"cmt_kernels.{op}.native")]
    return f"no native ops: {reason}. Instead: {', '.join(instead)}"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend inside a `with`: `use("reference")` or `use("attention:triton")`."""
    global _forced
    chosen = [chosen for ops in _resolved.values() for chosen in ops.values()]
    before, kept = _forced, [list(c) for c in chosen]
    _forced = name
    for c in chosen:
        c.clear()
    try:
        yield
    finally:
        _forced = before
        for c, k in zip(chosen, kept):
            c[:] = k


@contextlib.contextmanager
def through(wrap: Callable[[str, Callable], Callable], device: str, ops: Iterable[str] = OPS) -> Iterator[None]:
    """Inside a `with`, the function f of each of these ops runs as wrap(op, f) on a device: how a profiler sees them.

    A network that was compiled outside must not run inside with its own ops among them: it would be compiled anew.
    """
    device = _kind(device)
    kept = {}
    for op in ops:
        _resolve(op, device)
        kept[op] = list(_resolved[device][op])
        _resolved[device][op][1] = wrap(op, kept[op][1])
    try:
        yield
    finally:
        for op, chosen in kept.items():
            _resolved[device][op][:] = chosen
