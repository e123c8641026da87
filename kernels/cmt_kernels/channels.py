"""Images with their channels side by side: what kernels that read a pixel's channels as a row are given.

An image (B, C, H, W) in torch's channels-last memory is (B, H W, C), contiguous. What is laid out otherwise is copied, and what
an op gives is channels-last, so that from the first op on nothing is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixels(x: Tensor) -> Tensor:
    """(B, C, *sizes) -> (B, pixels, C): a view of channels-last memory, else a copy; (B, C) -> (B, 1, C)."""
    if x.ndim == 2:
        return x.unsqueeze(1)
    return x.movedim(1, -1).reshape(x.shape[0], x.shape[2:].numel(), x.shape[1])


def image(rows: Tensor, shape: torch.Size) -> Tensor:
    """(B, pixels, C) -> (B, C, *sizes) with the sizes of an image of this shape: a view, channels-last in memory."""
    if len(shape) == 2:
        return rows.squeeze(1)
    return rows.view(rows.shape[0], *shape[2:], rows.shape[-1]).movedim(-1, 1)


def alike(x: Tensor, like: Tensor) -> Tensor:
    """x in memory as `like` is, channels-last or contiguous: what is the same number in both lies at the same place."""
    if like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()
