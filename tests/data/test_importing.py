"""Latents and images of other projects: every format and container gives the rows that went in."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from cmt_fast.data import archives
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.importing import Settings, convert
from cmt_fast.data.latents import Store
from tests.fixtures import synthetic
from tests.fixtures.hostile_stores import npy


def imported(tmp_path: Path, source: Path, format: str, shard_rows: int = 100, **more) -> Store:
    settings = Settings(format, **{"dtype": "float32"} | more)
    convert(source, tmp_path / "out", settings, shard_rows=shard_rows)
    return Store(tmp_path / "out", flip=settings.flip)


@pytest.mark.parametrize("container", ["stored", "deflated", "tar", "folder"])
def test_import_edm2(tmp_path, container):
    import tarfile

    rng = np.random.default_rng(0)
    rows = np.abs(rng.normal(1, 1, (130, 8, 2, 2))).astype(np.float32)
    names = [f"{k // 50:05d}/img-mean-std-{k:08d}.npy" for k in range(130)]
    files = {name: npy(row) for name, row in zip(names, rows)}
    files["dataset.json"] = json.dumps({"labels": [[n, k % 7] for k, n in enumerate(names)]}).encode()
    source = tmp_path / "source"
    if container in ("stored", "deflated"):
        with zipfile.ZipFile(
            source, "w", zipfile.ZIP_DEFLATED if container == "deflated" else zipfile.ZIP_STORED
        ) as file:
            for name in reversed(files):
                file.writestr(name, files[name])
    elif container == "tar":
        with tarfile.open(source, "w") as file:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    else:
        for name, content in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    s = imported(tmp_path, source, "edm2", shard_rows=60)
    assert len(s.index.shards) == 3 and s.index.kind == "mean+std" and s.classes == 7
    assert np.array_equal(s.read(torch.arange(130)).numpy(), rows)
    assert s.labels.tolist() == [k % 7 for k in range(130)]
    half = (
        imported(tmp_path / "source.half", source, "edm2", dtype="float16")
        if (tmp_path / "source.half").mkdir() is None
        else s
    )
    assert np.array_equal(half.read(torch.arange(130)).numpy(), rows.astype(np.float16))


def test_import_lightningdit(tmp_path):
    rng = np.random.default_rng(0)
    parts = [
        {k: rng.normal(size=(n, 4, 2, 2)).astype(np.float32) for k in ("latents", "latents_flip")} for n in (70, 5)
    ]
    (tmp_path / "source").mkdir()
    for k, part in enumerate(parts):
        save_file(
            {**part, "labels": np.arange(len(part["latents"])) % 4},
            tmp_path / "source" / f"latents_rank00_shard{k:03d}.safetensors",
        )
    s = imported(tmp_path, tmp_path / "source", "lightningdit", flip=True)
    want = np.concatenate([p[k] for k in ("latents", "latents_flip") for p in parts])
    assert np.array_equal(s.read(torch.arange(150)).numpy(), want) and s.n == 150
    assert s.labels.tolist() == [*(k % 4 for k in range(70)), *range(4), 0] * 2


def test_import_npy_in_three_ways(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 1, 4, 2, 2)).astype(np.float32)
    for k, row in enumerate(rows):  # numbered files: 10 comes after 9
        for name, content in (
            ("dit/imagenet256_features", row),
            ("dit/imagenet256_labels", np.array([k % 5])),
            (f"classes/c{k % 3}", row),
            ("flat", row[0]),
        ):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / name / f"{k}.npy", content)
    for name in ("dit", "flat", "classes"):
        (tmp_path / f"{name}-out").mkdir()
        s = imported(tmp_path / f"{name}-out", tmp_path / name, "npy")
        order = [k for c in range(3) for k in sorted(range(c, 12, 3), key=str)] if name == "classes" else range(12)
        assert np.array_equal(s.read(torch.arange(12)).numpy(), rows[list(order), 0])
        want = {"dit": [k % 5 for k in range(12)], "flat": None, "classes": [0] * 4 + [1] * 4 + [2] * 4}[name]
        assert (s.labels if want is None else s.labels.tolist()) == want
    assert s.class_names == ("c0", "c1", "c2")
    (tmp_path / "scaled").mkdir()
    s = imported(tmp_path / "scaled", tmp_path / "dit", "npy", factor=0.5)  # halves are exact
    assert np.array_equal(s.read(torch.arange(12)).numpy(), 2 * rows[:, 0])


def test_import_edm_pixels(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    with zipfile.ZipFile(tmp_path / "cifar.zip", "w") as file:
        for k, image in enumerate(images):
            file.writestr(f"00000/img{k:08d}.png", synthetic.encoded(image, "RGB", 1)[0])
        file.writestr("dataset.json", json.dumps({"labels": [[f"00000/img{k:08d}.png", k % 2] for k in range(6)]}))
    s = imported(tmp_path, tmp_path / "cifar.zip", "edm")
    x, labels = s.rows(torch.arange(6))
    assert s.index.kind == "pixels" and labels.tolist() == [0, 1] * 3
    torch.testing.assert_close(x, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert float(x.min()) >= -1 and float(x.max()) <= 1


def test_a_picture_of_one_colour_is_no_bomb(tmp_path):
    """Zeros are deflated to a thousandth; what would fill the memory is still refused."""
    for shape, sound in (((3, 512, 512), True), ((3, 2048, 2048), False)):
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/0.npy", npy(np.zeros(shape, np.uint8)))
        if sound:
            assert archives.array(archives.Archive(tmp_path / "x.zip").read("a/0.npy"), "x").shape == shape
        else:
            with pytest.raises(DatasetError, match="grows 200 times"):
                archives.Archive(tmp_path / "x.zip")
