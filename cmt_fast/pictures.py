"""Sample grids as PNG files, without torchvision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def grid(rows: list[tuple[str, Tensor]], path: Path, zoom: int | None = None) -> None:
    """One labelled row of pictures per entry: images (n, C, H, W) in [-1, 1], or points (n, 2) as a scatter picture."""
    if rows[0][1].ndim == 2:
        return _scatter(rows, path)
    n, _, h, w = rows[0][1].shape
    zoom = zoom or max(1, 48 // h)
    margin, gap = 92, 2
    canvas = Image.new("RGB", (margin + n * (w * zoom + gap), len(rows) * (h * zoom + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (title, images) in enumerate(rows):
        top = y * (h * zoom + gap)
        draw.text((4, top + h * zoom // 2 - 6), title, fill="black")
        for x, image in enumerate(images):
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            canvas.paste(
                tile.resize((w * zoom, h * zoom), Image.Resampling.NEAREST), (margin + x * (w * zoom + gap), top)
            )
    _save(canvas, path)


def _scatter(rows: list[tuple[str, Tensor]], path: Path, side: int = 220) -> None:
    canvas = Image.new("RGB", (side * len(rows), side + 16), "white")
    draw = ImageDraw.Draw(canvas)
    for k, (title, points) in enumerate(rows):
        draw.text((k * side + 4, 2), title, fill="black")
        pixels = np.clip((points.numpy() / 2 + 1) / 2 * (side - 4), 0, side - 4)
        for px, py in pixels:
            draw.ellipse((k * side + px, 16 + py, k * side + px + 2, 16 + py + 2), fill=(40, 80, 160))
    _save(canvas, path)


def _save(canvas: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    canvas.save(temporary, format="PNG")
    temporary.replace(path)
