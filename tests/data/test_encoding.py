"""Images through an autoencoder into a store, killed and gone on with; a recipe trains on it and samples are decoded."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmt_fast.cli import main
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import latents
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.autoencoder import Codec, Normalisation
from cmt_fast.data.latents import Store
from cmt_fast.render import grids
from tests.fixtures import forked, synthetic


def test_images_of_every_kind_are_read_as_rgb():
    grey = np.tile(np.arange(256, dtype=np.uint16)[:, None] * 257, (1, 300))
    data_, _ = synthetic.encoded(np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2), "I;16", 0)
    found = np.asarray(grids.read(data_))
    assert found.shape == (256, 300, 3) and found[..., 0].tolist() == (grey >> 8).tolist()
    colours = np.zeros((80, 120, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    for k, mode in enumerate(synthetic.MODES * 4):
        found = np.asarray(grids.read(synthetic.encoded(colours, mode, k)[0])).astype(int)
        assert found.shape == ((120, 80, 3) if mode == "turned" else (80, 120, 3))
        want = np.array([200, 40, 90]) if mode not in ("L", "I;16") else found[0, 0, 0]
        assert np.abs(found.mean((0, 1)) - want).max() < 26, mode  # half a step of the palette, which dithers
    from PIL import Image

    clear = Image.fromarray(np.dstack((colours, np.full((80, 120), 0, np.uint8))))
    file = io.BytesIO()
    clear.save(file, "PNG")
    assert np.asarray(grids.read(file.getvalue())).min() == 255
    for how in synthetic.BREAKS:
        with pytest.raises(grids.BrokenImage):
            grids.read(synthetic.broken(how, synthetic.encoded(colours, "RGB", 1)[0]))
    with pytest.raises(grids.BrokenImage, match="narrow"):
        grids.centre_crop(Image.new("RGB", (100_000, 1)), 256)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 700), height=st.integers(1, 700), size=st.sampled_from([8, 64, 256]))
def test_centre_crop_is_square_and_keeps_the_middle(width, height, size):
    from PIL import Image

    x = np.linspace(0, 255, width)[None, :, None] + np.zeros((height, 1, 3))
    found = np.asarray(grids.centre_crop(Image.fromarray(x.astype(np.uint8)), size)).astype(float)
    assert found.shape == (size, size, 3)
    if min(width, height) >= 8:
        assert abs(found.mean() - 127) < 127 / min(width, size) + 130 / width + 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """60 images, two of them broken, and a small autoencoder."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("images")
    bad = synthetic.images(folder / "images", 60, classes=3, largest=160, every=29)
    synthetic.vae(folder / "vae", width=8)
    return folder, bad


def test_the_codec_undoes_itself_in_shape_and_knows_its_weights(world):
    from diffusers import AutoencoderKL

    folder, _ = world
    codec, half = (Codec.open(str(folder / "vae"), "cpu", dtype=d) for d in (torch.float32, torch.bfloat16))
    assert codec.digest == half.digest and half.vae.dtype == torch.bfloat16 and codec.factor == 8
    assert codec.normalisation == Normalisation((0.0,) * 4, (1.0,) * 4, 0.18215)  # AutoencoderKL's own
    x = torch.rand(3, 3, 32, 48) * 2 - 1
    mean, std = codec.encode(x)
    assert mean.shape == std.shape == (3, 4, 4, 6) and bool((std > 0).all())
    torch.testing.assert_close(half.encode(x)[0], mean, atol=0.05, rtol=0.05)
    plain = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        want = plain.decode(mean / plain.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(mean, batch=2), want)
    for name, text in (
        ("nowhere", "no hub id"),
        ("some/body", "no copy on this machine"),
        (str(folder / "images"), "config.json"),
    ):
        with pytest.raises(ConfigError, match=text):
            Codec.open(name, "cpu")
    with pytest.raises(ConfigError, match="4 channels, the data have 2"):
        Codec.open(str(folder / "vae"), "cpu", Normalisation((0.0, 0.0), (1.0, 1.0)))


def encode(folder: Path, out: str, *more: str) -> list[str]:
    paths = [str(folder / "images"), str(folder / out), "--vae", str(folder / "vae")]
    options = ["--size", "32", "--flip", "--batch", "4", "--shard-rows", "8", "--broken", "skip", "--device", "cpu"]
    return ["data", "encode", *paths, *options, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def encoded(world):
    folder, _ = world
    assert main(encode(folder, "store")) == 0
    return folder / "store"


def test_encode_reports_what_is_broken(world, encoded, capsys):
    folder, bad = world
    names = [line.split("\t")[0] for line in (encoded / "broken.tsv").read_text().splitlines()]
    assert names == bad and len(bad) == 2
    assert main(["data", "verify", str(encoded)]) == 0 and main(["data", "stats", str(encoded)]) == 0
    out = capsys.readouterr().out
    assert "116 rows of mean+std float16 8 x 4 x 4, 3 classes" in out and "sound, 116 rows" in out
    index = latents.read_index(encoded)
    assert index.class_names == ("class-0", "class-1", "class-2") and index.flips and index.source == "images images"
    for c, line in enumerate(line for line in out.splitlines() if line.startswith("channel")):
        assert f"mean {index.mean[c]:.4f} (index {index.mean[c]:.4f}), std {index.std[c]:.4f} (" in line
    assert main([*encode(folder, "other"), "--broken", "fail"]) == 2
    assert bad[0] in capsys.readouterr().err
    shutil.rmtree(folder / "other.part")
    assert main(encode(folder, "store")) == 2 and "exists" in capsys.readouterr().err


def test_rows_are_what_the_autoencoder_says(world, encoded):
    from diffusers import AutoencoderKL
    from PIL import Image

    folder, bad = world
    files = sorted(p.relative_to(folder / "images").as_posix() for p in (folder / "images").rglob("*.*"))
    files = [f for f in files if f not in bad]
    vae, s = AutoencoderKL.from_pretrained(folder / "vae"), Store(encoded, flip=True)
    for row in (0, 17, 57):
        image = grids.centre_crop(grids.read((folder / "images" / files[row]).read_bytes()), 32)
        for place, turned in ((row, image), (row + 58, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
            x = torch.from_numpy(np.asarray(turned).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            with torch.no_grad():
                found = vae.encode(x).latent_dist
            want = torch.cat((found.mean, found.std), 1)
            torch.testing.assert_close(s.read(torch.tensor([place])).float(), want, atol=2e-3, rtol=2e-3)
        assert int(s.labels[row]) == int(files[row][6])


def test_a_killed_encoding_goes_on_to_the_same_bytes(world, encoded):
    folder, _ = world
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*forked.python(), "-m", "cmt_fast", *encode(folder, "killed")], env=env, stdout=subprocess.DEVNULL
    )
    half = folder / "killed.part" / "shard-00002.json"
    deadline = time.monotonic() + 240
    while not half.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and half.is_file() and not (folder / "killed").exists()
    with pytest.raises(DatasetError, match="has not ended"):
        Store(folder / "killed")
    before = (folder / "killed.part" / "shard-00001.bin").stat().st_mtime_ns
    (folder / "killed.part" / "shard-00004.part").write_bytes(b"torn")
    assert main([*encode(folder, "killed"), "--broken", "fail"]) == 2  # what was left out before is not passed over
    assert main(encode(folder, "killed")) == 0
    assert contents(folder / "killed") == contents(encoded)
    assert (folder / "killed" / "shard-00001.bin").stat().st_mtime_ns == before  # it was not made again
    assert not (folder / "killed.part").exists()


def test_two_ranks_write_the_same_bytes(world, encoded, monkeypatch):
    from cmt_fast.runtime import distributed

    folder, _ = world
    (folder / "ranks.part").mkdir()
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(distributed, "largest", lambda n: n)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert main(encode(folder, "ranks")) == 0
    assert contents(folder / "ranks") == contents(encoded)


RECIPE = {
    "name": "latents",
    "model": {"kind": "dit", "width": 16, "depth": 1, "heads": 2},
    "path": "ve",
    "pre": {"objective": {"kind": "denoise"}, "images_nimg": 160, "batch": 16},
    "mid": {
        "objective": {"kind": "cmt_cm"}, "images_nimg": 32, "batch": 16, "start": "pre", "teacher": "pre",
        "trajectories": {"pool_steps": 2},
    },
    "post": {"objective": {"kind": "ect"}, "images_nimg": 32, "batch": 16, "start": "mid"},
    "sampler": {"teacher_steps": 4},
    "eval": {"n": 32, "n_during": 16},
}  # fmt: skip


def test_a_recipe_trains_on_a_store_and_samples_are_decoded(world, encoded, tmp_path, monkeypatch, capsys):
    folder, _ = world
    recipe = {**RECIPE, "data": {"kind": "latents", "path": str(encoded), "flip": True}, "device": "cpu"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "r.yaml", "--out", "run"]) == 0
    assert main(["sample", "run/post", "--n", "5", "--decode", "--out", "x.npz", "--grid", "x.png"]) == 0
    with np.load("x.npz") as found:
        images, labels = found["images"], found["labels"]
    assert images.shape == (5, 3, 32, 32) and images.dtype == np.uint8
    rows = Store(encoded).labels.bincount().numpy()
    assert (abs(np.bincount(labels, minlength=3) - 5 * rows / rows.sum()) < 1).all()  # as the store's
    assert main(["sample", "run/post", "--n", "5", "--decode", "--out", "pngs/"]) == 0
    assert all(
        np.array_equal(np.array(Image.open(f"pngs/{i:06d}.png")), images[i].transpose(1, 2, 0)) for i in range(5)
    )
    assert main(["sample", "run/post", "--n", "5", "--out", "latents/"]) == 2 and not os.path.exists("latents")
    assert "latents are no images; add --decode" in capsys.readouterr().err
    assert main(["sample", "run/post", "--n", "5", "--out", "z.npz"]) == 0
    with np.load("z.npz") as found:
        z = torch.from_numpy(found["images"])
    from diffusers import AutoencoderKL

    n = Store(encoded).normalisation
    raw = z / 0.5 * torch.tensor(n.std).view(-1, 1, 1) + torch.tensor(n.mean).view(-1, 1, 1)
    with torch.no_grad():
        want = AutoencoderKL.from_pretrained(folder / "vae").decode(raw).sample.clamp(-1, 1)
    assert np.abs((want.numpy() + 1) * 127.5 - images).max() < 1
    synthetic.vae(tmp_path / "other", seed=1, width=8)
    capsys.readouterr()
    assert main(["sample", "run/post", "--decode", "--vae", "other", "--grid", "y.png"]) == 2
    assert "is not the autoencoder" in capsys.readouterr().err
    (folder / "vae").rename(folder / "moved")
    try:
        assert main(["sample", "run/post", "--n", "5", "--decode", "--grid", "y.png"]) == 2
        assert main(["sample", "run/post", "--n", "5", "--grid", "y.png"]) == 0
    finally:
        (folder / "moved").rename(folder / "vae")
    assert "3 of 4 channels" in capsys.readouterr().out
