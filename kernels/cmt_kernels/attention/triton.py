"""attention in Triton: the value and its tangent in one pass over the keys, the backward of the value alone.

Two launches at most: rows [0, k) with their tangent, rows [k, B) with the kernel of a plain call, whose value is
bitwise the other's (triton_kernels.py). So rows without a tangent keep the plain kernel's registers and occupancy.
qkv is read where it lies, whatever its strides; the backward writes dq, dk and dv into one packed tensor.

Of a plain call under `no_grad` (a teacher's rollout, a sampler) `primal` may choose a faster library by measurement. In
grad mode it never does unless `CMT_ATTENTION` says so: there the value of a Dual must be bitwise the plain value.
"""

import torch
from torch import Tensor

from cmt_kernels import assembler
from cmt_kernels.attention import primal
from cmt_kernels.dual import Dual
from cmt_kernels.gate import Gate

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDEST = 256
# T -> head dims at which ptxas 12.8.93 made wrong code for sm_90, and others of their kind: few tokens, a split head dim
SMALL = {16: (32, 36, 40, 48, 96), 33: (36,), 64: (36, 72, 80), 77: (36, 72), 100: (72,), 1024: (64, 72)}


def unavailable(device: str) -> str | None:
    return assembler.refusal(assembler.card()) if device == "cuda" else None


def attention(qkv: Tensor | Dual) -> Tensor | Dual:
    if isinstance(qkv, Dual):
        o, o_dot, _ = torch.ops.cmt.attention(qkv.value, qkv.tangent)
        return Dual(o, o_dot)
    name = primal.forced()
    if name is None and qkv.is_cuda and not torch.is_grad_enabled():
        return torch.ops.cmt.attention_measured(qkv)
    return primal.LIBRARIES[name or "triton"](qkv)


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


def _aligned(d: int, *tensors: Tensor) -> bool:
    """Whether every row of every head begins at a multiple of 16 bytes and has adjacent columns."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and d * x.element_size() % 16 == 0
        and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def _check(qkv: Tensor) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: qkv is (B, T, 3, H, d), not {tuple(qkv.shape)}")
    if qkv.dtype not in TYPES:
        raise ValueError(f"attention: the Triton kernels take {', '.join(map(str, TYPES))}, not {qkv.dtype}")
    if qkv.shape[4] > WIDEST:
        raise ValueError(f"attention: the Triton kernels take head dims up to {WIDEST}, not {qkv.shape[4]}")


def _launch(name: str, count: int, d: int, dtype: torch.dtype, arguments: dict) -> None:
    """Run kernel `name` over count (row, head) pairs."""
    from cmt_kernels.attention import triton_kernels

    d0, d1 = columns(d, dtype)
    tile = tiles(name, d, dtype, arguments["T"])
    block = tile["BN" if name == "backward_kv" else "BM"]
    grid = (-(-arguments["T"] // block) * count,)
    if grid[0]:
        getattr(triton_kernels, name)[grid](**arguments, D0=d0, D1=d1, **tile)


def _forward(qkv: Tensor, qkv_dot: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(qkv)
    b, t, _, h, d = qkv.shape
    o = qkv.new_empty(b, t, h * d)
    lse = qkv.new_empty(b, h, t, dtype=torch.float32)
    k, o_dot = 0, qkv.new_empty(0, t, h * d)
    if qkv_dot is not None:
        if qkv_dot.dtype != qkv.dtype or qkv_dot.shape[1:] != qkv.shape[1:] or len(qkv_dot) > b:
            raise ValueError(
                f"attention: the tangent is {qkv_dot.dtype} {tuple(qkv_dot.shape)}, "
                f"the value {qkv.dtype} {tuple(qkv.shape)}"
            )
        k, o_dot = len(qkv_dot), qkv.new_empty(len(qkv_dot), t, h * d)
    for first, rows, dual in ((0, k, True), (k, b - k, False)):
        z, z_out = (qkv_dot, o_dot) if dual and k else (qkv, o)
        arguments = {"qkv": qkv, "qkv_dot": z, "o": o, "o_dot": z_out, "lse": lse, "first": first}
        arguments |= {"s_b": qkv.stride(0), "z_b": z.stride(0), "T": t, "H": h, "d": d}
        arguments |= dict(zip(("S_T", "S_3", "S_H", "S_D"), qkv.stride()[1:]))
        arguments |= dict(zip(("Z_T", "Z_3", "Z_H", "Z_D"), z.stride()[1:]))
        arguments |= {"ALIGNED": _aligned(d, qkv, z), "DUAL": dual}
        _launch("forward", rows * h, d, qkv.dtype, arguments)
    return o, o_dot, lse


@torch.library.custom_op("cmt::attention", mutates_args=())
def _attention(qkv: Tensor, qkv_dot: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, T, H d), its tangent (k, T, H d), and lse (B, H, T) fp32, in powers of two."""
    return _forward(qkv, qkv_dot)


@torch.library.custom_op("cmt::attention_backward", mutates_args=())
def _backward(qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor) -> Tensor:
    """dqkv (B, T, 3, H, d) contiguous, from do (B, T, H d)."""
    b, t, _, h, d = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    do = do.to(qkv.dtype)
    arguments = {"qkv": qkv, "lse": lse, "do": do, "dqkv": dqkv, "delta": torch.empty_like(lse)}
    arguments |= {"s_b": qkv.stride(0), "g_b": do.stride(0), "T": t, "H": h, "d": d}
    arguments |= dict(zip(("S_T", "S_3", "S_H", "S_D"), qkv.stride()[1:]))
    arguments |= {"G_T": do.stride(1), "G_D": do.stride(2), "ALIGNED": _aligned(d, qkv, do)}
    _launch("backward_q", b * h, d, qkv.dtype, arguments | {"o": o})
    _launch("backward_kv", b * h, d, qkv.dtype, arguments)
    return dqkv


@_attention.register_fake
def _(qkv: Tensor, qkv_dot: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _, h, d = qkv.shape
    k = 0 if qkv_dot is None else qkv_dot.shape[0]
    return qkv.new_empty(b, t, h * d), qkv.new_empty(k, t, h * d), qkv.new_empty(b, h, t, dtype=torch.float32)


@_backward.register_fake
def _(qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output) -> None:
    o, o_dot, lse = output  # neither the tangent nor lse has a gradient, and the tangent is not kept
    ctx.mark_non_differentiable(o_dot, lse)
    ctx.save_for_backward(inputs[0], o, lse)


def _gradient(ctx, do: Tensor, *_) -> tuple[Tensor, None]:
    return torch.ops.cmt.attention_backward(*ctx.saved_tensors, do), None


_attention.register_autograd(_gradient, setup_context=_save)


def gates() -> list[Gate]:
    """Every kernel in bf16 and fp32 at the head dims of real runs, for T = 256, and for a T that needs masks; SMALL on sm_90.

    One is left out, because it spills at every tile (300 bytes on sm_90 at the best): the dual forward in float32 at head
    dim 128, where a thread holds a row of q and of its tangent, 256 numbers. It runs, slowly.
    """
    from cmt_kernels.attention import triton_kernels

    rows = []
    for dtype, d, t in (
        *((dtype, d, 256) for dtype in (torch.bfloat16, torch.float32) for d in (64, 72, 80, 96, 128)),
        *((torch.bfloat16, d, 250) for d in (64, 72)),
        *((torch.bfloat16, d, t) for t, dims in SMALL.items() for d in dims),
    ):
        h, (d0, d1) = 12, columns(d, dtype)
        aligned = d * dtype.itemsize % 16 == 0
        for name, dual in (("forward", False), ("forward", True), ("backward_q", None), ("backward_kv", None)):
            if dual and dtype == torch.float32 and d == 128:
                continue
            tile = tiles(name, d, dtype, t)
            constexprs = {"T": t, "H": h, "d": d, "S_T": 3 * h * d, "S_3": h * d, "S_H": d, "S_D": 1}
            constexprs |= {"ALIGNED": aligned, "D0": d0, "D1": d1, "BM": tile["BM"], "BN": tile["BN"]}
            if name == "forward":
                constexprs |= {"Z_T": 3 * h * d, "Z_3": h * d, "Z_H": d, "Z_D": 1, "DUAL": dual}
            else:
                constexprs |= {"G_T": h * d, "G_D": 1}
            kernel = getattr(triton_kernels, name)
            kinds = dict.fromkeys(("qkv", "qkv_dot", "o", "o_dot", "do", "dqkv"), "*" + TYPES[dtype])
            kinds |= {"lse": "*fp32", "delta": "*fp32"}
            number = "i32:16" if t in SMALL else "i32"  # strides of a row of a contiguous batch are multiples of 16
            signature = {a: "constexpr" if a in constexprs else kinds.get(a, number) for a in kernel.arg_names}
            rows.append(
                Gate(
                    f"attention {name}{' dual' * bool(dual)} d{d} T{t} {TYPES[dtype]}",
                    kernel,
                    signature,
                    constexprs,
                    tile["num_warps"],
                    tile["num_stages"],
                    "HGMMA" if dtype == torch.bfloat16 else None,
                    architectures=(90,) if t in SMALL else None,
                )
            )
    return rows
