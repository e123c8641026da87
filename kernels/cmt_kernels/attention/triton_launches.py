"""The launches of attention's kernels: their tiles, what they can compute, forward and backward with tiles that were chosen.

qkv is read where it lies, whatever its strides; the backward writes dq, dk and dv into one packed tensor. Whether a launch is
right on this card is not known here: `proof` finds out.
"""

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from cmt_kernels.launch import placed

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDEST = 256
FAR = 2**31  # elements: offsets within a sample, and strides between samples, are 32-bit integers
KERNELS = {"forward": ("forward",), "backward": ("backward_q", "backward_kv")}
Tiles = dict[str, dict[str, int]]  # kernel -> what `tiles` gives


def columns(d: int, dtype: torch.dtype) -> tuple[int, int]:
    """Head dim -> (D0, D1), powers of two of at least 16 (D1 may be 0) with D0 + D1 >= d: 72 -> 64 + 16.

    In float32, where a dot is not the tensor cores' and holds its operands in registers, 128 is 64 + 64.
    """
    first, widest = 16, min(d, 64) if dtype == torch.float32 else d
    while 2 * first <= widest:
        first *= 2
    rest = 16 if d > first else 0
    while rest and first + rest < d:
        rest *= 2
    return first, rest


def tiles(kernel: str, d: int, dtype: torch.dtype, t: int) -> dict[str, int]:
    """Block of queries and of keys, warps and stages of one kernel ("forward", "backward_q", "backward_kv").

    One row for plain and dual forward: the value must not depend on which of them runs. Chosen by registers alone, so
    that nothing of `gates` spills on sm_80, sm_90 or sm_100; none has been timed. At head dim 128, and at 72 and 80
    where T needs masks, it is sm_80 that wants fewer keys a block in the dual forward.
    """
    if dtype == torch.float32:
        return {"BM": 16, "BN": 16, "num_warps": 8, "num_stages": 2}
    wide = 64 if d <= 64 or (d <= 80 and t % 64 == 0) else 32 if d <= 96 else 16
    return {
        "forward": {"BM": 128, "BN": wide, "num_warps": 8, "num_stages": 3},
        "backward_q": {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 2},
        "backward_kv": {"BM": 32 if 80 < d <= 96 else 64, "BN": 64, "num_warps": 4 if d <= 64 else 8, "num_stages": 2},
    }[kernel]


def candidates(kind: str, d: int, dtype: torch.dtype, t: int) -> list[Tiles]:
    """Tiles of the kernels of "forward" or "backward", to try in this order; the first are `tiles`.

    Where those are wrong or do not run: half the keys a block, then blocks of 32, too few rows for wgmma, so that
    mma.sync multiplies, which is older than every assembler in use.
    """
    if dtype == torch.float32:
        others = [{"num_warps": 4, "num_stages": 1}]
    else:
        others = [{"BN": 32}, {"BM": 32, "BN": 32, "num_warps": 4}]
    first = {kernel: tiles(kernel, d, dtype, t) for kernel in KERNELS[kind]}
    found = [first]
    for other in others:
        tried = {kernel: tile | other for kernel, tile in first.items()}
        if tried not in found:
            found.append(tried)
    return found


def versions(device: torch.device) -> str:
    """What the code of a kernel depends on besides its source, the card and torch: Triton and its assembler."""
    import triton

    if device.type != "cuda":
        return f"triton {triton.__version__}, interpreted"
    from triton.backends.nvidia.compiler import get_ptxas_version

    major, minor = torch.cuda.get_device_capability(device)
    found = re.search(r"V(\d+[\d.]*)", get_ptxas_version(10 * major + minor))
    return f"triton {triton.__version__}, ptxas {found[1] if found else 'unknown'}"


def _aligned(d: int, *tensors: Tensor) -> bool:
    """Whether every row of every head begins at a multiple of 16 bytes and has adjacent columns."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and d * x.element_size() % 16 == 0
        and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


@lru_cache
def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first of a sample to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides))


def check(qkv: Tensor, *others: Tensor) -> None:
    """Raises ValueError for what the kernels cannot compute."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: qkv is (B, T, 3, H, d), not {tuple(qkv.shape)}")
    if qkv.dtype not in TYPES:
        raise ValueError(f"attention: the Triton kernels take {', '.join(map(str, TYPES))}, not {qkv.dtype}")
    if qkv.shape[4] > WIDEST:
        raise ValueError(f"attention: the Triton kernels take head dims up to {WIDEST}, not {qkv.shape[4]}")
    for x in (qkv, *others):
        if x.device != qkv.device:
            raise ValueError(f"attention: one tensor is on {qkv.device}, another on {x.device}")
        if max(x.stride(0), _span(x.shape[1:], x.stride()[1:])) >= FAR:
            raise ValueError(f"attention: the Triton kernels take samples of less than 2^31 elements: {tuple(x.shape)}")


def _launch(name: str, count: int, d: int, dtype: torch.dtype, tile: dict[str, int], arguments: dict) -> None:
    """Run kernel `name` over count (row, head) pairs."""
    from cmt_kernels.attention import triton_kernels

    d0, d1 = columns(d, dtype)
    block = tile["BN" if name == "backward_kv" else "BM"]
    grid = (-(-arguments["T"] // block) * count,)
    if grid[0]:
        placed("attention", getattr(triton_kernels, name))[grid](**arguments, D0=d0, D1=d1, **tile)


def shift(t: int, dtype: torch.dtype) -> int:
    """The forward's exponent at the maximum is -SHIFT: 2^-SHIFT <= 1/T. 0 in float16, where p would be denormal."""
    return 0 if dtype == torch.float16 else math.ceil(math.log2(max(t, 1)))


def forward(qkv: Tensor, qkv_dot: Tensor | None, chosen: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, T, H d), o_dot (k, T, H d) and norms (B, H, 2, T) of the kernels with these tiles."""
    b, t, _, h, d = qkv.shape
    o = qkv.new_empty(b, t, h * d)
    norms = qkv.new_empty(b, h, 2, t, dtype=torch.float32)
    k = 0 if qkv_dot is None else len(qkv_dot)
    o_dot = qkv.new_empty(k, t, h * d)
    for first, rows, dual in ((0, k, True), (k, b - k, False)):
        z, z_out = (qkv_dot, o_dot) if dual and k else (qkv, o)
        arguments = {"qkv": qkv, "qkv_dot": z, "o": o, "o_dot": z_out, "norms": norms, "first": first}
        arguments |= {"s_b": qkv.stride(0), "z_b": z.stride(0), "T": t, "H": h, "d": d, "SHIFT": shift(t, qkv.dtype)}
        arguments |= dict(zip(("S_T", "S_3", "S_H", "S_D"), qkv.stride()[1:]))
        arguments |= dict(zip(("Z_T", "Z_3", "Z_H", "Z_D"), z.stride()[1:]))
        arguments |= {"ALIGNED": _aligned(d, qkv, z), "DUAL": dual}
        _launch("forward", rows * h, d, qkv.dtype, chosen["forward"], arguments)
    return o, o_dot, norms


def backward(qkv: Tensor, o: Tensor, norms: Tensor, do: Tensor, chosen: Tiles) -> Tensor:
    """dqkv (B, T, 3, H, d) of the kernels with these tiles."""
    b, t, _, h, d = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = norms.new_empty(b, h, t)
    arguments = {"qkv": qkv, "norms": norms, "do": do, "dqkv": dqkv, "delta": delta}
    arguments |= {"s_b": qkv.stride(0), "g_b": do.stride(0), "T": t, "H": h, "d": d}
    arguments |= dict(zip(("S_T", "S_3", "S_H", "S_D"), qkv.stride()[1:]))
    arguments |= {"G_T": do.stride(1), "G_D": do.stride(2), "ALIGNED": _aligned(d, qkv, do)}
    _launch("backward_q", b * h, d, qkv.dtype, chosen["backward_q"], arguments | {"o": o})
    _launch("backward_kv", b * h, d, qkv.dtype, chosen["backward_kv"], arguments)
    return dqkv


def runner(kind: str, chosen: Tiles) -> Callable[..., tuple[Tensor, ...] | Tensor]:
    """`forward` or `backward` with these tiles."""
    return partial({"forward": forward, "backward": backward}[kind], chosen=chosen)
