"""A kernel that keeps N x N sums in registers: planted in test_gates.py to see the gate close. Triton reads the source
of a kernel from its file, so it cannot be made in a string."""

import triton
import triton.language as tl


@triton.jit
def table(x, y, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.float32)
    for step in range(64):
        total = total * tl.load(x + step) + tl.load(x + i + 3 * j + step)
    tl.store(y + i * N + j, total)
