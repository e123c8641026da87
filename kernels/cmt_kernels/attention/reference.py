"""attention in plain torch: scaled_dot_product_attention for the value, explicit matrices for the tangent.

Torch's fused kernels read 16 bytes at once and do not look whether a tensor begins there: a view that does not, such as
`buffer[1:]`, is a cudaErrorMisalignedAddress, after which the process can use the GPU no more. So what goes in and what
comes back as a gradient is copied where it begins elsewhere. Other ops of torch that we call choose another kernel there.

Torch's fused kernels keep one number a query, logsumexp, and divide by the sum at the end: from logits of about 1e4 on
its rounding is seen in the gradient, of 1e9 it is garbage or infinite, and values near the largest float32 overflow. So
on a CPU such inputs, and infinities and NaN, take softmax itself. On other devices a look at the inputs would make the
host wait, and a compiled graph cannot branch on numbers: there torch's attention is what it is. Where a training stage has
chosen it for few tokens by measurement (small.py), it is softmax itself too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmt_kernels import transforms
from cmt_kernels.attention import small
from cmt_kernels.dual import Dual, tangent_rule, value

IN_CACHE = 2**20  # elements of T x T matrices that a CPU core works on at a time
AT_ONCE = 2**26  # the same of a backward in plain torch, where they are in memory
LOGITS, VALUES = 2.0**12, 1e30  # bounds up to which a fused kernel is asked
LOG2E = 1.4426950408889634
BOUNDARY = 16  # bytes
FUSED = ("cuda",)  # device types on which torch's attention reads BOUNDARY bytes at once


def sdpa(qkv: Tensor) -> Tensor:
    """Torch's attention of (B, T, 3, H, d) wherever it begins in memory: (B, H, T, d), with a gradient."""
    q, k, v = aligned(qkv).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d)
    if transforms.active():  # of torch's own kernels only the unfused one has a forward derivative and a second one
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    o = F.scaled_dot_product_attention(q, k, v)
    if o.requires_grad and _looks_at(o):
        o.register_hook(aligned)
    return o


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where a fused kernel could not read it."""
    return x.clone() if _looks_at(x) and x.data_ptr() % BOUNDARY else x


def _looks_at(x: Tensor) -> bool:
    """Whether the address of x is there to see and matters: a compiler aligns what it is given itself."""
    traced = torch.compiler.is_compiling() or transforms.active()
    return x.device.type in FUSED and not traced


def attention(qkv: Tensor | Dual) -> Tensor | Dual:
    if small.plain(value(qkv)) or _extreme(value(qkv)):
        o = small.formula(*value(qkv).permute(2, 0, 3, 1, 4).unbind(0))  # of (B, H, T, d) each
    else:
        o = sdpa(value(qkv))
    y = o.transpose(1, 2).flatten(2)
    if not isinstance(qkv, Dual):
        return y
    with tangent_rule():
        n, t, _, heads, _ = qkv.tangent.shape
        whole = n == 0 or not qkv.tangent.is_cpu or torch.compiler.is_compiling()
        rows = n if whole else max(1, IN_CACHE // (heads * t * t))
        parts = zip(*(x.split(rows) for x in (qkv.value[:n].detach(), qkv.tangent, o[:n].detach()))) if n else []
        tangents = [_tangent(*part) for part in parts]
        o_dot = tangents[0] if len(tangents) == 1 else torch.cat(tangents) if tangents else torch.zeros_like(o[:0])
        return Dual(y, o_dot.transpose(1, 2).flatten(2))


def _extreme(qkv: Tensor) -> bool:
    """Whether a fused kernel may be wrong about these numbers. False where they cannot be looked at."""
    if type(qkv) is not Tensor or not qkv.is_cpu or torch.compiler.is_compiling() or not qkv.numel():
        return False
    if transforms.active():  # a vmapped number decides nothing
        return False
    bounded = lambda q, k, v: q * k * qkv.shape[-1] ** 0.5 <= LOGITS and v <= VALUES  # so NaN is extreme
    size = _size(qkv)
    if bounded(size, size, size):  # one pass over memory, which is nearly always enough
        return False
    return not bounded(*map(_size, qkv.unbind(2)))


def _size(x: Tensor) -> float:
    """The largest |x|; NaN if there is one."""
    least, most = x.detach().aminmax()
    return max(-least.item(), most.item())


def _tangent(qkv: Tensor, qkv_dot: Tensor, o: Tensor) -> Tensor:
    """qkv, qkv_dot: (n, T, 3, H, d); o: (n, H, T, d) -> (n, H, T, d). S. is one product: [Q. Q] [K K.]^T."""
    n, t, _, h, d = qkv.shape
    (q, k, v), (q_dot, k_dot, v_dot) = (x.permute(2, 0, 3, 1, 4) for x in (qkv, qkv_dot))
    both_q = torch.cat((q_dot, q), dim=-1).flatten(0, 1)  # (n H, T, 2 d)
    both_k = torch.cat((k, k_dot), dim=-1).flatten(0, 1).mT  # (n H, 2 d, T)
    nothing = q.new_zeros(1, 1, 1)  # baddbmm only for its alpha: the scale costs no pass of its own
    p = torch.softmax(torch.baddbmm(nothing, both_q[..., d:], both_k[:, :d], beta=0, alpha=d**-0.5), dim=-1)
    ps_dot = torch.baddbmm(nothing, both_q, both_k, beta=0, alpha=d**-0.5).mul_(p)
    mu = ps_dot.sum(-1, keepdim=True).view(n, h, t, 1)
    o_dot = (p @ v_dot.flatten(0, 1)).baddbmm_(ps_dot, v.flatten(0, 1)).view_as(o)
    return o_dot.sub_(mu * o)


def _rows(qkv: Tensor) -> int:
    """How many rows of the batch at a time."""
    return max(1, AT_ONCE // max(1, qkv.shape[3] * qkv.shape[1] ** 2))


def gradient(qkv: Tensor, do: Tensor) -> Tensor:
    """dqkv (B, T, 3, H, d) from do (B, T, H d), by hand: dS = P (dP - sum of P dP), dP = dO V^T. In float32 at least.

    For the backward of an op, inside of which autograd does not record.
    """
    c, exact = qkv.shape[-1] ** -0.5, torch.promote_types(qkv.dtype, torch.float32)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    for x, g, out in zip(*(whole.split(_rows(qkv)) for whole in (qkv, do, dqkv))):
        q, k, v = x.to(exact).permute(2, 0, 3, 1, 4)  # (b, H, T, d)
        g = g.to(exact).unflatten(2, x.shape[3:]).transpose(1, 2)
        p, dp = small.weights(q, k), g @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        out.copy_(torch.stack((ds @ k * c, ds.mT @ q * c, p.mT @ g)).permute(1, 3, 0, 2, 4))
    return dqkv


def norms(qkv: Tensor) -> Tensor:
    """(B, H, 2, T) float32 of each query: its largest logit q k, and log2 of the sum of exp(c (logit - largest))."""
    b, t, _, h, d = qkv.shape
    found = torch.empty(b, h, 2, t, dtype=torch.float32, device=qkv.device)
    for x, out in zip(qkv.split(_rows(qkv)), found.split(_rows(qkv))):
        q, k, _ = x.to(torch.promote_types(x.dtype, torch.float32)).permute(2, 0, 3, 1, 4)
        s = q @ k.mT
        m = s.amax(-1, keepdim=True)
        l = ((s - m) * (d**-0.5 * LOG2E)).exp2().sum(-1)
        out.copy_(torch.stack((m.squeeze(-1), l.log2()), dim=2))
    return found
