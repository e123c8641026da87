"""random_bits in C++ and CUDA (csrc): one pass, one launch."""

import torch
from torch import Tensor

from cmt_kernels import _native, transforms

MASK = 0xFFFFFFFF

unavailable = _native.unavailable


def random_bits(key: tuple[int, int, int, int], sample: Tensor, blocks: int) -> Tensor:
    transforms.refuse("random_bits", "native")
    seed, stage, step, stream = key
    low = (seed & MASK, stage & MASK, step & MASK, stream & MASK)
    return torch.ops.cmt.random_bits(sample.to(torch.int64), blocks, *low)


if not unavailable("cpu"):

    @torch.library.register_fake("cmt::random_bits")
    def _(sample, blocks, seed, stage, step, stream):
        return sample.new_empty((sample.shape[0], blocks, 4))
