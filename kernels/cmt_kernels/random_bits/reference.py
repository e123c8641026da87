"""random_bits in plain torch: some two hundred operations on int64, whatever the size."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for b in [0, 2^32), without overflowing int64."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def random_bits(key: tuple[int, int, int, int], sample: Tensor, blocks: int) -> Tensor:
    seed, stage, step, stream = key
    sample = sample.to(torch.int64)
    c0 = torch.arange(blocks, device=sample.device).expand(sample.shape[0], blocks)
    c1 = (sample & MASK)[:, None].expand_as(c0)
    c2 = torch.full_like(c0, step & MASK)
    c3 = torch.full_like(c0, stream & MASK)
    k0, k1 = seed & MASK, stage & MASK
    for _ in range(10):
        h0, l0 = _multiply(M0, c0)
        h1, l1 = _multiply(M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)
