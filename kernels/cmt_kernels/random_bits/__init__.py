"""random_bits: Philox4x32-10, the integers behind every random number (Salmon et al., SC 2011).

The counter is (block, sample, step, stream), the key (seed, stage). A round, with hi and lo the halves of a product:

    c0, c1, c2, c3 <- hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0);  k0 += W0, k1 += W1  (mod 2^32)

Integers: every backend gives the same bits. `cmt_kernels.philox` makes uniform and normal numbers of them.
"""

from torch import Tensor

from cmt_kernels._op import backend


def random_bits(key: tuple[int, int, int, int], sample: Tensor, blocks: int) -> Tensor:
    """key: (seed, stage, step, stream), of each the low 32 bits; sample: (B,) int64 row ids, the low 32 bits of each.

    Returns (B, blocks, 4) int64 in [0, 2^32).
    """
    return backend("random_bits", sample)(key, sample, blocks)
