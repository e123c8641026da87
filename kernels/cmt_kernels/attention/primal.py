"""Which library computes a plain attention whose value owes nothing to a tangent: measured, not guessed.

Torch's fused backends, flash-attn where it is installed, and our kernel differ by factors that depend on T, the head
dim and the card. `measured` times those that run and are accurate once per (T, d, dtype, device), remembers the order
in this process and in `~/.cache/cmt_fast/attention.json` under the device's name and the versions, and calls the first.
Our kernel is among them only where it has been proven (proof.py).

Their values differ in the last bits. A Dual always takes our kernel, and its value must be bitwise the plain one, so in
grad mode a plain call takes ours too, unless a stage says otherwise; under `no_grad` (teachers, samplers) the measured one
is called. A stage that has no tangents may train by a library: `trained` measures forward and backward of those that torch
has, which must also repeat their bits (a backward that adds atomically does not, and a stage taken up again must be the
same); its answer is the stage's, kept in its checkpoints (`small.using`). Whoever
wants one set of bits everywhere, or across machines, sets `CMT_ATTENTION=triton`; another name forces that library for
every plain call, with its own autograd, and gives the bitwise promise up.
"""

import contextlib
import importlib
import importlib.util
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_kernels import remembered
from cmt_kernels.attention import proof, small
from cmt_kernels.attention.reference import aligned, sdpa
from cmt_kernels.attention.reference import attention as reference
from cmt_kernels.cases import allowed, error

TOKENS = 2**15  # tokens of a timed batch
ROUNDS = 20
HEADS, WORTH = 16, 1.05  # heads of a batch timed for training; how much faster than ours a library must be there

# Under no_grad a student's own target pass (ECT, MeanFlow's guidance) is measured too, so it may run another kernel than the
# training forward, and ranks of one run may choose differently: both differ by rounding. CMT_ATTENTION=triton rules it out.
_remembered: dict[tuple, list[str]] = {}  # (T, d, dtype, device index) -> accurate libraries, fastest first


def _sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(qkv).transpose(1, 2).flatten(2)


def _flash(module: str, qkv: Tensor) -> Tensor:
    """flash-attn of any version: (B, T, H, d) each in, the output alone or first of a tuple out."""
    out = importlib.import_module(module).flash_attn_func(*aligned(qkv).unbind(2))
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


def _triton(qkv: Tensor) -> Tensor:
    return torch.ops.cmt.attention(qkv)[0]


REASONS = "Memory [Ee]fficient|Flash attention|cuDNN attention|Expected query"  # how torch's warnings begin


@contextlib.contextmanager
def _without_reasons() -> Iterator[None]:
    """Torch warns why a library of its own cannot run, six lines of it; that it cannot is in the report."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", REASONS, UserWarning)
        yield


LIBRARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "triton": _triton,
    "sdpa_flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flash_attn_2": partial(_flash, "flash_attn"),
    "flash_attn_3": partial(_flash, "flash_attn_interface"),
    "flash_attn_4": partial(_flash, "flash_attn.cute"),
}


def forced() -> str | None:
    """The library that `CMT_ATTENTION` names, None if it is not set. Raises ValueError for a name that is none."""
    name = os.environ.get("CMT_ATTENTION") or None
    if name and name not in LIBRARIES:
        raise ValueError(f"CMT_ATTENTION names {name!r}; the choices are {', '.join(LIBRARIES)}")
    return name


def cache_file() -> Path:
    return remembered.path("attention.json")


def machine(device: torch.device) -> str:
    """What an order of libraries is true for: the card and every version that could change it."""
    versions = [f"torch {torch.__version__}"]
    for package in ("triton", "flash_attn", "flash_attn_interface"):
        if importlib.util.find_spec(package) is not None:
            versions.append(f"{package} {getattr(importlib.import_module(package), '__version__', 'unknown')}")
    return ", ".join([torch.cuda.get_device_name(device), *versions])


def _milliseconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _forward(library: Callable[[Tensor], Tensor], qkv: Tensor) -> list[Tensor]:
    return [library(qkv)]


def _with_gradient(library: Callable[[Tensor], Tensor], qkv: Tensor) -> list[Tensor]:
    """[o, dqkv] along do = v."""
    with torch.enable_grad():
        qkv = qkv.detach().requires_grad_()
        o = library(qkv)
        return [o.detach(), torch.autograd.grad(o, qkv, qkv[:, :, 2].flatten(2).detach().to(o.dtype))[0]]


def measure(
    t: int,
    h: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    milliseconds: Callable = _milliseconds,
    gradient: bool = False,
) -> tuple[list[str], dict[str, float | str]]:
    """The libraries that run and err no more than the op's rule allows, fastest first; and each one's median or fault.

    Inputs are (B, T, 3, H, d) with about 2^15 tokens, random; libraries take turns, so that a clock's drift is shared.
    gradient: forward and backward of those in `small.TRAINED`, which every torch has, which must repeat their bits.
    """
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(max(1, TOKENS // t), t, 3, h, d, generator=generator, device=device).to(dtype)
    few = qkv[: max(1, min(len(qkv), 2**24 // (h * t * t)))]
    call = _with_gradient if gradient else _forward
    exact, yardstick = call(reference, few.double()), call(reference, few)
    most = [allowed(plain, truth) for plain, truth in zip(yardstick, exact)]
    report: dict[str, float | str] = {}
    times: dict[str, list[float]] = {}
    for name, library in LIBRARIES.items():
        if gradient and name not in small.TRAINED:
            continue
        try:
            with _without_reasons():
                found = call(library, few)
                wrong = [error(y, truth) for y, truth in zip(found, exact)]
                repeats = not gradient or all(map(torch.equal, call(library, few), found))
                call(library, qkv)
            refused = proof.refusal(few) if name == "triton" else None
        except Exception as fault:  # a library that cannot run here is no candidate; why is kept in the report
            report[name] = f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"
            continue
        if refused:
            report[name] = refused  # it was plain torch that ran under its name
        elif not repeats:
            report[name] = "does not repeat its bits"
        elif all(x <= limit for x, limit in zip(wrong, most)):
            times[name] = []
        else:
            x, limit = next((x, limit) for x, limit in zip(wrong, most) if not x <= limit)
            report[name] = f"errs by {x:.1e}, more than {limit:.1e}"
    for _ in range(ROUNDS):
        for name, seen in times.items():
            seen.append(milliseconds(lambda library=LIBRARIES[name]: call(library, qkv)))
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    return sorted(medians, key=medians.__getitem__), report | medians


def order(t: int, h: int, d: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Libraries fit for this call, fastest first: from memory, from the cache, or measured now."""
    key = (t, d, dtype, device.index)
    if key not in _remembered:
        here, label = machine(device), f"T{t}-d{d}-{str(dtype).removeprefix('torch.')}"
        kept = remembered.read(cache_file(), here).get(label)
        if kept is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return ["triton"]  # nothing can be timed inside a graph; not remembered
            names, report = measure(t, h, d, dtype, device)
            kept = {"order": names, "report": report}
            remembered.keep(cache_file(), here, label, kept)
        _remembered[key] = kept["order"] or ["triton"]
    return _remembered[key]


def trained(t: int, d: int, dtype: torch.dtype, device: torch.device, milliseconds: Callable = _milliseconds) -> str:
    """Which library trains rows without tangents: ours unless another that repeats its bits is WORTH times as fast."""
    here, label = machine(device), f"T{t}-d{d}-{str(dtype).removeprefix('torch.')}-trained"
    kept = remembered.read(cache_file(), here).get(label)
    if kept is None:
        names, report = measure(t, HEADS, d, dtype, device, milliseconds, gradient=True)
        kept = {"order": names, "report": report}
        remembered.keep(cache_file(), here, label, kept)
    names, report = kept["order"], kept["report"]
    if not names or "triton" in names and report["triton"] < WORTH * report[names[0]]:
        return "triton"
    return names[0]


def table() -> dict[str, str]:
    """(T, d, dtype, device) -> library of the calls measured so far, to be stored with a run."""
    return {
        f"T{t} d{d} {str(dtype).removeprefix('torch.')} cuda:{i}": x[0] for (t, d, dtype, i), x in _remembered.items()
    }


@torch.library.custom_op("cmt::attention_measured", mutates_args=())
def measured(qkv: Tensor) -> Tensor:
    """qkv: (B, T, 3, H, d) on a CUDA device -> (B, T, H d), by the fastest library; no gradient."""
    _, t, _, h, d = qkv.shape
    with proof.alone():
        return LIBRARIES[order(t, h, d, qkv.dtype, qkv.device)[0]](qkv).contiguous()


@measured.register_fake
def _(qkv: Tensor) -> Tensor:
    b, t, _, h, d = qkv.shape
    return qkv.new_empty(b, t, h * d)
