"""VGG16 (Simonyan & Zisserman 2015) as a feature space: on pixels for LPIPS, and with group norms on latents.

Thirteen 3 x 3 convolutions in five stages; what a distance compares is each stage's last output. The pixel network halves
the image before each stage but the first. Latents are eight times smaller than their images, so theirs halves it before
the last two stages alone (Kang et al. 2024, E-LatentLPIPS): 29.9 GFLOP on 4 x 64 x 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (2, 2, 3, 3, 3)  # a stage
WIDTHS = (1, 2, 4, 8, 8)  # in units of the first stage's 64 channels


class Vgg(nn.Module):
    """slices(x): x (B, C, H, W) -> five feature maps. `norm`: group norm after each convolution; `pools`: the stages that
    begin with a 2 x 2 max-pool."""

    def __init__(self, channels: int, width: int, norm: bool, pools: tuple[int, ...]) -> None:
        super().__init__()
        self.pools = pools
        self.stages = nn.ModuleList()
        for depth, times in zip(CONVOLUTIONS, WIDTHS):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers.append(nn.Conv2d(channels, times * width, 3, padding=1))
                if norm:
                    layers.append(nn.GroupNorm(_groups(times * width), times * width))
                layers.append(nn.ReLU())
                channels = times * width
            self.stages.append(nn.Sequential(*layers))

    def slices(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, (B, C_i, H_i, W_i)."""
        out = []
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i in self.pools else x)
            out.append(x)
        return out


class PixelVgg(Vgg):
    """VGG16 as LPIPS reads it, and the linear heads: a non-negative weight for each channel of each slice."""

    def __init__(self) -> None:
        super().__init__(3, 64, norm=False, pools=(1, 2, 3, 4))
        self.heads = nn.ParameterList(torch.ones(64 * times) for times in WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def slices(self, x: Tensor) -> list[Tensor]:
        """x: (B, 1 or 3, H, W) in [-1, 1], grey is given to all three channels."""
        return super().slices((x - self.shift) / self.scale)


class LatentVgg(Vgg):
    """A classifier of latents: five stages with group norms, the mean over space, one linear layer."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__(channels, width, norm=True, pools=(3, 4))
        self.head = nn.Linear(WIDTHS[-1] * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> logits (B, classes)."""
        return self.head(self.slices(x)[-1].mean((2, 3)))


def _groups(channels: int) -> int:
    """32 groups, fewer where they do not divide."""
    return next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g > 1 or g == 1)
