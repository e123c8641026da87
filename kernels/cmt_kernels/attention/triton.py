"""attention in Triton: the value and its tangent in one pass over the keys, the backward of the value alone.

Two launches at most: rows [0, k) with their tangent, rows [k, B) with the kernel of a plain call, whose value is
bitwise the other's (triton_kernels.py). So rows without a tangent keep the plain kernel's registers and occupancy.

Of a plain call under `no_grad` (a teacher's rollout, a sampler) `primal` may choose a faster library by measurement. In
grad mode it never does unless `CMT_ATTENTION` or a stage without tangents says so (`small.using`): elsewhere the value of a
Dual must be bitwise the plain value.

No kernel computes a shape on a GPU before it has agreed with float64 there: `proof` chooses among the candidates of
`triton_launches`, and where none is right both ops are plain torch (reference.py).
"""

import torch
from torch import Tensor

from cmt_kernels import assembler, transforms
from cmt_kernels.attention import primal, proof, reference, small, triton_launches
from cmt_kernels.dual import Dual
from cmt_kernels.gate import Gate

# T -> head dims at which ptxas 12.8.93 made wrong code for sm_90, and others of their kind: few tokens, a split head dim
SMALL = {16: (32, 36, 40, 48, 96), 33: (36,), 64: (36, 72, 80), 77: (36, 72), 100: (72,), 1024: (64, 72)}


def unavailable(device: str) -> str | None:
    return assembler.refusal(assembler.card()) if device == "cuda" else None


def attention(qkv: Tensor | Dual) -> Tensor | Dual:
    transforms.refuse("attention", "triton")
    if isinstance(qkv, Dual):
        o, o_dot, _ = torch.ops.cmt.attention(qkv.value, qkv.tangent)
        return Dual(o, o_dot)
    name = primal.forced()
    if name is None and qkv.is_cuda and not torch.is_grad_enabled():
        return torch.ops.cmt.attention_measured(qkv)
    return primal.LIBRARIES[name or small.library(qkv)](qkv)


def _plain(qkv: Tensor, qkv_dot: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` gives, in plain torch. From a copy where addresses are odd: torch's own kernels fault on those."""
    x, z = (
        y if y is None or y.data_ptr() % 16 == 0 else y.clone(memory_format=torch.contiguous_format)
        for y in (qkv, qkv_dot)
    )
    with torch.autocast(qkv.device.type, enabled=False):
        y = reference.attention(x if z is None else Dual(x, z))
        o, o_dot = y if isinstance(y, Dual) else (y, y.new_empty(0, *y.shape[1:]))
        return o.contiguous(), o_dot.contiguous(), reference.norms(qkv)


@torch.library.custom_op("cmt::attention", mutates_args=())
def _attention(qkv: Tensor, qkv_dot: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, T, H d), its tangent (k, T, H d), and norms (B, H, 2, T) fp32.

    Of each query the largest logit before the scale, and log2 of the sum of exp(scale (logit - largest)).
    """
    triton_launches.check(qkv, *(() if qkv_dot is None else (qkv_dot,)))
    if qkv_dot is not None and (
        qkv_dot.dtype != qkv.dtype or qkv_dot.shape[1:] != qkv.shape[1:] or len(qkv_dot) > len(qkv)
    ):
        raise ValueError(
            f"attention: the tangent is {qkv_dot.dtype} {tuple(qkv_dot.shape)}, "
            f"the value {qkv.dtype} {tuple(qkv.shape)}"
        )
    chosen = proof.choose("forward", qkv, qkv_dot)
    if chosen is not None:
        return triton_launches.forward(qkv, qkv_dot, chosen)
    return _plain(qkv, qkv_dot)


@torch.library.custom_op("cmt::attention_backward", mutates_args=())
def _backward(qkv: Tensor, o: Tensor, norms: Tensor, do: Tensor) -> Tensor:
    """dqkv (B, T, 3, H, d) contiguous, from do (B, T, H d)."""
    do = do.to(qkv.dtype)
    triton_launches.check(qkv, do)
    chosen = proof.choose("backward", qkv, do)
    if chosen is not None:
        return triton_launches.backward(qkv, o, norms, do, chosen)
    with torch.autocast(qkv.device.type, enabled=False):
        return reference.gradient(qkv, do)


@_attention.register_fake
def _(qkv: Tensor, qkv_dot: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    b, t, _, h, d = qkv.shape
    k = 0 if qkv_dot is None else qkv_dot.shape[0]
    return qkv.new_empty(b, t, h * d), qkv.new_empty(k, t, h * d), qkv.new_empty(b, h, 2, t, dtype=torch.float32)


@_backward.register_fake
def _(qkv: Tensor, o: Tensor, norms: Tensor, do: Tensor) -> Tensor:
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output) -> None:
    o, o_dot, norms = output  # neither the tangent nor norms has a gradient, and the tangent is not kept
    ctx.mark_non_differentiable(o_dot, norms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], o, norms)


@transforms.once("attention")
def _gradient(ctx, do: Tensor | None, *_) -> tuple[Tensor | None, None]:
    if do is None:
        return None, None
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
        h, (d0, d1) = 12, triton_launches.columns(d, dtype)
        aligned = d * dtype.itemsize % 16 == 0
        for name, dual in (("forward", False), ("forward", True), ("backward_q", None), ("backward_kv", None)):
            if dual and dtype == torch.float32 and d == 128:
                continue
            tile = triton_launches.tiles(name, d, dtype, t)
            constexprs = {"T": t, "H": h, "d": d, "S_T": 3 * h * d, "S_3": h * d, "S_H": d, "S_D": 1}
            constexprs |= {"ALIGNED": aligned, "D0": d0, "D1": d1, "BM": tile["BM"], "BN": tile["BN"]}
            if name == "forward":
                constexprs |= {
                    "Z_T": 3 * h * d,
                    "Z_3": h * d,
                    "Z_H": d,
                    "Z_D": 1,
                    "DUAL": dual,
                    "SHIFT": triton_launches.shift(t, dtype),
                }
            else:
                constexprs |= {"G_T": h * d, "G_D": 1}
            kernel = getattr(triton_kernels, name)
            kinds = dict.fromkeys(("qkv", "qkv_dot", "o", "o_dot", "do", "dqkv"), "*" + triton_launches.TYPES[dtype])
            kinds |= {"norms": "*fp32", "delta": "*fp32"}
            number = "i32:16" if t in SMALL else "i32"  # strides of a row of a contiguous batch are multiples of 16
            signature = {a: "constexpr" if a in constexprs else kinds.get(a, number) for a in kernel.arg_names}
            rows.append(
                Gate(
                    f"attention {name}{' dual' * bool(dual)} d{d} T{t} {triton_launches.TYPES[dtype]}",
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
