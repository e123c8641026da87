"""The machine that a run is on: its device, and what of it figures depend on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cmt_kernels
import torch
from cmt_kernels import assembler, processor

from cmt_fast import __version__
from cmt_fast.config.errors import ConfigError
from cmt_fast.runtime import distributed


def device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not valid; valid are auto, cpu, cuda, cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not valid; valid are auto, cpu, cuda, cuda:N")
    if found.type == "cpu":
        return found
    if found.index is not None and distributed.local_rank():
        raise ConfigError(f"device: {name!r} is one GPU, and several processes were started; use device=cuda")
    found = torch.device("cuda", distributed.local_rank() if found.index is None else found.index)
    count = torch.cuda.device_count()
    if found.index >= count:
        raise ConfigError(
            f"device: {name!r} is not there for process {distributed.local_rank()}; this machine has {count} CUDA devices"
        )
    allow_tf32(False)
    torch.cuda.set_device(found)  # what is made without a device, and NCCL, go to the current one
    return found


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`allow_tf32` inside, and afterwards what was allowed before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of matmuls and convolutions to 10 bits; torch's own default does for convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def other_kernels() -> str | None:
    """The line for ops that are not those of this version: a distribution cmt-kernels that was installed apart comes first."""
    if cmt_kernels.__version__ == __version__:
        return None
    where = os.path.dirname(cmt_kernels.__file__ or "")
    return (
        f"the ops are those of cmt-kernels {cmt_kernels.__version__} in {where}, this is cmt-fast {__version__}: "
        f"install cmt-kernels {__version__}, or uninstall it and those that cmt-fast carries are taken"
    )


def rounds(device: torch.device) -> list[str]:
    """What two machines must have in common to compute the same bits, or nearly: kind and name, versions, the ops' backends."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    ops = cmt_kernels.table(device.type)
    return [device.type, name, torch.__version__, __version__, *sorted(f"{op} {of}" for op, of in ops.items())]


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the recipe."""
    gpu = torch.cuda.is_available()
    return {
        "cmt_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "assembler": str(assembler.choose(assembler.card())) if gpu else "none",
        "cpu": processor.model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
    }


def commit() -> str:
    """Of the clone that this package stands in, with + where files differ from it; "none" outside of one."""
    git = lambda *what: subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *what], capture_output=True, text=True, check=False
    )
    try:
        head = git("rev-parse", "--short", "HEAD").stdout.strip()
        return head + "+" * bool(git("status", "--porcelain", "-uno").stdout.strip()) if head else "none"
    except OSError:
        return "none"
