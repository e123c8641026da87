"""Numbers that cannot be meant as they are: refused with what they are and the key that mends it, which does; others pass."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import datasets, values
from cmt_fast.data.latents import Store
from cmt_fast.data.writing import Layout, Writer
from tests.fixtures.hostile_stores import npy

DICE = np.random.default_rng(0)
LATENTS = DICE.standard_normal((40, 4, 8, 8)).astype(np.float32)  # std 1
SD = np.array([4.17, 4.62, 3.71, 3.28], np.float32).reshape(4, 1, 1)  # of Stable Diffusion's latents, by EDM2
RAW = LATENTS * SD + np.array([5.81, 3.25, 0.12, -2.15], np.float32).reshape(4, 1, 1)
LEVELS = DICE.integers(0, 256, (40, 3, 8, 8)).astype(np.float32)  # pixels 0..255
DARK = DICE.integers(0, 9, (40, 3, 8, 8)).astype(np.float32)  # all but black


def loaded(tmp_path: Path, images: np.ndarray, *more: str) -> torch.Tensor:
    np.savez(tmp_path / "data.npz", images=images)
    config = loading.load("digits", [f"data={{kind: npz, path: {tmp_path}/data.npz}}", *more]).data
    try:
        return datasets.load(config).x
    except ConfigError:
        raise
    except ValueError as error:  # as a run's workspace raises it
        raise ConfigError(str(error)) from None


def refused(call, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(w in text for w in words), text
    return text


# what a file holds, what is said of it, the key that mends it, what then is trained on
NPZ = {
    "levels": (LEVELS, ["from 0 to 255", "mean 12", "std 7"], "data.range=[0, 255]", LEVELS / 127.5 - 1),
    "sixteen bits": (LEVELS * 257, ["from 0 to 6.554e+04"], "data.range=[0, 65535]", LEVELS / 127.5 - 1),
    "0 to 1": (LEVELS / 255, ["from 0 to 1", "look like 0 to 1"], "data.range=[0, 1]", LEVELS / 127.5 - 1),
    "overshoot": (LEVELS / 255 * 1.1 - 0.05, ["look like 0 to 1"], "data.range=[0, 1]", None),
    "dark levels": (DARK * 4, ["from 0 to 32"], "data.range=[0, 255]", DARK * 4 / 127.5 - 1),
    "no factor": (RAW, ["without their factor", "std is 3.97"], "data.range=[-5.49, 5.49]", RAW / 5.49),
    "factor twice": (RAW * 0.18215**2, ["applied twice"], "data.range=[-0.18215, 0.18215]", RAW * 0.18215),
    "levels about 0": (LEVELS - 127.5, ["pixels about 0"], "data.range=[-127.5, 127.5]", LEVELS / 127.5 - 1),
    "black and white": ((LEVELS > 99).astype(np.uint8), ["from 0 to 1", "black and white"], "data.range=[0, 1]", None),
    "channels last": (LEVELS.transpose(0, 2, 3, 1) / 127.5 - 1, ["(40, 8, 8, 3)"], "data.layout=hwc", LEVELS / 127.5 - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NPZ)
def test_a_file_of_other_numbers_says_which_key_mends_it(tmp_path, name):
    """lucidrains/denoising-diffusion-pytorch#20 (0..255), sangyun884/blur-diffusion#4, LeeJunHyun/Image_Segmentation#29."""
    images, words, key, want = NPZ[name]
    text = refused(lambda: loaded(tmp_path, images), "data.npz", *words, key)
    assert text.startswith(key.split("=")[0] + ": ")
    said = text[text.index(key) :].split("]")[0] + "]" if "range" in key else key
    x = loaded(tmp_path, images, said).numpy()
    if want is not None:
        np.testing.assert_allclose(x, want, atol=2e-3 * np.abs(want).max())
    kept = loaded(tmp_path, images, "data.unchecked=true").numpy()  # as they are
    np.testing.assert_allclose(kept, images / 127.5 - 1 if images.dtype == np.uint8 else images, atol=1e-6)


def test_a_range_that_does_not_mend_it_is_refused_too(tmp_path):
    refused(lambda: loaded(tmp_path, LEVELS, "data.range=[0, 1]"), "data.range", "from -1 to 509", "[0.0, 1.0]")
    refused(lambda: loaded(tmp_path, LEVELS, "data.range=[1, 1]"), "data.range", "1 is not below 1")


SOUND = {
    "z-scored": LATENTS,
    "std of 0.5": LATENTS / 2,
    "std of 0.25": LATENTS / 4,
    "Stable Diffusion's with their factor": RAW * 0.18215,
    "pixels": LEVELS / 127.5 - 1,
    "dark": DARK / 127.5 - 1,
    "bright": 1 - DARK / 127.5,
    "part of the range": (LEVELS / 255 - 0.5) * 0.3,
    "bright half, and one black pixel": np.where(np.arange(40).reshape(-1, 1, 1, 1) == 0, -1, LEVELS / 255),
    "skewed": (np.exp(LATENTS) - 1.65) / 2.16,
    "three channels": LATENTS[:, :3],
    "uint8": LEVELS.astype(np.uint8),
    "dark uint8": DARK.astype(np.uint8),
    "four rows of four": LATENTS.reshape(160, 4, 4, 4),
    "one": LATENTS[:1],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_numbers_pass(tmp_path, name):
    images = SOUND[name] if SOUND[name].dtype == np.uint8 else SOUND[name].astype(np.float32)
    x = loaded(tmp_path, images).numpy()
    np.testing.assert_allclose(x, images / 127.5 - 1 if images.dtype == np.uint8 else images, atol=1e-6)


def test_channels_that_say_nothing(tmp_path, recwarn):
    flat, faint = LATENTS.copy(), LATENTS.copy()
    flat[:, 2], faint[:, 1] = 1.0, faint[:, 1] / 200
    refused(
        lambda: loaded(tmp_path, flat), "data.unchecked", "channel 2 is the same number everywhere", "0.993, 0, 0.992"
    )
    refused(lambda: loaded(tmp_path, faint), "channel 1 is nearly the same number everywhere")
    assert loaded(tmp_path, flat, "data.unchecked=true").shape == flat.shape
    refused(lambda: loaded(tmp_path, np.zeros((1, 3, 8, 8), np.float32)), "channel 0 is the same number everywhere")
    assert not list(recwarn)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(tmp_path, number):
    images = LATENTS.copy()
    images[3, 1, 2, 2] = number
    refused(lambda: loaded(tmp_path, images, "data.unchecked=true"), "data.path", "not all finite")
    for k, row in enumerate(images):
        (tmp_path / "rows").mkdir(exist_ok=True)
        np.save(tmp_path / "rows" / f"{k}.npy", row)
    for more in ([], ["--unchecked"]):
        assert main(["data", "import", str(tmp_path / "rows"), str(tmp_path / "out"), "--format", "npy", *more]) == 2


def test_shapes_and_types_of_other_kinds(tmp_path):
    refused(lambda: loaded(tmp_path, LEVELS[:, 0]), "(40, 8, 8)", "images[:, None]")
    refused(lambda: loaded(tmp_path, LATENTS.astype(np.float64)), "float64", "astype(np.float32)")


def source(folder: Path, format: str, rows: np.ndarray) -> Path:
    """Rows as another project stores them."""
    if format == "lightningdit":
        folder.mkdir()
        save_file({"latents": rows, "labels": np.zeros(len(rows), np.int64)}, folder / "a.safetensors")
    elif format == "edm2":
        with zipfile.ZipFile(folder, "w") as file:
            for k, row in enumerate(rows):
                file.writestr(f"{k:03d}.npy", npy(np.concatenate((row, np.full_like(row, 0.01)))))
    else:
        folder.mkdir()
        for k, row in enumerate(rows):
            np.save(folder / f"{k}.npy", row)
    return folder


IMPORTED = {
    "levels": (LEVELS, "0 to 255"),
    "0 to 1": (LEVELS / 255, "0 to 1"),
    "a factor left in, twice": (RAW * 0.18215**2, "a factor is left in them"),
    "far too large": (RAW / 0.18215, "divided by a factor"),
}


@pytest.mark.parametrize("format", ["npy", "edm2", "lightningdit"])
@pytest.mark.parametrize("name", IMPORTED)
def test_import_looks_at_the_numbers_before_it_writes(tmp_path, capsys, format, name):
    """explainingai-code/StableDiffusion-PyTorch#33, hustvl/LightningDiT#34: the factor, or the normalisation, was forgotten."""
    rows, words = IMPORTED[name]
    made = source(tmp_path / "source", format, rows)
    command = ["data", "import", str(made), str(tmp_path / "out"), "--format", format, "--dtype", "fp32"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err and "--factor" in err and "--unchecked" in err and "std" in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert main([*command, "--unchecked"]) == 0
    assert np.array_equal(Store(tmp_path / "out").read(torch.arange(len(rows))).numpy()[:, : rows.shape[1]], rows)


@pytest.mark.parametrize("format", ["npy", "edm2", "lightningdit"])
def test_a_factor_that_is_left_out_or_given_too_much(tmp_path, capsys, format):
    small, large = source(tmp_path / "small", format, RAW * 0.18215**2), source(tmp_path / "large", format, RAW)
    command = lambda made, out: [
        "data",
        "import",
        str(made),
        str(tmp_path / out),
        "--format",
        format,
        "--dtype",
        "fp32",
    ]
    assert main([*command(small, "a"), "--factor", "0.03318"]) == 0  # 0.18215 twice is divided out
    assert main(command(large, "b")) == 0
    assert "--factor" not in capsys.readouterr().out
    once = source(tmp_path / "once", format, RAW * 0.18215)  # as DiT keeps its features
    assert main(command(once, "d")) == 0
    assert (
        "if these were multiplied by an autoencoder's factor (DiT: 0.18215), import them with --factor"
        in capsys.readouterr().out
    )
    assert main([*command(once, "e"), "--factor", "0.18215"]) == 0 and "--factor" not in capsys.readouterr().out
    np.testing.assert_allclose(Store(tmp_path / "e").index.std, Store(tmp_path / "b").index.std, rtol=1e-3)
    assert main([*command(large, "c"), "--factor", "0.18215"]) == 2  # they never had it: 3.97 / 0.18215
    assert "after --factor 0.18215" in capsys.readouterr().err
    np.testing.assert_allclose(Store(tmp_path / "b").index.std, SD.ravel(), rtol=0.1)


def test_import_of_channels_last(tmp_path, capsys):
    made = source(tmp_path / "source", "npy", np.ascontiguousarray(RAW.transpose(0, 2, 3, 1)))
    assert main(["data", "import", str(made), str(tmp_path / "out"), "--format", "npy"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "(8, 8, 4)" in err and "transpose(2, 0, 1)" in err


def store(folder: Path, rows: np.ndarray, kind: str = "mean", dtype: str = "float32") -> Path:
    writer = Writer(folder)
    writer.start()
    layout = Layout(kind, dtype, rows.shape[1:])
    with writer.shard(0, layout, "key") as into:
        into.add(rows.astype(dtype), [None] * len(rows), "test")
    about = {"flips": False, "class_names": (), "vae": "", "vae_xxh3_128": "", "crop": "", "source": "test"}
    writer.finish(layout, ["key"], about)
    return folder


def opened(folder: Path, *more: str):
    return datasets.load(loading.load("digits", [f"data={{kind: latents, path: {folder}}}", *more]).data)


GIVEN = ["data.mean=[0, 0, 0, 0]", "data.std=[1, 1, 1, 1]"]


@pytest.mark.parametrize("times, said", [(1, 3.97), (0.18215**2, 0.13)])
def test_a_store_whose_factor_does_not_fit_the_recipe(tmp_path, times, said):
    folder = store(tmp_path / "s", RAW * np.float32(times))
    scale = {1: 1.0, 0.18215**2: 1.0}[times]
    text = refused(
        lambda: opened(folder, *GIVEN, f"data.scale={scale}"), "data.scale", "mean near 0", "data.unchecked=true"
    )
    key = next(
        w for w in text.replace(",", " ").split() if w.startswith("data.scale=") and w != f"data.scale={scale:g}"
    )
    made = opened(folder, *GIVEN, key)  # the key that the line names
    assert abs(made.rows(torch.arange(40))[0].std(dim=(0, 2, 3)).square().mean().sqrt() - 0.5) < 0.01
    assert opened(folder, *GIVEN, f"data.scale={scale}", "data.unchecked=true").n == 40
    own = opened(folder).rows(torch.arange(40))[0]  # without mean and std the store's own hold
    torch.testing.assert_close(own.std(dim=(0, 2, 3)), torch.full((4,), 0.5), atol=1e-2, rtol=0)
    assert said == pytest.approx(values.Spread(0, 0, (0,) * 4, tuple((SD.ravel() * times).tolist())).all, rel=0.02)


def test_a_store_that_fits_passes(tmp_path):
    folder = store(tmp_path / "s", RAW)
    assert opened(folder, *GIVEN, "data.scale=0.18215").n == 40
    edm2 = ["data.mean=[5.81, 3.25, 0.12, -2.15]", "data.std=[4.17, 4.62, 3.71, 3.28]"]
    assert opened(folder, *edm2).n == opened(folder).n == 40
    refused(
        lambda: opened(store(tmp_path / "z", LATENTS), *edm2), "data.scale", "std 0.1"
    )  # not the latents it is made for


def test_pixel_stores(tmp_path):
    assert opened(store(tmp_path / "dark", DARK, "pixels", "uint8")).n == 40
    binary = store(tmp_path / "binary", (LEVELS > 99).astype(np.float32), "pixels", "uint8")
    refused(lambda: opened(binary), "data.path", "nearly the same number", "std 0.4")
    assert opened(binary, "data.unchecked=true").n == 40
    rgb = store(tmp_path / "rgb", LEVELS, "pixels", "uint8")
    refused(lambda: opened(rgb, "data.mean=[0, 0, 0]", "data.std=[1, 1, 1]", "data.scale=1"), "data.scale", "std 7")
    assert opened(rgb, "data.mean=[124, 116, 104]", "data.std=[58, 57, 57]", "data.scale=1").n == 40


def test_a_store_with_a_channel_that_says_nothing(tmp_path):
    rows = RAW.copy()
    rows[:, 3] *= 1e-3
    folder = store(tmp_path / "s", rows)
    refused(lambda: opened(folder), "channel 3 is nearly the same number everywhere", "data.std")
    assert opened(folder, "data.mean=[5.81, 3.25, 0, 0]", "data.std=[4, 4, 4, 4]").n == 40
    assert opened(folder, "data.unchecked=true").n == 40


@pytest.mark.parametrize("container", ["zip", "tar", "folder"])
@pytest.mark.parametrize("top", ["", "cifar/", "a/b/"])
def test_dataset_json_in_any_folder(tmp_path, capsys, container, top):
    """NVlabs/edm2#11, Zhendong-Wang/Patch-Diffusion#4: where dataset.json is, and what its names begin at."""
    from PIL import Image

    members = {f"{top}00000/img{k}.png": None for k in range(3)} | {f"__MACOSX/{top}00000/._img0.png": b"x"}
    rows = {}
    for k, name in enumerate(list(members)[:3]):
        rows[k] = LEVELS[k].astype(np.uint8)
        Image.fromarray(rows[k].transpose(1, 2, 0)).save(tmp_path / "row.png")
        members[name] = (tmp_path / "row.png").read_bytes()
    members[f"{top}dataset.json"] = json.dumps({"labels": [[f"00000/img{k}.png", 2 - k] for k in range(3)]}).encode()
    for name, data in members.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    made = tmp_path / "source"
    if container == "zip":
        with zipfile.ZipFile(tmp_path / "made", "w") as file:
            for name, data in members.items():
                file.writestr(name, data)
    elif container == "tar":
        with tarfile.open(tmp_path / "made", "w") as file:
            for name in members:
                file.add(made / name, name)
    made = made if container == "folder" else tmp_path / "made"
    assert main(["data", "import", str(made), str(tmp_path / "out"), "--format", "edm"]) == 0
    found = Store(tmp_path / "out")
    assert found.labels.tolist() == [2, 1, 0]
    assert np.array_equal(found.read(torch.arange(3)).numpy(), np.stack([rows[k] for k in range(3)]))
    assert "left out 1 files that systems leave behind: __MACOSX" in capsys.readouterr().out


def test_two_files_dataset_json_are_two_data_sets(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as file:
        for top in ("a", "b"):
            file.writestr(f"{top}/0.npy", npy())
            file.writestr(f"{top}/dataset.json", json.dumps({"labels": [["0.npy", 0]]}))
    assert main(["data", "import", str(tmp_path / "made.zip"), str(tmp_path / "out"), "--format", "edm2"]) == 2
    assert "2 files dataset.json (a/dataset.json, b/dataset.json)" in capsys.readouterr().err
