"""The machine that a run is on: its device, and what of it figures depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from cmt_fast import __version__, distributed
from cmt_fast.config import ConfigError


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
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise ConfigError(f"device: {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", distributed.local_rank())
        torch.cuda.set_device(found)
    return found


def environment() -> dict[str, str | int]:
    """What a figure depends on besides the recipe."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cmt_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "gpu": accelerator,
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
