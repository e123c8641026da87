"""One Triton kernel at one compile-time variant: a row of the gates that compile every kernel without a GPU."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    instruction: str | None = None
