"""What somebody changed in a process and never put back: functions in the place of others, and settings that numbers depend on.

A stage that leaves something behind changes the next one of the same process, so a run that is stopped and resumed between the
two differs from one that was not. DeepSpeed's stage 3 did: it puts a linear map of its own in the place of torch's for good,
after which gradients are ready in another order, and ranks add them in another. `Process` is what a process is at one moment;
two of them side by side name what differs. It looks at

* every function and class of the modules of WATCHED that are imported already, and every function of those classes;
* settings: default dtype and device, autocast, grad mode, hooks on all modules, deterministic and TF32 switches, threads;
* states of the global random generators: all that is drawn here is a function of seed, stage, step and sample (diffusion/rng.py);
* the environment, the folder, handlers of signals, excepthooks and logging's root.

`Handles` is what grows in a process that forgets to close: files, threads, children, process groups, and its memory.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules import module as hooks

from cmt_fast.runtime import distributed
from cmt_fast.runtime.progress import say

# roots of modules whose functions are looked at: what layers, optimizers and losses call
WATCHED = ("torch", "numpy", "builtins", "random", "math", "os", "json", "cmt_kernels", "cmt_fast")
FEW = (  # of them, what a look of a few milliseconds is at
    "torch", "torch.nn", "torch.nn.functional", "torch.nn.init", "torch.nn.modules.module", "torch.nn.modules.linear",
    "torch.nn.modules.conv", "torch.nn.modules.normalization", "torch.autograd", "torch.autograd.function",
    "torch.autograd.graph", "torch.amp", "torch.utils.checkpoint", "torch.optim.optimizer", "torch.distributed",
    "torch.random", "torch.special", "torch.linalg", "torch.fft", "torch.cuda", "torch.backends.cuda", "builtins", "random",
)  # fmt: skip
SWITCHES: dict[str, Any] = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "anomaly mode": torch.is_anomaly_enabled,
    "autocast cache": torch.is_autocast_cache_enabled,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "precision of matmuls": torch.get_float32_matmul_precision,
    "TF32 in matmuls": lambda: torch.backends.cuda.matmul.allow_tf32,
    "TF32 in convolutions": lambda: torch.backends.cudnn.allow_tf32,
    "cudnn": lambda: (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    "flash attention": torch.backends.cuda.flash_sdp_enabled,
    "memory-efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled,
    "attention by math": torch.backends.cuda.math_sdp_enabled,
    "torch's threads": torch.get_num_threads,
    "small numbers": lambda: bool(
        (torch.tensor([1e-40], device="cpu") * 1.0 != 0).item()
    ),  # False where they are flushed to 0
    "modes of functions": torch._C._len_torch_function_stack,
    "modes of ops": torch._C._len_torch_dispatch_stack,
    "hooks on all modules": lambda: sum(len(getattr(hooks, name)) for name in vars(hooks) if name.endswith("_hooks")),
    "folder": os.getcwd,
    "excepthook": lambda: sys.excepthook,
    "excepthook of threads": lambda: threading.excepthook,
    "trace": lambda: (sys.gettrace(), sys.getprofile()),
    "garbage collection": lambda: (gc.isenabled(), gc.get_threshold()),
    "level of the root logger": lambda: logging.getLogger().level,
    "handlers of the root logger": lambda: tuple(logging.getLogger().handlers),
    "limit of recursion": sys.getrecursionlimit,
}
# what no number here depends on, and loggers and compilers do change for good: it is listed, and no stage's end warns of it
QUIET = (
    "folder", "excepthook", "excepthook of threads", "trace", "garbage collection", "level of the root logger",
    "handlers of the root logger", "limit of recursion", "Python's random generator",
)  # fmt: skip
# beginnings of variables that kernels, and so numbers, depend on
READ = ("CMT_", "OMP_", "MKL_", "CUBLAS_", "CUDNN_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH_", "PYTORCH_")


class Process:
    """What this process is now."""

    def __init__(self, whole: bool = False, modules: Mapping[str, types.ModuleType] | None = None) -> None:
        """whole: every module of WATCHED that is imported, in a tenth of a second, else those of FEW."""
        self.functions = dict(_functions(_chosen(whole) if modules is None else modules))
        self.settings = dict(_settings())
        self.randoms = dict(_randoms())

    def changed(self, later: Process, all_of_it: bool = True) -> list[str]:
        """One line each of what a later look found other than this one, what is new in modules and classes apart.

        all_of_it: else what numbers may depend on alone, and no state of a generator that had none before.
        """
        out = [
            f"{name} is {_told(later.functions.get(name))}, no longer {_told(was)}"
            for name, was in self.functions.items()
            if not _same(was, later.functions.get(name))
        ]
        for kept, now in ((self.settings, later.settings), (self.randoms, later.randoms)):
            for name in sorted(kept.keys() | now.keys()):
                if kept.get(name) != now.get(name) and (all_of_it or _counts(name, kept)):
                    out.append(f"{name}: {_told(kept.get(name))} became {_told(now.get(name))}")
        return out


class Handles(NamedTuple):
    """What a process holds. files: open ones; children: processes; groups: of processes that compute together; memory: resident
    bytes; tensors, events: objects of torch, the latter of CUDA."""

    files: int
    threads: int
    children: int
    groups: int
    memory: int
    tensors: int
    events: int

    @classmethod
    def now(cls) -> Handles:
        """Those of this process: its memory as it is, all else after what nobody refers to is collected."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        gc.collect()
        every = gc.get_objects()
        kinds = [type(x) for x in every]
        mine, group = os.getpid(), dist.is_initialized()
        threads = len(os.listdir(f"/proc/{mine}/task"))
        children = Path(f"/proc/{mine}/task/{mine}/children")
        return cls(
            len(os.listdir(f"/proc/{mine}/fd")) - 1,  # the list's own
            threads,
            len(children.read_text().split()) if children.exists() else 0,
            len(dist.distributed_c10d._world.pg_map) if group else 0,
            resident,
            sum(issubclass(kind, torch.Tensor) for kind in kinds),
            sum(issubclass(kind, torch.cuda.Event) for kind in kinds),
        )


def _counts(name: str, before: Mapping[str, Any]) -> bool:
    """Whether numbers may depend on a setting or a state that has changed."""
    kind, _, rest = name.partition(" ")
    if kind == "variable":
        return rest.startswith(READ)
    return name in before and name not in QUIET and kind != "handler"


def _same(was: Any, now: Any) -> bool:
    """Whether it is the one that it was, or only wrapped by torch once and for all: its own functions for its compiler, as
    the first block that keeps its input alone does, and the `step` of a class of optimizers for its profiler."""
    if now is was:
        return True
    compiler = getattr(now, "__globals__", {}).get("__name__") == "torch._compile"
    hooked = getattr(now, "__wrapped__", None) if compiler or getattr(now, "hooked", False) else None
    return any(x is was for x in (hooked, getattr(now, "_torchdynamo_orig_callable", None)))


def _chosen(whole: bool) -> dict[str, types.ModuleType]:
    """The modules that are looked at, by name."""
    every = list(sys.modules.items())
    if whole:  # torch itself puts the classes of these together as its parts are imported
        ours = lambda name: name.partition(".")[0] in WATCHED and not name.startswith(("torch._C", "torch.compiler"))
        return {name: m for name, m in every if ours(name) and type(m) is types.ModuleType}
    return {name: m for name, m in every if name in FEW and isinstance(m, types.ModuleType)}


def _functions(modules: Mapping[str, types.ModuleType]) -> Iterator[tuple[str, Any]]:
    """Every function and class of modules by its whole name, and every function of those classes."""
    for name, module in modules.items():
        for key, value in list(vars(module).items()):
            if not callable(value):
                continue
            yield f"{name}.{key}", value
            if isinstance(value, type) and value.__module__ == name:
                for inner, own in list(vars(value).items()):
                    if callable(own) or isinstance(own, (staticmethod, classmethod, property)):
                        yield f"{name}.{key}.{inner}", own


def _settings() -> Iterator[tuple[str, Any]]:
    for name, read in SWITCHES.items():
        yield name, read()
    for device in ("cpu", "cuda"):
        yield f"autocast on {device}", torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    torch.autocast_increment_nesting()
    yield "nested autocasts", torch.autocast_decrement_nesting()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM):
        yield f"handler of {number.name}", signal.getsignal(number)
    for key, value in os.environ.items():
        if not key.startswith("TORCHINDUCTOR_"):  # of its cache, said where it is imported
            yield f"variable {key}", value


def _randoms() -> Iterator[tuple[str, Any]]:
    """A number for each state of a generator: states themselves are long."""
    yield "torch's random generator", hash(torch.get_rng_state().numpy().tobytes())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield "CUDA's random generator", hash(torch.cuda.get_rng_state().numpy().tobytes())
    yield "Python's random generator", hash(random.getstate())
    kind, words, *rest = np.random.get_state(legacy=True)
    yield "numpy's random generator", hash((kind, np.asarray(words).tobytes(), *rest))


def _told(x: Any) -> str:
    """What something is, with the module that it is from."""
    if x is None:
        return "nothing"
    where, name = getattr(x, "__module__", None), getattr(x, "__qualname__", None)
    return f"{where}.{name}" if name and where else repr(x)[:80]


@contextlib.contextmanager
def told(stage: str) -> Iterator[None]:
    """Say on the first rank what a stage that ended left behind in this process: a run that is resumed after it would differ."""
    before = Process()
    yield
    left = before.changed(Process(), all_of_it=False)
    if left and distributed.rank() == 0:
        say(
            f"{stage:>8} left behind in this process, so that stages after it may differ in their last bits: {'; '.join(left)}"
        )
