"""Stores of latents: what is written is what is read, damage is seen, the loader reads ahead the same rows."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmt_fast.cli import main
from cmt_fast.config.schema import Latents
from cmt_fast.data import datasets, latents
from cmt_fast.data import rows as rows_
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.autoencoder import Normalisation
from cmt_fast.data.latents import Store
from cmt_fast.data.order import Loader
from cmt_fast.data.writing import Layout, Writer
from cmt_fast.evaluation import tallies
from cmt_fast.evaluation.features import extractor
from cmt_fast.evaluation.judges import Judge
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop

CPU = torch.device("cpu")
ROWS = 37


def made(
    folder: Path, kind: str = "mean+std", dtype: str = "float16", flips: bool = False, shard_rows: int = 10
) -> np.ndarray:
    """A store of random rows with three classes; returns the rows that it was given."""
    rng = np.random.default_rng(1)
    n = ROWS * (1 + flips)
    rows = np.concatenate((rng.normal(3, 5, (n, 2, 4, 4)), rng.uniform(0.1, 2, (n, 2, 4, 4))), 1).astype(np.float32)
    rows = (
        rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
        if kind == "pixels"
        else rows
        if kind == "mean+std"
        else rows[:, :2]
    )
    labels = [k % 3 for k in range(ROWS)] * (1 + flips)
    layout = Layout(kind, dtype, rows.shape[1:])
    writer = Writer(folder)
    writer.start()
    keys = [str(i) for i in range(0, n, shard_rows)]
    for k in range(len(keys)):
        with writer.shard(k, layout, keys[k]) as shard:
            some = slice(k * shard_rows, (k + 1) * shard_rows)
            shard.add(rows[some], labels[some], "rows")
    facts = {
        "flips": flips,
        "class_names": ["a", "b", "c"],
        "vae": "",
        "vae_xxh3_128": "",
        "crop": "",
        "source": "test",
    }
    writer.finish(layout, keys, facts)
    return rows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of means and standard deviations and what went into it."""
    folder = tmp_path_factory.mktemp("store") / "store"
    return folder, made(folder)


def test_rows_are_normalised_draws(store):
    folder, rows = store
    s, index = Store(folder), torch.arange(ROWS)
    assert (s.n, s.shape, s.classes) == (ROWS, (2, 4, 4), 3)
    stored = torch.from_numpy(rows.astype(np.float16)).float()
    m, std = stored[:, :2], stored[:, 2:]
    n = s.normalisation
    want = lambda x: (x - torch.tensor(n.mean).view(-1, 1, 1)) / torch.tensor(n.std).view(-1, 1, 1) * 0.5
    z, labels = s.rows(index)
    torch.testing.assert_close(z, want(m))
    assert labels.tolist() == [k % 3 for k in range(ROWS)]
    # what is drawn has the moments of the rows: eps = (x - mean) / std is standard normal
    draws = [s.rows(index, torch.full_like(index, k), seed=5)[0] for k in range(200)]
    x = torch.stack(draws) / 0.5 * torch.tensor(n.std).view(-1, 1, 1) + torch.tensor(n.mean).view(-1, 1, 1)
    eps = ((x - m) / std).double()
    assert abs(float(eps.mean())) < 4 / eps.numel() ** 0.5
    assert abs(float(eps.var()) - 1) < 4 * (2 / eps.numel()) ** 0.5
    # over the data they have standard deviation 0.5 and mean 0, channel by channel
    every = torch.cat(draws).transpose(0, 1).flatten(1)
    torch.testing.assert_close(every.std(1), torch.full((2,), 0.5), atol=0.002, rtol=0)
    torch.testing.assert_close(every.mean(1), torch.zeros(2), atol=0.004, rtol=0)


def test_noise_is_a_function_of_seed_draw_and_row_alone(store):
    s, index = Store(store[0]), torch.arange(ROWS)
    whole, _ = s.rows(index, index * 0 + 3, seed=1)
    order = torch.randperm(ROWS)
    assert torch.equal(s.rows(order[:9], order[:9] * 0 + 3, seed=1)[0], whole[order[:9]])
    assert not torch.equal(s.rows(index, index * 0 + 4, seed=1)[0], whole)
    assert not torch.equal(s.rows(index, index * 0 + 3, seed=2)[0], whole)
    twice, _ = s.rows(torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert not torch.equal(*twice)


def test_mirror_images(tmp_path):
    rows = made(tmp_path / "own", "mean", flips=True)
    off, on = Store(tmp_path / "own"), Store(tmp_path / "own", flip=True)
    assert (off.n, on.n) == (ROWS, 2 * ROWS)
    flipped = on.rows(torch.tensor([ROWS + 5]))[0]
    torch.testing.assert_close(flipped, on.normalisation.apply(torch.from_numpy(rows[ROWS + 5][None]).half().float()))
    assert torch.equal(off.rows(torch.tensor([5]))[0], on.rows(torch.tensor([5]))[0])
    pixels = made(tmp_path / "pixels", "pixels", "uint8")
    s = Store(tmp_path / "pixels", flip=True)
    x, labels = s.rows(torch.tensor([4, ROWS + 4]))
    assert s.n == 2 * ROWS and torch.equal(x[1], x[0].flip(-1)) and labels.tolist() == [1, 1]
    torch.testing.assert_close(x[0], torch.from_numpy(pixels[4]).float() / 127.5 - 1)
    made(tmp_path / "none")
    with pytest.raises(DatasetError, match="data.flip.*--flip"):
        Store(tmp_path / "none", flip=True)


def test_recipe_constants_replace_the_stores(store):
    s = datasets.load(Latents(str(store[0]), mean=(0.0, 0.0), std=(1.0, 1.0), scale=0.18215))
    z, _ = s.rows(torch.tensor([3]))
    torch.testing.assert_close(z, torch.from_numpy(store[1][3:4, :2].astype(np.float16)).float() * 0.18215)
    with pytest.raises(DatasetError, match="data.std: is missing"):
        datasets.load(Latents(str(store[0]), mean=(0.0, 0.0)))
    with pytest.raises(DatasetError, match="need 2 numbers"):
        datasets.load(Latents(str(store[0]), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    n = Normalisation((1.0, -2.0), (3.0, 0.5), 0.7)
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(n.invert(n.apply(x)), x)


def test_reading_ahead_has_one_thread_and_leaves_training_its_own(store):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ahead = Loader(Store(store[0]), 7, CPU, stride=8)
        ahead.rows(torch.arange(8))
        assert ahead._thread.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        ahead.close()
    finally:
        torch.set_num_threads(before)


def test_the_loader_gives_the_same_rows_from_any_step_and_world_size(store):
    s, batch, steps = Store(store[0]), 8, 24  # several epochs, batches across their boundaries
    position = torch.arange(batch)
    plain = Loader(s, 7, CPU)
    want = [plain.rows(position + k * batch) for k in range(steps)]
    order, _ = Loader(rows_.Dataset(torch.arange(ROWS)[:, None].float(), None, 0), 7, CPU).rows(
        torch.arange(batch * steps)
    )
    epoch = torch.arange(batch * steps) // ROWS
    direct, _ = s.rows(order[:, 0].long(), epoch, 7)
    assert torch.equal(torch.cat([x for x, _ in want]), direct)
    for cut in range(20):
        ahead = Loader(s, 7, CPU, stride=batch)
        for k in range(cut, steps):
            x, labels = ahead.rows(position + k * batch)
            assert torch.equal(x, want[k][0]) and torch.equal(labels, want[k][1])
        assert len(ahead._ahead) == Loader.AHEAD  # they were read ahead
        ahead.close()
    for rank in range(2):
        part = Loader(s, 7, CPU, stride=batch)
        for k in range(6):
            assert torch.equal(part.rows(position[rank::2] + k * batch)[0], want[k][0][rank::2])
        part.close()


def test_large_data_are_judged_on_a_part(store, tmp_path):
    s = Store(store[0])
    assert datasets.in_memory(s, 10).x.shape == (10, 2, 4, 4) and datasets.in_memory(s).n == ROWS
    judge = Judge(s, extractor(s, tmp_path))
    assert tallies.figures(judge, datasets.in_memory(s).x, s.labels)["frechet"] < 1e-6


def flip_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


def test_damaged_rows_stop_what_reads_them_and_verify_names_them(store, tmp_path, capsys):
    shutil.copytree(store[0], tmp_path / "s")
    stride = 4 * 4 * 4 * 2
    flip_bit(tmp_path / "s" / "shard-00001.bin", 3 * stride + 7)
    flip_bit(tmp_path / "s" / "shard-00003.bin", 6 * stride)
    s = Store(tmp_path / "s")
    s.rows(torch.arange(13))
    with pytest.raises(DatasetError, match=r"shard-00001.bin: row 3 \(row 13 of the store\) is damaged"):
        s.rows(torch.tensor([13]))
    loader = Loader(s, 0, CPU, stride=4)
    with pytest.raises(DatasetError, match="is damaged"):
        for k in range(10):
            loader.rows(torch.arange(4) + 4 * k)
    loader.close()
    assert [line.split("(")[1][:6] for line in s.verify()] == ["row 13", "row 36"]
    assert main(["data", "verify", str(tmp_path / "s")]) == 2
    err = capsys.readouterr().err
    assert "row 36 of the store" in err and "2 of 37 rows are damaged" in err
    assert main(["data", "verify", str(store[0])]) == 0


BREAKS = {
    "short shard": (
        lambda f: (f / "shard-00002.bin").write_bytes(b"x" * 100),
        "shard-00002.bin: has 100 bytes, not 1,280",
    ),
    "long shard": (lambda f: os.truncate(f / "shard-00000.bin", 1281), "has 1,281 bytes"),
    "no shard": (lambda f: (f / "shard-00003.bin").unlink(), "shard-00003.bin: is missing"),
    "label": (lambda f: flip_bit(f / "labels.npy", 140), "labels.npy: is damaged"),
    "checksums": (lambda f: flip_bit(f / "checksums.npy", 140), "checksums.npy: is damaged"),
    "index": (lambda f: flip_bit(f / "index.json", 40), "index.json"),
    "no index": (lambda f: (f / "index.json").unlink(), "is no store"),
    "large index": (lambda f: os.truncate(f / "index.json", 65 << 20), "too many"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_damaged_store_is_refused(store, tmp_path, name):
    shutil.copytree(store[0], tmp_path / "s")
    damage, text = BREAKS[name]
    damage(tmp_path / "s")
    with pytest.raises(DatasetError, match=text):
        Store(tmp_path / "s")


def signed(body: dict) -> str:
    body = {k: v for k, v in body.items() if k != "xxh3_128"}
    return json.dumps({**body, "xxh3_128": xxhash.xxh3_128_hexdigest(checkpoint.canonical(body))})


LIES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.lists(st.integers(0, 9), max_size=4), st.sampled_from(["mean", "pixels", "float32", "uint8", "../labels.npy"]),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    key=st.sampled_from([f.name for f in latents.Index.__dataclass_fields__.values()] + ["shards.0", "more"]), lie=LIES
)
def test_an_index_that_lies_is_refused_or_fits(store, tmp_path_factory, key, lie):
    folder = store[0].parent / "lies"
    if not folder.exists():
        shutil.copytree(store[0], folder)
    body = json.loads((store[0] / "index.json").read_text())
    if key == "shards.0":
        body["shards"][0] = lie
    else:
        body[key] = lie
    (folder / "index.json").write_text(signed(body))
    try:
        s = Store(folder)
    except DatasetError as error:
        assert "\n" not in str(error)
        return
    assert s.index.rows == ROWS and s.index.stride == 128  # what decides where rows lie
    s.rows(torch.arange(ROWS))


def test_a_run_is_not_continued_on_another_store_at_the_same_path(store, tmp_path):
    from cmt_fast.config.errors import ConfigError
    from cmt_fast.config.loading import build
    from cmt_fast.run.workspace import Workspace

    shutil.copytree(store[0], tmp_path / "s")
    stage = {"objective": {"kind": "denoise"}, "images_nimg": 8, "batch": 8}
    run = build(
        {
            "name": "swapped",
            "data": {"kind": "latents", "path": str(tmp_path / "s")},
            "model": {"kind": "dit", "width": 8, "depth": 1, "heads": 1},
            "path": "ve",
            "device": "cpu",
            "pre": stage,
            "mid": {**stage, "start": "pre"},
            "post": {**stage, "start": "mid"},
        }
    )
    loop.train(Workspace(run, tmp_path / "run"), ["pre"])
    Workspace(run, tmp_path / "run").compare()
    shutil.rmtree(tmp_path / "s")
    made(tmp_path / "s", shard_rows=7)
    with pytest.raises(ConfigError, match="not the rows that .*pre was trained on"):
        Workspace(run, tmp_path / "run").compare()
