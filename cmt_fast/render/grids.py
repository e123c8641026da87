"""Pictures in and out, without torchvision: sample grids as PNG files, image files as pixels."""

from __future__ import annotations

import io
import os
import stat
import sys
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from cmt_fast.runtime.words import one_line
from cmt_fast.storage.files import by_rename

if TYPE_CHECKING:  # tables of pictures on disk are made without torch
    from torch import Tensor

MAGIC = b"\x89PNG\r\n\x1a\n"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# the EXIF orientation tag -> what brings the picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def wrong(path: Path) -> str:
    """What is wrong with a PNG file, by the checksums of its parts; empty where it is as it was written."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return "is no file"
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    at, ended = len(MAGIC), False
    while data.startswith(MAGIC) and not ended and at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        part, check = data[at + 4 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        if zlib.crc32(part).to_bytes(4, "big") != check:
            break
        at, ended = at + 12 + size, part[:4] == b"IEND"
    return "" if ended and at == len(data) else "is damaged"


def whole(path: Path) -> bool:
    """Whether a PNG file is there as it was written; says on stderr of one that is not."""
    if not os.path.lexists(path):
        return False
    why = wrong(path)
    if why:
        print(f"{path}: {why}; the picture is left out", file=sys.stderr)
    return not why


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


TILE = 96  # pixels along a side of a small image in a strip, about
LARGEST_TILE = 128


def strip(x: Tensor, path: Path, limit: float = 2.0) -> None:
    """Images (n, C, H, W) in [-1, 1] in one row, or points (n, 2) within +-limit as one square; nothing is written on them.

    Small images are enlarged pixel by pixel, large ones made smaller; what is between them is transparent.
    """
    if x.ndim == 2:
        return _square(x, path, limit)
    h, w = x.shape[2:]
    largest = max(h, w)
    scale = max(1, round(TILE / largest)) if largest <= LARGEST_TILE else LARGEST_TILE / largest
    height, width, gap = max(1, round(h * scale)), max(1, round(w * scale)), 4
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    canvas = Image.new("RGBA", (len(x) * (width + gap) - gap, height))
    for i, image in enumerate(x):
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
        canvas.paste(tile.resize((width, height), how), (i * (width + gap), 0))
    _save(canvas, path)


def _square(points: Tensor, path: Path, limit: float, side: int = 300) -> None:
    """Points drawn at twice the size and made smaller, so that they are round."""
    canvas = Image.new("RGB", (2 * side, 2 * side), "white")
    draw = ImageDraw.Draw(canvas)
    for px, py in ((points.cpu().double() / limit + 1) * side).tolist():
        draw.ellipse((px - 3, 2 * side - py - 3, px + 3, 2 * side - py + 3), fill=(0, 114, 178))
    _save(canvas.resize((side, side), Image.Resampling.LANCZOS), path)


def beside(columns: tuple[str, ...], rows: list[tuple[str, list[tuple[Path, str] | None]]], path: Path) -> None:
    """PNG files in a table: a column a run, a row a stage; each file with the words under it, None where there is none.

    Raises BrokenImage naming a file that cannot be read.
    """
    gap, line = 12, 18
    columns = tuple(map(one_line, columns))
    font = ImageFont.load_default(12)
    cells = [[_opened(cell) for cell in row] for _, row in rows]
    least = int(max(map(font.getlength, columns))) + 8
    widths = [max(least, *(row[i].width if row[i] else 0 for row in cells)) for i in range(len(columns))]
    heights = [max(image.height if image else 0 for image in row) + 2 * line for row in cells]
    canvas = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + 2 * line + gap * len(rows)), "white"
    )
    draw = ImageDraw.Draw(canvas)
    left = [gap + sum(widths[:i]) + gap * i for i in range(len(widths))]
    for x, title in zip(left, columns):
        draw.text((x, gap // 2), title, fill="black", font=font)
    top = 2 * line
    for (name, row), images, height in zip(rows, cells, heights):
        for x, cell, image in zip(left, row, images):
            draw.text((x, top), f"{name}: {cell[1] if cell else 'no picture'}", fill="black", font=font)
            if image:
                canvas.paste(image, (x, top + line))
        top += height + gap
    _save(canvas, path)


def _opened(cell: tuple[Path, str] | None) -> Image.Image | None:
    if cell is None:
        return None
    try:
        return read(cell[0].read_bytes())
    except BrokenImage as error:
        raise BrokenImage(f"{cell[0]}: {error}") from None


def _save(canvas: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with by_rename(path) as temporary:
        canvas.save(temporary, format="PNG")


def png(pixels: np.ndarray, text: dict[str, str]) -> bytes:
    """One image as the bytes of a PNG file. pixels: (C, H, W) uint8, C 1 or 3; text: words kept in the file, by key.

    Compressed in a hurry: a photograph of 512 pixels takes 30 ms of one CPU core in place of 51, for a file 4 % larger.
    """
    about = PngImagePlugin.PngInfo()
    for key, words in text.items():
        about.add_text(key, words)
    file, array = io.BytesIO(), pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG", pnginfo=about, compress_level=1)
    return file.getvalue()


def whole_png(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does: one that was cut off does not, and what is no file is not opened."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                return False
            file.seek(-12, 2)
            return file.read(12) == b"\0\0\0\0IEND\xaeB`\x82"
    except OSError:
        return False


class BrokenImage(ValueError):
    """An image that cannot be read, and why in a few words."""


def read(data: bytes, most_pixels: int = 1 << 27) -> Image.Image:
    """An image file's bytes as an 8-bit RGB image, whatever the file's name says: the first frame, turned as its orientation
    tag says. Raises BrokenImage.

    What is transparent becomes white; 16 bits keep their upper 8; floats are taken from 0 to 1; CMYK without a profile, and no
    other colour profile is applied either. Integers of 32 bits and signed ones are refused, as nothing says what is white.
    """
    if not data:
        raise BrokenImage("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is refused below by its header
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > most_pixels:
                raise BrokenImage(f"would have {image.width} x {image.height} pixels, that is too many")
            image.load()
            return _upright(_rgb(image), _orientation(image))
    except (BrokenImage, MemoryError):  # a machine without memory is no broken image
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"is no image of a kind that is read ({', '.join(FORMATS)})") from None
    except Exception as error:  # readers of damaged files raise whatever they trip over; the bytes are in memory
        raise BrokenImage(f"cannot be read ({(str(error) or type(error).__name__)[:80]})") from None


def _orientation(image: Image.Image) -> int:
    """What is left to do of the orientation tag: 1 without one, where it is damaged, and for TIFF files that PIL has turned."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # as above; the pixels are sound
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return _grey(_floats(np.asarray(image)))
    if image.mode.startswith("I"):  # PIL's own conversion would cut it off at 255
        return _grey(_upper_bits(image))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _floats(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise BrokenImage(f"holds floats from {values.min():.4g} to {values.max():.4g}; they are taken from 0 to 1")
    return np.rint(values * 255)


def _upper_bits(image: Image.Image) -> np.ndarray:
    """The upper 8 bits of grey values of 16 bits, or of the 12 that a TIFF file says it has."""
    values, tags = np.asarray(image).astype(np.int64), getattr(image, "tag_v2", {})
    bits = int(np.ravel(tags.get(258, 16))[0])
    if bits > 16 or np.ravel(tags.get(339, 1))[0] != 1:
        raise BrokenImage(
            f"holds {bits}-bit {'integers' if bits > 16 else 'signed integers'}; write it with 8 or 16 bits"
        )
    if tags.get(262, 1) == 0:  # white is zero, which PIL undoes for 8 bits alone
        values = (1 << bits) - 1 - values
    return (values >> (bits - 8)).clip(0, 255)


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


def reduced(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Image.Image:
    """The part of an image in `box` (left, top, right, bottom, in pixels and parts of them) as size x size, bicubic, each
    pixel a mean over what it covers.
    """
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def pixels(image: Image.Image, mirror: bool = False) -> np.ndarray:
    """An RGB image as (3, H, W) uint8, a grey one as (1, H, W)."""
    array = np.atleast_3d(np.asarray(image))
    return np.ascontiguousarray((array[:, ::-1] if mirror else array).transpose(2, 0, 1))
