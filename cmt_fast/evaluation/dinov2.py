"""FD-DINOv2's feature space: DINOv2 ViT-L/14 (Oquab et al. 2023) in plain torch, with weights from a file of yours.

A pre-norm vision transformer with a class token, learned positions and layer scale; the class token after the last norm
is the feature. It is written here because the packages that have it import torchvision or download code.
The protocol is that of EDM2 (Karras et al. 2024): uint8, 224 x 224 bicubic with antialiasing, ImageNet mean and deviation.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import weights as files

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = _Attention(width, heads), _Mlp(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class VisionTransformer(nn.Module):
    """DINOv2's network; parameter names are those of the published files. `grid`: patches a side that it was trained at."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16, patch: int = 14, grid: int = 37) -> None:
        super().__init__()
        self.grid = grid
        self.patch_embed = _Patches(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, side: int) -> Tensor:
        """Positions for side x side patches, (1, 1 + side^2, width): bicubic at the published scale (side + 0.1) / grid."""
        if side == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        scale = (side + 0.1) / self.grid
        table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)), 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, S, S) normalised, S a multiple of the patch -> the class token, (B, width)."""
        x = self.patch_embed.proj(x)
        side = x.shape[-1]
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1) + self.positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class DinoV2:
    """Features (B, 1024) of images (B, 1 or 3, H, W) in [-1, 1]."""

    images, short, dim, published = True, "FD-DINOv2", 1024, True

    def __init__(self, path: Path, device: torch.device, **size: int) -> None:
        """size: arguments of VisionTransformer, for other networks than ViT-L/14. Raises ConfigError naming the file."""
        tensors, digest = files.read(path, "DINOv2 ViT-L/14", URL)
        tensors.pop("mask_token", None)  # of training only
        with torch.device("meta"):
            net = VisionTransformer(**size)
        try:
            net.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ConfigError(f"eval.weights: {str(path)!r} does not fit DINOv2 ViT-L/14 ({error})"[:300]) from None
        self.net = net.float().to(device).eval().requires_grad_(False)
        self.device, self.dim = device, net.norm.weight.numel()
        self.name = f"dinov2-vit-{'l-14' if self.dim == 1024 else self.dim}@{digest[:12]}, uint8, bicubic-antialias-224"

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1024) float32."""
        x = F.interpolate(files.to_uint8(x.to(self.device)).float(), size=(224, 224), mode="bicubic", antialias=True)
        mean, deviation = (torch.tensor(v, device=x.device)[:, None, None] for v in (MEAN, DEVIATION))
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return self.net((x / 255 - mean) / deviation)

    def classes(self, x: Tensor) -> None:
        """None: it has no classes."""
        return None
