"""The DALI loader is the torch loader: the same rows in the same order to the bit, from any step on, on any rank."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys

import numpy as np
import pytest
import torch

from bench.training import loader as bench_loader
from cmt_fast.cli import main
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Dali
from cmt_fast.data import dali
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.dali import DaliLoader
from cmt_fast.data.opening import opened
from cmt_fast.data.order import Loader
from cmt_fast.data.shards import Shards, export
from cmt_fast.diffusion import rng
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime.signals import Stopped
from cmt_fast.storage import checkpoint
from cmt_fast.train import loop
from tests.fixtures.stores import make_store
from tests.fixtures.tiny import metrics, tiny

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")
N, BATCH = 101, 16  # no multiple: batches cross the end of an epoch
STEPS = -(-2 * N // BATCH) + 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same rows as a store and as shards."""
    out = tmp_path_factory.mktemp("dali")
    store = make_store(out / "store", N)
    export(store, out / "shards", 24, 0, lambda done, total: None)
    return out


def batches(loader, steps, rank: int = 0, size: int = 1, batch: int = BATCH) -> list:
    """What a loader gives for these steps, rank's share of each."""
    out = [loader.rows(torch.arange(batch)[rank::size] + step * batch) for step in steps]
    loader.close()
    return out


def equal(one, two) -> bool:
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, two, strict=True))


@pytest.mark.parametrize("form", ["store", "shards"])
def test_same_rows_in_the_same_order_over_two_epochs(form, folder, monkeypatch):
    monkeypatch.setattr(dali, "EPOCHS", 1)  # one pipeline over shards takes over from another
    data = opened(folder / form)
    wanted = batches(Loader(data, 3, CPU, BATCH), range(STEPS))
    found = batches(DaliLoader(data, 3, CPU, BATCH, Dali()), range(STEPS))
    assert equal(wanted, found)
    labels = torch.cat([y for _, y in found])
    for epoch in range(2):  # every row once an epoch
        assert torch.equal(labels[epoch * N : (epoch + 1) * N].sort().values, data.labels.sort().values)
    x = torch.cat([x for x, _ in found])
    assert len(x[: 2 * N].flatten(1).unique(dim=0)) == 2 * N  # each row drawn anew in the second
    assert not torch.equal(labels[:N], labels[N : 2 * N])
    assert not equal(batches(Loader(data, 4, CPU, BATCH), range(STEPS)), found)  # another seed


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["store", "shards"])
def test_same_rows_on_a_gpu_while_it_works(form, folder):
    data, device = opened(folder / form), torch.device("cuda", 0)
    wanted = batches(Loader(data, 3, device, BATCH), range(STEPS))
    loader, found, busy = DaliLoader(data, 3, device, BATCH, Dali()), [], torch.randn(2048, 2048, device=device)
    for step in range(STEPS):
        found.append(loader.rows(torch.arange(BATCH) + step * BATCH))
        busy = busy @ busy / 50  # the stream is behind when the next rows come
    loader.close()
    assert found[0][0].is_cuda and equal(wanted, found)


@pytest.mark.parametrize("form", ["store", "shards"])
def test_goes_on_exactly_at_twenty_random_steps(form, folder):
    data, dice = opened(folder / form), random.Random(form)
    wanted = batches(DaliLoader(data, 0, CPU, BATCH, Dali()), range(3 * STEPS + 4))
    for step in dice.sample(range(3 * STEPS), 20):
        found = batches(
            DaliLoader(data, 0, CPU, BATCH, Dali(threads=1, prefetch=dice.randint(1, 3))), range(step, step + 4)
        )
        assert equal(wanted[step : step + 4], found), step


@pytest.mark.parametrize("form", ["store", "shards"])
def test_ranks_share_a_batch(form, folder):
    data = opened(folder / form)
    whole = batches(Loader(data, 0, CPU, BATCH), range(STEPS))
    parts = [batches(DaliLoader(data, 0, CPU, BATCH, Dali()), range(STEPS), rank, 2) for rank in range(2)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *parts, strict=True):
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1)
        assert torch.equal(y[0::2], y0) and torch.equal(y[1::2], y1)
        assert len(torch.cat((x0, x1)).flatten(1).unique(dim=0)) == BATCH  # no row on both


@pytest.mark.parametrize("form", ["store", "shards"])
def test_a_jump_and_the_same_step_again(form, folder):
    data, steps = opened(folder / form), [0, 0, 1, 7, 8, 2, 2, 3, 50]
    wanted = batches(Loader(data, 0, CPU, BATCH), steps)
    assert equal(wanted, batches(DaliLoader(data, 0, CPU, BATCH, Dali()), steps))


@pytest.mark.parametrize("changes", [{"classes": 0}, {"dtype": "float32"}, {"flips": True}, {"classes": 1000}])
def test_other_stores(changes, tmp_path):
    store = make_store(tmp_path / "store", 40, **changes)
    export(store, tmp_path / "shards", 12, 0, lambda done, total: None)
    for flip in {False, changes.get("flips", False)}:
        data = opened(tmp_path / "shards", flip)
        one, two = (
            batches(L, range(6)) for L in (Loader(data, 0, CPU, BATCH), DaliLoader(data, 0, CPU, BATCH, Dali()))
        )
        for (x, y), (u, v) in zip(one, two, strict=True):
            assert torch.equal(x, u) and (y is v is None if data.labels is None else torch.equal(y, v))


def test_an_epoch_takes_one_shard_after_another(folder):
    data = opened(folder / "shards")
    assert isinstance(data, Shards) and data.facts["shards"] == 5
    orders = [data.order(rng.Random(seed, 0, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(N))
        assert len(data.shard_of(order).unique_consecutive()) == 5
        assert not torch.equal(order.sort().values, order)
    assert torch.equal(orders[0], orders[3]) and not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    visited = {tuple(data.shard_of(data.order(rng.Random(0, 0, e))).unique_consecutive().tolist()) for e in range(20)}
    assert len(visited) > 10


def test_an_open_store_holds_no_files_open(folder):
    before = len(os.listdir("/proc/self/fd"))
    held = [opened(folder / form) for form in ("store", "shards")]
    assert len(os.listdir("/proc/self/fd")) == before and len(held[1].index.shards) == 5


def test_others_read_the_shards(folder):
    """webdataset, and DALI's reader with the index files of the export."""
    from nvidia.dali import Pipeline, fn

    data, webdataset = opened(folder / "shards"), pytest.importorskip("webdataset")
    rows, archives = data.read(torch.arange(N)), [str(data.archive(i)) for i in range(5)]
    seen = list(webdataset.WebDataset(archives, shardshuffle=False).decode())
    assert torch.equal(torch.stack([torch.from_numpy(s["npy"]) for s in seen]), rows)
    assert [s["cls"] for s in seen] == data.labels.tolist()
    pipeline = Pipeline(batch_size=N, num_threads=1, device_id=None)
    with pipeline:
        indices = [a.replace(".tar", ".idx") for a in archives]
        pipeline.set_outputs(*fn.readers.webdataset(paths=archives, index_paths=indices, ext=["npy", "cls"]))
    files, labels = pipeline.run()
    assert bytes(files.as_array()[7])[-rows[7].nbytes :] == rows[7].numpy().tobytes()
    assert [int(bytes(y)) for y in labels.as_array()] == data.labels.tolist()
    store = opened(folder / "store")  # the same rows, in another order
    assert sorted(bytes(r) for r in rows.numpy()) == sorted(bytes(r) for r in store.read(torch.arange(N)).numpy())
    assert data.verify() == [] and data.statistics().mean == pytest.approx(store.statistics().mean)


def spoil(path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("form", ["store", "shards"])
def test_a_damaged_row_is_an_error_that_names_its_file(form, folder, tmp_path):
    shutil.copytree(folder / form, tmp_path / form)
    data = opened(tmp_path / form)
    name = "shard-00001." + ("bin" if form == "store" else "tar")
    spoil(tmp_path / form / name, data.index.stride * 3 if form == "store" else data.sample * 3 + 700)
    for loader in (Loader(data, 0, CPU, BATCH), DaliLoader(data, 0, CPU, BATCH, Dali())):
        with pytest.raises(DatasetError, match=f"{name}: row 3 .* is damaged") as caught:
            batches(loader, range(STEPS))
        assert "\n" not in str(caught.value)
        loader.close()


def test_broken_shards_are_errors_that_name_the_file(folder, tmp_path):
    for k, (what, damage) in enumerate(
        {
            "has 20,480 bytes": lambda path: path.write_bytes(path.read_bytes()[:20480]),
            "is missing": lambda path: path.unlink(),
            "its first row is no float16 array": lambda path: spoil(path, 530),
        }.items()
    ):
        copy = tmp_path / str(k)
        shutil.copytree(folder / "shards", copy)
        loader = DaliLoader(opened(copy), 0, CPU, BATCH, Dali())  # opened while all was well
        damage(copy / "shard-00002.tar")
        with pytest.raises(DatasetError, match=f"shard-00002.tar: {what}"):
            opened(copy)
        if "row" not in what:  # which is sound, its header is not: seen when it is opened, not missed when it is read
            with pytest.raises(DatasetError, match=f"shard-00002.tar: {what}"):
                batches(loader, range(STEPS))


def test_processes_read_the_same_rows_and_report_damage(folder, tmp_path):
    shutil.copytree(folder / "store", tmp_path / "store")
    data = opened(tmp_path / "store")
    wanted = batches(Loader(data, 0, CPU, BATCH), range(8))
    spoil(tmp_path / "store" / "shard-00001.bin", 5)
    loader = DaliLoader(data, 0, CPU, BATCH, Dali(workers=1, prefetch=1))
    row = int((loader.order(torch.arange(N))[0] == 64).nonzero())  # the damaged one's position
    good = row // BATCH
    assert equal(wanted[:good], [loader.rows(torch.arange(BATCH) + step * BATCH) for step in range(good)])
    with pytest.raises(DatasetError, match=r"shard-00001.bin: row 0 \(row 64 of the store\) is damaged") as caught:
        loader.rows(torch.arange(BATCH) + good * BATCH)
    assert "\n" not in str(caught.value)
    loader.close()


def test_the_command_that_writes_shards(folder, tmp_path, capsys):
    store, out = str(folder / "store"), str(tmp_path / "out")
    for arguments, words in (
        ([store, out, "--shard-rows", "0"], "--shard-rows: 0 is not at least 1"),
        ([str(tmp_path), out], "has no index.json"),
        ([store, str(tmp_path)], "exists"),
        ([store, str(tmp_path / "no" / "out")], "its folder does not exist"),
    ):
        assert main(["data", "shards", *arguments]) == 2
        error = capsys.readouterr()[1]
        assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
    assert main(["data", "shards", store, out, "--shard-rows", "24"]) == 0
    assert sorted(os.listdir(out)) == sorted(os.listdir(folder / "shards"))
    for name in os.listdir(out):  # the same bytes again
        assert (tmp_path / "out" / name).read_bytes() == (folder / "shards" / name).read_bytes(), name
    assert main(["data", "verify", out]) == 0
    spoil(tmp_path / "out" / "shard-00001.tar", 700)
    assert main(["data", "verify", out]) == 2
    assert "shard-00001.tar: row 0 (row 24 of the store) is damaged" in capsys.readouterr()[1]


def test_the_bench_runs(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    bench_loader.add_arguments(parser)
    assert (
        bench_loader.run(parser.parse_args(["--tiny", "--device", "cpu", "--json", str(tmp_path / "loader.json")])) == 0
    )
    found = json.loads((tmp_path / "loader.json").read_text())
    assert found["needs"]["predicted"] is True and found["dali"] and found["tiny"]
    for pixels in (256, 512):
        rows = {row["loader"]: row for row in found["rows"] if row["pixels"] == pixels}
        assert len(rows) == 9 and all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in rows.values())
    assert "PREDICTED" in capsys.readouterr()[0]


# ------------------------------------------------------------------------------------------------ training

LATENTS = ["model.patch=2", "pre.batch=32", "pre.images_nimg=640", "pre.checkpoint_every_nimg=64", "eval.n=100"]


def run_of(path, kind: str, *more: str):
    return tiny("digits-mf", *LATENTS, f"data={{kind: latents, path: {path}}}", f"loader.kind={kind}", *more)


def trained(out, *arguments) -> tuple[list, dict]:
    loop.train(Workspace(run_of(*arguments), out), ["pre"])
    return metrics(out / "pre"), checkpoint.complete(out / "pre").manifest["files"]


@pytest.mark.parametrize("form", ["store", "shards"])
def test_training_is_bit_equal_and_goes_on_with_the_other_loader(form, folder, tmp_path, monkeypatch):
    path = folder / form
    wanted = trained(tmp_path / "torch", path, "torch")
    assert trained(tmp_path / "dali", path, "dali") == wanted
    losses = [row["loss"] for row in wanted[0] if row["kind"] == "train"]
    assert len(losses) == 20 and len(set(losses)) == 20
    for kind in ("dali", "torch"):  # stopped at the first row with the one, finished with the other
        work = Workspace(run_of(path, kind), tmp_path / f"stopped-{kind}")
        with pytest.raises(Stopped):
            loop.train_stage(work, work.stage("pre"), [15])
        assert checkpoint.latest(work.folder / "pre").manifest["step"] < 20
        assert trained(work.folder, path, "torch" if kind == "dali" else "dali") == wanted


def test_a_checkpoint_of_other_rows_or_another_batch_is_refused(folder, tmp_path):
    path, out = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(folder / "shards", path)
    work = Workspace(run_of(path, "dali"), out)
    work.claim()
    with pytest.raises(Stopped):
        loop.train_stage(work, work.stage("pre"), [15])
    begun = work.folder / "pre" / "checkpoints"
    before = sorted(p.name for p in begun.iterdir())
    store = opened(folder / "store")
    for source, per_shard, words in (
        (store, 12, "shards: 5 -> 9"),
        (make_store(tmp_path / "other", N - 1), 24, "rows: 101 -> 100"),
        (make_store(tmp_path / "again", N, classes=5), 24, "xxh3_128"),
    ):
        shutil.rmtree(path)
        export(source, path, per_shard, 0, lambda done, total: None)
        with pytest.raises(
            ConfigError, match=f"data: .*not the rows that .*run/pre was trained on .*{words}"
        ) as caught:
            loop.train(Workspace(run_of(path, "dali"), out), ["pre"])
        assert "\n" not in str(caught.value)
    shutil.rmtree(path)
    export(store, path, 24, 0, lambda done, total: None)
    with pytest.raises(ConfigError, match="pre.batch: 32 -> 16"):
        loop.train(Workspace(run_of(path, "dali", "pre.batch=16"), out), ["pre"])
    assert sorted(p.name for p in begun.iterdir()) == before
    loop.train(Workspace(run_of(path, "dali"), out), ["pre"])  # the shards it began on, exported again


def test_another_file_of_the_same_name_is_refused(tmp_path):
    path, images = tmp_path / "images.npz", torch.rand(40, 1, 8, 8).numpy() * 2 - 1
    np.savez(path, images=images)
    more = [*LATENTS, "model.patch=2", f"data={{kind: npz, path: {path}}}", "loader.kind=torch"]
    work = lambda: Workspace(tiny("digits-mf", *more), tmp_path / "run")
    work().claim()
    with pytest.raises(Stopped):
        opened = work()
        loop.train_stage(opened, opened.stage("pre"), [15])
    np.savez(path, images=1 - images)
    with pytest.raises(ConfigError, match="data: .*not the rows that .*run/pre was trained on .*xxh3_128"):
        loop.train(work(), ["pre"])


def test_asked_for_by_name_and_not_there(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    data = f"data={{kind: latents, path: {folder / 'store'}}}"
    assert main(["train", "digits-mf", data, "loader.kind=dali"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "loader.kind" in err and "pip install 'cmt-fast[dali]'" in err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(dali, "PACKAGES", ("nvidia-dali-of-no-version",))
    assert main(["doctor"]) == 0
    assert "dali       not installed" in capsys.readouterr()[0]


def test_doctor_says_which_dali_there_is(capsys):
    import nvidia.dali

    assert main(["doctor"]) == 0
    assert f"dali       {nvidia.dali.__version__}" in capsys.readouterr()[0]
