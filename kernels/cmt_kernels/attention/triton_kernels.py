"""The Triton kernels of attention: forward with or without its tangent, and the backward of the value.

A head dim is read as columns [0, D0) and, where D1 > 0, [D0, D0 + D1): both powers of two, what lies past `d` masked.
So 72 costs 80 columns, not 128. The strides inside a sample are compile-time constants: Triton specialises a runtime
integer on divisibility by 16 alone, which 72 is not, and would load two bytes at a time.

The value of `forward` is bitwise the same with DUAL as without: the same tiles, the same operations in the same order,
and every multiply-add of it spelled as one fma, so that no compiler chooses where to contract.

Both column tiles of an operand are loaded before the first product that reads either. With a load between the two
products of one accumulator ptxas 12.8.93, the assembler of Triton 3.6 and 3.7, builds the second one's wgmma descriptor
from a register that no path has written: values and gradients off by 7 to 50 % at T < 100 (H100, 2026-11-26).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least finite float32: the maximum of no logits, and of -inf alone


@triton.jit
def sample(pointer, b, h, s_b, S_H: tl.constexpr, ALIGNED: tl.constexpr):
    """Where head h of row b begins. ALIGNED: that address is a multiple of 16 bytes for every b and h."""
    at = pointer + b.to(tl.int64) * s_b + h * S_H
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def load(
    base,
    start,
    T: tl.constexpr,
    d: tl.constexpr,
    S_T: tl.constexpr,
    S_D: tl.constexpr,
    R: tl.constexpr,
    C0: tl.constexpr,
    C: tl.constexpr,
):
    """Rows [start, start + R), columns [C0, C0 + C) of a (T, d) matrix: (R, C), zero outside. start is a multiple of R."""
    t = start + tl.arange(0, R)
    c = C0 + tl.arange(0, C)
    at = base + t[:, None] * S_T + c[None, :] * S_D
    if T % R == 0:
        if d >= C0 + C:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(c < d)[None, :], other=0.0)
    else:
        if d >= C0 + C:
            x = tl.load(at, mask=(t < T)[:, None], other=0.0)
        else:
            x = tl.load(at, mask=(t < T)[:, None] & (c < d)[None, :], other=0.0)
    return x


@triton.jit
def store(
    base,
    x,
    start,
    T: tl.constexpr,
    d: tl.constexpr,
    S_T: tl.constexpr,
    R: tl.constexpr,
    C0: tl.constexpr,
    C: tl.constexpr,
):
    """The (R, C) tile x into rows from start and columns from C0 of a (T, d) matrix with adjacent columns."""
    t = start + tl.arange(0, R)
    c = C0 + tl.arange(0, C)
    mask = (t < T)[:, None] & (c < d)[None, :]
    tl.store(base + t[:, None] * S_T + c[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def place(T: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """This program's (first row of its block, head, row of the batch); blocks of one head run side by side."""
    BLOCKS: tl.constexpr = (T + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    return (pid % BLOCKS) * BLOCK, (pid // BLOCKS) % H, pid // (BLOCKS * H)


@triton.jit
def probability(s, m, log_l, C2: tl.constexpr):
    """Softmax of the logits s of a query whose largest is m, and whose sum of exp2(C2 (s - m)) is 2^log_l: at most 1.

    m and log_l apart: from logits of 1e7 on their sum is coarser than log_l in float32. The minimum, because a backward
    that sums a logit in another order than `forward` may find it above m; a NaN logit of a real query is in log_l.
    """
    x = tl.minimum(s - m, 0.0)
    return tl.exp2(tl.fma(x, tl.full(x.shape, C2, tl.float32), tl.broadcast_to(-log_l, x.shape)))


@triton.jit(do_not_specialize=["first", "s_b", "z_b"])
def forward(
    qkv,
    qkv_dot,
    o,
    o_dot,
    norms,
    first,
    s_b,
    z_b,
    T: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    S_T: tl.constexpr,
    S_3: tl.constexpr,
    S_H: tl.constexpr,
    S_D: tl.constexpr,
    Z_T: tl.constexpr,
    Z_3: tl.constexpr,
    Z_H: tl.constexpr,
    Z_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    DUAL: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """o (B, T, H d), norms (B, H, 2, T), o_dot (k, T, H d) of rows [first, first + grid / (H blocks)).

    qkv has strides (s_b, S_T, S_3, S_H, S_D), qkv_dot (z_b, Z_T, ...), read only if DUAL. One pass over the keys keeps,
    per query, the maximum m, l = sum p, o~ = sum p v, and with DUAL r = sum p s. and t~ = sum (p s.) v + p v. Here p is
    2^-SHIFT at the maximum, at most 1 / T, so that no sum of p v exceeds the largest v.
    """
    m0, h, b = place(T, H, BM)
    b += first
    C: tl.constexpr = d**-0.5
    C2: tl.constexpr = d**-0.5 * LOG2E
    q = sample(qkv, b, h, s_b, S_H, ALIGNED)
    k = q + S_3
    v = k + S_3
    q0 = load(q, m0, T, d, S_T, S_D, BM, 0, D0)
    m = tl.full((BM,), LOWEST, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    o0 = tl.zeros((BM, D0), tl.float32)
    if D1 > 0:
        q1 = load(q, m0, T, d, S_T, S_D, BM, D0, D1)
        o1 = tl.zeros((BM, D1), tl.float32)
    if DUAL:
        q_dot = sample(qkv_dot, b, h, z_b, Z_H, ALIGNED)
        k_dot = q_dot + Z_3
        v_dot = k_dot + Z_3
        q0_dot = load(q_dot, m0, T, d, Z_T, Z_D, BM, 0, D0)
        r = tl.zeros((BM,), tl.float32)
        t0 = tl.zeros((BM, D0), tl.float32)
        if D1 > 0:
            q1_dot = load(q_dot, m0, T, d, Z_T, Z_D, BM, D0, D1)
            t1 = tl.zeros((BM, D1), tl.float32)

    for n0 in range(0, T, BN):
        k0 = load(k, n0, T, d, S_T, S_D, BN, 0, D0)
        if D1 > 0:
            k1 = load(k, n0, T, d, S_T, S_D, BN, D0, D1)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        if T % BN != 0:
            s = tl.where((n0 + tl.arange(0, BN) < T)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(tl.fma(s - m_new[:, None], tl.full(s.shape, C2, tl.float32), tl.full(s.shape, -SHIFT, tl.float32)))
        alpha = tl.exp2((m - m_new) * C2)
        l = tl.fma(l, alpha, tl.sum(p, 1))
        m = m_new
        if DUAL:
            k0_dot = load(k_dot, n0, T, d, Z_T, Z_D, BN, 0, D0)
            if D1 > 0:
                k1_dot = load(k_dot, n0, T, d, Z_T, Z_D, BN, D0, D1)
            s_dot = tl.dot(q0_dot, tl.trans(k0), input_precision="ieee")
            s_dot = tl.dot(q0, tl.trans(k0_dot), s_dot, input_precision="ieee")
            if D1 > 0:
                s_dot = tl.dot(q1_dot, tl.trans(k1), s_dot, input_precision="ieee")
                s_dot = tl.dot(q1, tl.trans(k1_dot), s_dot, input_precision="ieee")
            ps_dot = p * (s_dot * C)
            r = tl.fma(r, alpha, tl.sum(ps_dot, 1))
            w = ps_dot.to(k0.dtype)
        p16 = p.to(k0.dtype)
        v0 = load(v, n0, T, d, S_T, S_D, BN, 0, D0)
        if D1 > 0:
            v1 = load(v, n0, T, d, S_T, S_D, BN, D0, D1)
        o0 = tl.dot(p16, v0, o0 * alpha[:, None], input_precision="ieee")
        if D1 > 0:
            o1 = tl.dot(p16, v1, o1 * alpha[:, None], input_precision="ieee")
        if DUAL:
            v0_dot = load(v_dot, n0, T, d, Z_T, Z_D, BN, 0, D0)
            if D1 > 0:
                v1_dot = load(v_dot, n0, T, d, Z_T, Z_D, BN, D0, D1)
            t0 = tl.dot(w, v0, t0 * alpha[:, None], input_precision="ieee")
            t0 = tl.dot(p16, v0_dot, t0, input_precision="ieee")
            if D1 > 0:
                t1 = tl.dot(w, v1, t1 * alpha[:, None], input_precision="ieee")
                t1 = tl.dot(p16, v1_dot, t1, input_precision="ieee")

    t = m0 + tl.arange(0, BM)
    norms += (b * H + h) * (2 * T)
    tl.store(norms + t, m, mask=t < T)
    tl.store(norms + T + t, tl.log2(l) + SHIFT, mask=t < T)
    out = b.to(tl.int64) * (T * H * d) + h * d
    o0 = o0 / l[:, None]
    store(o + out, o0, m0, T, d, H * d, BM, 0, D0)
    if D1 > 0:
        o1 = o1 / l[:, None]
        store(o + out, o1, m0, T, d, H * d, BM, D0, D1)
    if DUAL:
        mu = r / l
        store(o_dot + out, t0 / l[:, None] - mu[:, None] * o0, m0, T, d, H * d, BM, 0, D0)
        if D1 > 0:
            store(o_dot + out, t1 / l[:, None] - mu[:, None] * o1, m0, T, d, H * d, BM, D0, D1)


@triton.jit(do_not_specialize=["s_b", "g_b"])
def backward_q(
    qkv,
    o,
    norms,
    do,
    dqkv,
    delta,
    s_b,
    g_b,
    T: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    S_T: tl.constexpr,
    S_3: tl.constexpr,
    S_H: tl.constexpr,
    S_D: tl.constexpr,
    G_T: tl.constexpr,
    G_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq into dqkv[:, :, 0], and delta (B, H, T) = sum over d of do o, which `backward_kv` reads after this kernel.

    With P and dP = dO V^T: dS = P (dP - delta), dQ = c dS K. do has strides (g_b, G_T, G_D).
    """
    m0, h, b = place(T, H, BM)
    C: tl.constexpr = d**-0.5
    C2: tl.constexpr = d**-0.5 * LOG2E
    q = sample(qkv, b, h, s_b, S_H, ALIGNED)
    k = q + S_3
    v = k + S_3
    g = sample(do, b, h, g_b, d * G_D, ALIGNED)
    out = b.to(tl.int64) * (T * H * d) + h * d
    q0 = load(q, m0, T, d, S_T, S_D, BM, 0, D0)
    g0 = load(g, m0, T, d, G_T, G_D, BM, 0, D0)
    e = tl.sum(g0.to(tl.float32) * load(o + out, m0, T, d, H * d, 1, BM, 0, D0).to(tl.float32), 1)
    dq0 = tl.zeros((BM, D0), tl.float32)
    if D1 > 0:
        q1 = load(q, m0, T, d, S_T, S_D, BM, D0, D1)
        g1 = load(g, m0, T, d, G_T, G_D, BM, D0, D1)
        e += tl.sum(g1.to(tl.float32) * load(o + out, m0, T, d, H * d, 1, BM, D0, D1).to(tl.float32), 1)
        dq1 = tl.zeros((BM, D1), tl.float32)
    t = m0 + tl.arange(0, BM)
    tl.store(delta + (b * H + h) * T + t, e, mask=t < T)
    norms += (b * H + h) * (2 * T)
    m = tl.load(norms + t, mask=t < T, other=0.0)
    log_l = tl.load(norms + T + t, mask=t < T, other=0.0)

    for n0 in range(0, T, BN):
        k0 = load(k, n0, T, d, S_T, S_D, BN, 0, D0)
        v0 = load(v, n0, T, d, S_T, S_D, BN, 0, D0)
        if D1 > 0:
            k1 = load(k, n0, T, d, S_T, S_D, BN, D0, D1)
            v1 = load(v, n0, T, d, S_T, S_D, BN, D0, D1)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        dp = tl.dot(g0, tl.trans(v0), input_precision="ieee")
        if D1 > 0:
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            dp = tl.dot(g1, tl.trans(v1), dp, input_precision="ieee")
        p = probability(s, m[:, None], log_l[:, None], C2)
        if T % BN != 0:
            p = tl.where((n0 + tl.arange(0, BN) < T)[None, :], p, 0.0)
        ds = (p * (dp - e[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")

    store(dqkv + 3 * (out - h * d) + h * d, dq0 * C, m0, T, d, 3 * H * d, BM, 0, D0)
    if D1 > 0:
        store(dqkv + 3 * (out - h * d) + h * d, dq1 * C, m0, T, d, 3 * H * d, BM, D0, D1)


@triton.jit(do_not_specialize=["s_b", "g_b"])
def backward_kv(
    qkv,
    norms,
    do,
    dqkv,
    delta,
    s_b,
    g_b,
    T: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    S_T: tl.constexpr,
    S_3: tl.constexpr,
    S_H: tl.constexpr,
    S_D: tl.constexpr,
    G_T: tl.constexpr,
    G_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk, dv into dqkv[:, :, 1:]: dV = P^T dO, dK = c dS^T Q, summed over the queries in order, so no atomics."""
    n0, h, b = place(T, H, BN)
    C: tl.constexpr = d**-0.5
    C2: tl.constexpr = d**-0.5 * LOG2E
    q = sample(qkv, b, h, s_b, S_H, ALIGNED)
    k = q + S_3
    v = k + S_3
    g = sample(do, b, h, g_b, d * G_D, ALIGNED)
    norms += (b * H + h) * (2 * T)
    delta += (b * H + h) * T
    k0 = load(k, n0, T, d, S_T, S_D, BN, 0, D0)
    v0 = load(v, n0, T, d, S_T, S_D, BN, 0, D0)
    dk0 = tl.zeros((BN, D0), tl.float32)
    dv0 = tl.zeros((BN, D0), tl.float32)
    if D1 > 0:
        k1 = load(k, n0, T, d, S_T, S_D, BN, D0, D1)
        v1 = load(v, n0, T, d, S_T, S_D, BN, D0, D1)
        dk1 = tl.zeros((BN, D1), tl.float32)
        dv1 = tl.zeros((BN, D1), tl.float32)

    for m0 in range(0, T, BM):
        t = m0 + tl.arange(0, BM)
        q0 = load(q, m0, T, d, S_T, S_D, BM, 0, D0)
        g0 = load(g, m0, T, d, G_T, G_D, BM, 0, D0)
        if D1 > 0:
            q1 = load(q, m0, T, d, S_T, S_D, BM, D0, D1)
            g1 = load(g, m0, T, d, G_T, G_D, BM, D0, D1)
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        dp = tl.dot(v0, tl.trans(g0), input_precision="ieee")
        if D1 > 0:
            s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(g1), dp, input_precision="ieee")
        if T % BM == 0:
            m = tl.load(norms + t)
            log_l = tl.load(norms + T + t)
            e = tl.load(delta + t)
        else:  # a query past the end has q = do = 0 and adds nothing
            m = tl.load(norms + t, mask=t < T, other=0.0)
            log_l = tl.load(norms + T + t, mask=t < T, other=0.0)
            e = tl.load(delta + t, mask=t < T, other=0.0)
        p = probability(s, m[None, :], log_l[None, :], C2)
        p16 = p.to(k0.dtype)
        ds = (p * (dp - e[None, :])).to(k0.dtype)
        dv0 = tl.dot(p16, g0, dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p16, g1, dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")

    out = dqkv + b.to(tl.int64) * (3 * T * H * d) + (H + h) * d
    store(out, dk0 * C, n0, T, d, 3 * H * d, BN, 0, D0)
    store(out + H * d, dv0, n0, T, d, 3 * H * d, BN, 0, D0)
    if D1 > 0:
        store(out, dk1 * C, n0, T, d, 3 * H * d, BN, D0, D1)
        store(out + H * d, dv1, n0, T, d, 3 * H * d, BN, D0, D1)
