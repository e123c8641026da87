"""Where a Triton kernel runs: on the GPU of its tensors, whichever is the current one.

Triton launches on the current device and its stream. A tensor on another GPU would be read from the wrong one, so every
launch of ours is `placed(op, kernel)[grid](...)`, and a test finds those that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def device_of(op: str, arguments: Iterable[Any]) -> torch.device | None:
    """The one device of the tensors among the arguments, None without any. Raises ValueError if there are two."""
    found = None
    for x in arguments:
        if isinstance(x, Tensor):
            if found is None:
                found, index = x.device, x.get_device()
            elif x.get_device() != index:  # -1 on a CPU
                raise ValueError(f"{op}: its tensors are on two devices, {found} and {x.device}")
    return found


@dataclass(frozen=True)
class placed:
    """A kernel to be launched as Triton's own is, `placed(op, kernel)[grid](...)`, on the device of its tensors.

    Raises ValueError, naming the op, if they are on two.
    """

    op: str
    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            device = device_of(self.op, (*arguments, *named.values()))
            if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
                self.kernel[grid](*arguments, **named)
                return
            with torch.cuda.device(device):
                self.kernel[grid](*arguments, **named)

        return launch
