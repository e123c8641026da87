"""A gate: one compile-time variant of a Triton kernel that has to fit the machine it is meant for.

`cmt_kernels/<op>/triton.py` lists its variants in `gates()`; `python -m bench gates` compiles each for the
architectures we run on, without a GPU, and reads registers, spills and instructions from the cubin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """name: unique in its op; kernel: a `triton.jit` function; signature: run-time argument -> Triton type (`*bf16`,
    `i32`, `i32:16` for a multiple of 16; pointers count as multiples of 16); constexprs: the other arguments;
    instruction: an SASS mnemonic that must appear on sm_90; fp_fusion: as `enable_fp_fusion` of its launches;
    architectures: it is compiled for these alone, None for all."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    instruction: str | None = None
    fp_fusion: bool = True
    architectures: tuple[int, ...] | None = None
