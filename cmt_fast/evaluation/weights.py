"""Weights of a judge's network from a file of the user's, and the rounding to bytes that published protocols demand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cmt_fast.config.errors import ConfigError, one_line


def read(path: Path, what: str, url: str) -> tuple[dict[str, Tensor], str]:
    """Named tensors of a .safetensors or .pt file and the file's sha256. Raises ConfigError; runs no code of the file."""
    if not path.is_file():
        raise ConfigError(f"eval.weights: {str(path)!r} does not exist; the weights of {what} are at {url}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError("it holds something else than named tensors")
    except Exception as error:  # torch raises nearly every kind for a damaged file
        reason = one_line(str(error).partition("\n")[0], 200) or type(error).__name__
        raise ConfigError(f"eval.weights: {str(path)!r} cannot be read as tensors ({reason})") from None
    return dict(tensors), digest.hexdigest()


def to_uint8(x: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [-1, 1] as a viewer gets them: floor(127.5 x + 128) in 0..255, three channels."""
    x = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
