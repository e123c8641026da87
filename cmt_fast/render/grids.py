"""Pictures in and out, without torchvision: sample grids as PNG files, image files as pixels."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError
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


class BrokenImage(ValueError):
    """An image that cannot be read, and why in a few words."""


def read(data: bytes, most_pixels: int = 1 << 27) -> Image.Image:
    """A JPEG, PNG or WebP file's bytes as an 8-bit RGB image, whatever the file's name says. Raises BrokenImage.

    Orientation tags are not obeyed. What is transparent becomes white; 16-bit grey keeps its upper 8 bits.
    """
    if not data:
        raise BrokenImage("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is refused below by its header
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > most_pixels:
                raise BrokenImage(f"would have {image.width} x {image.height} pixels, that is too many")
            image.load()
            return _rgb(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage("is no JPEG, PNG or WebP image") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BrokenImage(f"cannot be read ({str(error)[:80]})") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would cut it off at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """size x size from the middle, as ADM, DiT and EDM2 crop: halved by boxes while twice too large, then bicubic.

    Raises BrokenImage for one so narrow that it would grow beyond memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale * size > 1 << 27:
        raise BrokenImage(f"is too narrow to be cut square ({image.width} x {image.height})")
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def pixels(image: Image.Image, mirror: bool = False) -> np.ndarray:
    """An RGB image as (3, H, W) uint8."""
    array = np.asarray(image)[:, ::-1] if mirror else np.asarray(image)
    return np.ascontiguousarray(array.transpose(2, 0, 1))
