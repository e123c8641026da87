"""The native extension: one library of `torch.ops.cmt.*`, built from csrc by `build.py`, loaded when an op asks for it.

It holds CPU kernels for every instruction set of the build (chosen when the first op runs; `CMT_ISA` forces one) and,
where nvcc was found, CUDA kernels. It links against torch's stable ABI and no Python, so a library built beside one
torch or Python loads beside another. `CMT_NATIVE_LIBRARY` names another build of it, for tests.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cmt_kernels import transforms

LIBRARY = Path(os.environ.get("CMT_NATIVE_LIBRARY") or Path(__file__).parent / "cmt_native.so")
RECORD = LIBRARY.with_name("build.json")
FUSED = ("modulated_norm", "gated_residual")  # where torch.compile's own fusion is faster, see `covers`
CSRC = Path(__file__).resolve().parents[3] / "csrc"  # in a checkout; an installed package has none
BUILD = (
    "`python -m cmt_kernels._native.build` builds it"
    if CSRC.is_dir()
    else "an install from the sources builds it where torch and a C++ compiler are, and shows how by `pip install -v`"
)


def record() -> dict:
    """What the last build wrote, above all `line`: what was built and why."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def stale() -> str | None:
    """Why the library is not loaded although it is there: it is not that of build.json, or not of the checkout's sources.

    One that CMT_NATIVE_LIBRARY names is not asked.
    """
    if "CMT_NATIVE_LIBRARY" in os.environ:
        return None
    from cmt_kernels._native import build

    made = record()
    if made.get("library") != build.checksum(LIBRARY):
        return f"{LIBRARY.name} is not the library that {RECORD.name} beside it tells of: {BUILD}"
    if CSRC.is_dir() and made.get("sources") != build.sources():
        return f"{LIBRARY.name} was built from other sources than those now in {CSRC}: {BUILD}"
    return None


devices: tuple[str, ...] = ()  # device types that the loaded library has kernels for and can launch them on
NO_STREAM = (
    "the native extension has CUDA kernels but finds no CUDA stream to launch them on: torch {} has loaded no "
    "libtorch_cuda.so with aoti_torch_get_current_cuda_stream"
)


@functools.cache
def _load() -> str | None:
    """Load the library and fill `devices`; or why it cannot be."""
    global devices
    if not LIBRARY.exists():
        why = record().get("line", "").removeprefix("not built: ")
        return f"the native extension is not built{f' ({why})' if why else ''}: {BUILD}"
    if reason := stale():
        return reason
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as failure:
        return f"{LIBRARY.name} does not load beside torch {torch.__version__}: {failure}"
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    devices = tuple(device for device in ("cpu", "cuda") if has("cmt::gelu", device.upper()))
    if not _finds_cuda_stream():
        devices = tuple(device for device in devices if device != "cuda")
    return None


def _finds_cuda_stream() -> bool:
    """Whether the loaded library found the function that tells torch's current CUDA stream (csrc/cuda_stream.h)."""
    return bool(ctypes.CDLL(str(LIBRARY)).cmt_finds_cuda_stream())


def _no_kernels(device: str) -> str:
    """Why no native op computes on a device that is not in `devices`."""
    if reason := _load():
        return reason
    if device == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key("cmt::gelu", "CUDA"):
        return NO_STREAM.format(torch.__version__)
    return f"the native extension has no kernels for {device} ({record().get('line', 'build.json is gone')}): {BUILD}"


def unavailable(device: str | None = None) -> str | None:
    """Why no native op can run on tensors of this kind of device, or None. Loads the library.

    By default the device of the machine: where there is a GPU, a library without CUDA kernels is none.
    """
    reason = _load()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return reason if reason or device in devices else _no_kernels(device)


def covers(x: Tensor, op: str) -> bool:
    """Whether the kernels compute with x: float32 and bfloat16. False for float64, the dtype of the tests' oracle, where
    a native op is its reference by definition; and False for the ops in FUSED where bfloat16 on a CPU is being compiled:
    Inductor fuses plain torch into something faster there (bench/results/cpu/ops.json). Raises TypeError for another
    dtype and RuntimeError for another device.
    """
    if x.device.type not in devices:
        raise RuntimeError(f"{op}: {_no_kernels(x.device.type)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(
            f"{op}: the native kernels take float32 and bfloat16, not {x.dtype}; CMT_KERNELS={op}:reference"
        )
    beaten = op in FUSED and x.dtype == torch.bfloat16 and x.is_cpu and torch.compiler.is_compiling()
    return x.dtype != torch.float64 and not beaten


def wide(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it, in float32: master weights are, and a cast goes through autograd."""
    return None if parameter is None else parameter.float()


def like(m: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation vector, a branch or a tangent in the dtype of x, as the reference casts them."""
    return None if m is None else m.to(x.dtype)


def beside(other: Tensor, stream: Tensor) -> bool:
    """Whether the kernels take such a pair: both in one dtype, or bf16 beside a residual stream in fp32."""
    return other.dtype == stream.dtype or (other.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


_functions: dict[str, type[torch.autograd.Function]] = {}


def call(name: str, *arguments):
    """`torch.ops.cmt.<name>`, in eager code without the Python that torch.library puts around an op with a gradient.

    That costs some 50 microseconds a call, most of what a small op takes; the gradient is the same function's.
    """
    transforms.refuse(name, "native")
    op = getattr(torch.ops.cmt, name)
    if torch.compiler.is_compiling():
        return op(*arguments)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return _functions[name].apply(*arguments)
    return below_autograd(op, *arguments)


def below_autograd(op: Callable, *arguments):
    """An op's kernel, past its registered gradient. Raises torch.OutOfMemoryError where memory ends."""
    with torch._C._AutoDispatchBelowAutograd():
        try:
            return op(*arguments)
        except RuntimeError as failure:
            raise told(failure) from None


def told(failure: RuntimeError) -> RuntimeError:
    """The error as torch's own ops raise it: the library learns that an allocation failed (csrc/tensors.h), not why."""
    text = next((line for line in str(failure).splitlines() if "cmt: not allocated" in line), None)
    if text is None:
        return failure
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as earlier:  # no memory is missing: the GPU had failed before
            return earlier
    return torch.OutOfMemoryError(f"out of memory: {text.partition('not allocated: ')[2]}; torch's own words are above")


def _function(name: str, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The registered gradient as an autograd function."""

    def forward(ctx, *arguments):  # with the context in it: a setup_context of its own makes `apply` slow
        out = below_autograd(getattr(torch.ops.cmt, name), *arguments)
        setup_context(ctx, arguments, out)
        return out

    members = {"forward": forward, "backward": backward}
    return type(name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in members.items()})


def _told(backward: Callable) -> Callable:
    """A gradient whose errors are `told`."""

    @functools.wraps(backward)
    def gradient(ctx, *grads):
        try:
            return backward(ctx, *grads)
        except RuntimeError as failure:
            raise told(failure) from None

    return gradient


def register(name: str, fake: Callable, setup_context: Callable, backward: Callable, backward_fake: Callable) -> None:
    """Shapes and gradient of `cmt::<name>`; `cmt::<name>_backward` has no gradient and says so."""

    def no_context(ctx, inputs, output) -> None:
        pass

    def no_second(ctx, *grads):
        raise NotImplementedError(f"cmt::{name} has no second derivative; CMT_KERNELS={name}:reference has")

    def keep(ctx, inputs, output) -> None:  # no zeros are made for the gradients of a tangent and of statistics
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def gradient(ctx, grad, *others):
        return (None,) * len(ctx.needs_input_grad) if grad is None else backward(ctx, grad, *others)

    given = transforms.once(name)(_told(gradient))
    _functions[name] = _function(name, keep, given)
    torch.library.register_fake(f"cmt::{name}", fake)
    torch.library.register_autograd(f"cmt::{name}", given, setup_context=keep)
    torch.library.register_fake(f"cmt::{name}_backward", backward_fake)
    torch.library.register_autograd(f"cmt::{name}_backward", no_second, setup_context=no_context)
