"""Images and an autoencoder made up from a seed, for tests and for trying the commands:

    python -m tests.train.synthetic FOLDER --n 2000

writes FOLDER/images (ten class folders; JPEG, PNG, WebP of many modes, 64 to 600 pixels a side, some broken) and
FOLDER/vae (an AutoencoderKL of diffusers, factor 8, random weights).
"""

from __future__ import annotations

import argparse
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BREAKS = ("empty", "truncated", "text", "bomb", "noise")
MODES = ("RGB", "RGB", "RGB", "L", "P", "RGBA", "CMYK", "I;16", "turned", "renamed")


def image(rng: np.random.Generator, label: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: waves whose colours and lengths tell the class, with noise."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    wave = np.sin(2 * np.pi * ((1 + label) * (x * np.cos(label) + y * np.sin(label)) + rng.random()))
    colour = np.array([np.sin(label + k) for k in range(3)])
    picture = (
        127 + 60 * colour + 50 * wave[..., None] * np.cos(label * np.arange(3)) + rng.normal(0, 8, (height, width, 3))
    )
    return picture.clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, mode: str, k: int) -> tuple[bytes, str]:
    """A file's bytes and suffix for pixels in a mode, formats in turn."""
    picture = Image.fromarray(pixels)
    kind, suffix = (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("JPEG", ".JPEG"))[k % 4]
    options: dict = {}
    if mode == "I;16":
        picture, kind, suffix = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257), "PNG", ".png"
    elif mode in ("P", "RGBA"):
        picture, kind, suffix = picture.convert(mode), "PNG", ".png"
    elif mode == "CMYK":
        picture, kind, suffix = picture.convert(mode), "JPEG", ".jpg"
    elif mode == "L" and kind != "WEBP":
        picture = picture.convert(mode)
    elif mode == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112], kind, suffix = 6, "JPEG", ".jpg"
    elif mode == "renamed":
        kind, suffix = "PNG", ".jpg"
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue(), suffix


def chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side: int = 60000) -> bytes:
    """A small PNG file whose header says side x side pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")


def broken(how: str, sound: bytes) -> bytes:
    """What takes the place of a sound file's bytes."""
    return {
        "empty": b"",
        "truncated": sound[: len(sound) // 2],
        "text": b"<html>not found</html>",
        "bomb": bomb(),
        "noise": sound[:24] + bytes(255 - b for b in sound[24:200]),
    }[how]


def images(folder: Path, n: int, classes: int = 10, largest: int = 600, every: int = 41, seed: int = 0) -> list[str]:
    """Write n images, one in `every` of them broken. Returns the names of the broken ones, below `folder`."""
    rng = np.random.default_rng(seed)
    bad = []
    for k in range(n):
        label = k % classes
        width, height = (int(s) for s in rng.integers(64, largest + 1, 2))
        data, suffix = encoded(image(rng, label, width, height), MODES[k // classes % len(MODES)], k)
        path = folder / f"class-{label}" / f"{k:06d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k % every == every - 1:
            data = broken(BREAKS[k // every % len(BREAKS)], data)
            bad.append(path.relative_to(folder).as_posix())
        path.write_bytes(data)
    return sorted(bad)


def vae(folder: Path, seed: int = 0, factor: int = 8, width: int = 16) -> None:
    """An AutoencoderKL with random weights and 4 latent channels."""
    import torch
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=(width,) * levels,
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=4,
            mid_block_add_attention=False,
        )
        made.quant_conv.bias.data[4:] = -8  # log variance: latents are more image than noise, as trained ones are
        made.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=2000)
    args = parser.parse_args()
    found = images(args.folder / "images", args.n)
    vae(args.folder / "vae")
    print(f"{args.folder}: {args.n} images, {len(found)} of them broken; an autoencoder of factor 8")
