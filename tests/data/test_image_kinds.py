"""Image files of every kind: the pixels that come out, each worked out by hand from the file's own definition."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cmt_fast.render import grids
from tests.fixtures.synthetic import chunk


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def rgb(data: bytes) -> list[list[list[int]]]:
    return np.asarray(grids.read(data)).tolist()


def grey(data: bytes) -> list[list[int]]:
    """Rows of one channel of an image whose three are the same."""
    found = np.asarray(grids.read(data))
    assert found.ndim == 3 and (found == found[..., :1]).all()
    return found[..., 0].tolist()


def array(rows, dtype=np.uint8, mode: str | None = None) -> Image.Image:
    made = Image.fromarray(np.array(rows, dtype))
    return made if mode is None else made.convert(mode)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG file by its specification. rows: each with its filter byte."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(width: int, bits: int, data: bytes, photometric: int = 1, samples: int = 1, form: int = 1) -> bytes:
    """A TIFF file of one row by its specification, little endian, not compressed. form: 1 unsigned, 2 signed, 3 float."""
    shorts = struct.pack(f"<{samples}H", *[bits] * samples)
    entries = 10
    place = 8 + 2 + 12 * entries + 4
    bits_at = place if samples > 2 else int.from_bytes(shorts.ljust(4, b"\0"), "little")
    start = place + len(shorts)
    fields = [
        (256, 3, 1, width), (257, 3, 1, 1), (258, 3, samples, bits_at), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, start), (277, 3, 1, samples), (278, 3, 1, 1), (279, 4, 1, len(data)), (339, 3, 1, form),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *f) for f in fields)
    return struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", entries) + table + bytes(4) + shorts + data


# orientation -> what is seen of the rows 10 20 30 / 40 50 60. The tag says where the file's first row and first column lie:
# 6 is "row 0 at the right, column 0 at the top", and so on (Exif 2.32, tag 0x0112)
SEEN = {
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("orientation", SEEN)
def test_images_are_turned_as_their_orientation_tag_says(orientation, kind, options):
    """huggingface/diffusers#3465 and kohya-ss/sd-scripts#1316: trained on images that lay on their side."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert grey(saved(array(SEEN[1], mode="RGB"), kind, exif=exif, **options)) == SEEN[orientation]


def test_an_orientation_that_means_nothing_turns_nothing():
    rows = array(SEEN[1])
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[0x0112] = value
        assert grey(saved(rows, "PNG", exif=exif)) == SEEN[1]
    assert grey(saved(rows, "PNG", exif=b"Exif\0\0no table")) == SEEN[1]  # damaged beside sound pixels


def test_jpeg_is_turned_before_it_is_cut():
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = saved(Image.new("RGB", (40, 16), (90, 90, 90)), "JPEG", exif=exif)
    assert grids.read(tall).size == (16, 40) and grids.centre_crop(grids.read(tall), 8).size == (8, 8)


def test_palettes_and_what_is_transparent():
    """lucidrains/stylegan2-pytorch#39 (grey with alpha) and NVlabs/stylegan2-ada-pytorch#33 (RGBA) were refused."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 30, 1, 2, 3])
    palette.putdata([0, 1])
    assert rgb(saved(palette, "PNG")) == [[[200, 10, 30], [1, 2, 3]]]
    assert rgb(saved(palette, "PNG", transparency=0)) == [[[255, 255, 255], [1, 2, 3]]]
    assert rgb(saved(palette, "GIF")) == [[[200, 10, 30], [1, 2, 3]]]
    # alpha a over white: c a + 255 (1 - a). 0 at 128/255: 127; 100 at 51/255 = 1/5: 20 + 204 = 224
    assert rgb(saved(array([[[0, 0, 0, 128], [9, 8, 7, 255], [9, 8, 7, 0]]]), "PNG")) == [
        [[127, 127, 127], [9, 8, 7], [255, 255, 255]]
    ]
    grey_alpha = png(3, 1, 8, 4, bytes([0, 100, 51, 7, 255, 7, 0]))  # LA
    assert grey(grey_alpha) == [[224, 7, 255]]
    keyed = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))  # RGB, one clear
    assert rgb(keyed) == [[[255, 255, 255], [4, 5, 6]]]


def test_sixteen_bits_keep_their_upper_eight():
    """junyanz/pytorch-CycleGAN-and-pix2pix#321: 16-bit PNG files came out black; mseitzer/pytorch-fid#62: .tif cut to 8 bits."""
    values = [0x1234, 0xFFFF, 0x00FF, 0x8000]  # 18, 255, 0, 128
    want = [[0x12, 0xFF, 0x00, 0x80]]
    assert grey(png(4, 1, 16, 0, b"\0" + struct.pack(">4H", *values))) == want
    assert grey(tiff(4, 16, struct.pack("<4H", *values))) == want
    assert grey(b"P5 4 1 65535\n" + struct.pack(">4H", *values)) == want
    colour = [[[0x12, 0xFF, 0x00]]]
    assert rgb(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", *values[:3]))) == colour
    assert rgb(tiff(1, 16, struct.pack("<3H", *values[:3]), photometric=2, samples=3)) == colour
    # white is zero: 65535 - v. 12 bits, two numbers in three bytes: 0x800 is 128 of 255, 0xfff is white
    assert grey(tiff(4, 16, struct.pack("<4H", *values), photometric=0)) == [[255 - v for v in want[0]]]
    assert grey(tiff(2, 12, bytes([0x80, 0x0F, 0xFF]))) == [[128, 255]]


def test_other_modes():
    assert grey(png(8, 1, 1, 0, bytes([0, 0b10100000]))) == [[255, 0, 255, 0, 0, 0, 0, 0]]
    assert grey(png(2, 1, 8, 0, bytes([0, 7, 200]))) == [[7, 200]]
    # (1 - C)(1 - K): K = 51/255 = 1/5 leaves 204; C = 1/5 of it, 163.2; M = 2/5 of it, 122.4; Y = 0
    assert rgb(saved(Image.new("CMYK", (1, 1), (51, 102, 0, 51)), "TIFF")) == [[[163, 122, 204]]]
    # 0.25 * 255 = 63.75, 0.5 * 255 = 127.5
    assert grey(tiff(4, 32, struct.pack("<4f", 0, 0.25, 0.5, 1), form=3)) == [[0, 64, 128, 255]]
    assert rgb(saved(array([[[200, 10, 30]]]), "PNG", icc_profile=b"a profile of another screen")) == [[[200, 10, 30]]]


@pytest.mark.parametrize(
    "data, words",
    [
        (tiff(2, 32, struct.pack("<2f", 0, 7), form=3), ["floats from 0 to 7", "from 0 to 1"]),
        (tiff(2, 32, struct.pack("<2f", 0, float("nan")), form=3), ["floats", "nan"]),
        (tiff(2, 32, struct.pack("<2I", 0, 7)), ["32-bit integers"]),
        (tiff(2, 16, struct.pack("<2h", -5, 7), form=2), ["16-bit signed integers"]),
    ],
)
def test_numbers_of_which_nobody_knows_what_is_white_are_refused(data, words):
    with pytest.raises(grids.BrokenImage) as caught:
        grids.read(data)
    assert all(w in str(caught.value) for w in words), str(caught.value)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_read(kind):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert rgb(data)[0][0] == [255, 0, 0]


def test_damaged_files_of_every_kind_are_broken_images():
    for kind in ("BMP", "GIF", "TIFF", "PPM", "PNG", "JPEG", "WEBP"):
        data = saved(array(np.arange(192).reshape(8, 8, 3)), kind)
        for cut in (1, 6, 20, len(data) // 2):
            with pytest.raises(grids.BrokenImage) as caught:
                grids.read(data[:cut])
            assert "\n" not in str(caught.value)


def test_a_machine_without_memory_is_no_broken_image(monkeypatch):
    """Else --broken skip would leave sound images out."""

    def full(*_, **named):
        raise MemoryError

    monkeypatch.setattr(grids.Image, "open", full)
    with pytest.raises(MemoryError):
        grids.read(b"an image")
