"""Trajectories on disk: the same as those rolled out, fed by either loader, refused when they are of something else."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from bench.experiments import modes
from cmt_fast.cli import main
from cmt_fast.cli import trajectories as cli
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Dali, Latents, Torch
from cmt_fast.cost import flops
from cmt_fast.data import dali, opening, shards
from cmt_fast.data import trajectory_store as rolled
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.latents import read_index, write_index
from cmt_fast.diffusion.solvers import rollout
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, files
from cmt_fast.teacher import pool as pools
from cmt_fast.teacher import rollouts
from cmt_fast.train import loop
from tests.fixtures.stores import make_store
from tests.fixtures.tiny import NO_EVAL, SMALL, metrics, source_of, stop_after_a_checkpoint, tiny

CPU = torch.device("cpu")
N = 96  # a pool's round is 32 x 4 / 4 = 32 trajectories
FEW = ["pre.images_nimg=640", "mid.images_nimg=640", "eval.n_during=50"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A finished first stage, its trajectories in fp32 and fp16, and the latter as WebDataset shards."""
    folder = tmp_path_factory.mktemp("cache")
    loop.train(Workspace(tiny("digits", *FEW), folder / "run"), ["pre"])
    loop.train(Workspace(tiny("digits", *FEW, "seed=7"), folder / "other"), ["pre"])
    for dtype in ("fp32", "fp16"):
        assert main(command(folder, folder / dtype, "--dtype", dtype, "--shard-rows", "40")) == 0
    shards.export(opening.opened(folder / "fp16"), folder / "shards", 20, 0, lambda done, total: None)
    return folder


def command(world: Path, out: Path, *more: str, n: int = N) -> list[str]:
    options = ["--from", str(world / "run"), "--cache", str(out), "--n", str(n)]
    return ["trajectories", "digits", *SMALL, *NO_EVAL, *FEW, *options, *more]


def cached(world: Path, out: Path, store: str, *more: str) -> Workspace:
    return Workspace(tiny("digits", *FEW, f"mid.trajectories.cache={world / store}", *more), out, world / "run")


def ours(world: Path, first: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Trajectories first, first + 1, ... of the run's seed, rolled out here."""
    work = Workspace(tiny("digits", *FEW), world / "run")
    source = source_of(work, "mid")
    p, ids = source.pool, torch.arange(first, first + n)
    x, labels = pools.starts(pools.Random(0, 1, 0), ids, p.shape, p.classes, p.path, p.config)
    return rollout(p.teacher, p.path, p.plan, x, labels).transpose(0, 1), labels


# ------------------------------------------------------------------------------------------ what is stored


def test_a_row_is_the_trajectory_that_the_teacher_makes(world: Path) -> None:
    exact, half = (rolled.opened(world / name) for name in ("fp32", "fp16"))
    index = torch.tensor([0, 39, 40, 95])
    nodes, labels = exact.rows(index)
    for i, row in enumerate(index.tolist()):
        wanted, y = ours(world, row // 40 * 40, min(40, N - row // 40 * 40))
        torch.testing.assert_close(nodes[i], wanted[row % 40], rtol=1e-5, atol=1e-5)
        assert labels[i] == y[row % 40]
    near, same = half.rows(index)
    assert torch.equal(labels, same) and not torch.equal(near, nodes)
    error = (near - nodes).flatten(2).norm(dim=2) / nodes.flatten(2).norm(dim=2)
    assert error.max() < 4e-4  # of every node, the noise of standard deviation 80 too
    assert half.rolled.spread == 0.5 and exact.rolled.spread == 0
    assert half.index.stride == 17 * 64 * 2 and half.index.rows == N and not exact.verify()


def test_the_first_round_from_the_store_holds_the_first_round_rolled_out(world: Path, tmp_path: Path) -> None:
    """A store of one round, in another order: every point of the pool is a point of the pool that rolls out."""
    assert main(command(world, tmp_path / "one", "--dtype", "fp32", n=32)) == 0
    work = Workspace(
        tiny("digits", *FEW, f"mid.trajectories.cache={tmp_path / 'one'}"), tmp_path / "run", world / "run"
    )
    a, b = source_of(work, "mid").pool, source_of(Workspace(tiny("digits", *FEW), world / "run"), "mid").pool
    a.draw(0, torch.arange(32)), b.draw(0, torch.arange(32))
    order = torch.cdist(a._states[-1].flatten(1), b._states[-1].flatten(1)).argmin(1)
    assert order.sort().values.tolist() == list(range(32)) and order.tolist() != list(range(32))
    assert torch.equal(a._states, b._states[:, order]) and torch.equal(a._labels, b._labels[order])
    assert a.teacher_forwards == 0 and b.teacher_forwards == 4


def test_writing_goes_on_shard_by_shard_and_ends_with_the_same_bytes(world: Path, tmp_path: Path, monkeypatch) -> None:
    made, write = [], rolled.Writer.record

    def stop(self, k: int, key: str):
        if k == 2 and not made:
            made.append(1)
            raise KeyboardInterrupt
        return write(self, k, key)

    monkeypatch.setattr(rolled.Writer, "record", stop)
    options = ["--dtype", "fp16", "--shard-rows", "40"]
    with pytest.raises(SystemExit):
        main(command(world, tmp_path / "store", *options))
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "store.part").glob("*.bin")}
    assert len(before) == 2
    assert main(command(world, tmp_path / "store", *options)) == 0
    files = sorted(f.name for f in (tmp_path / "store").iterdir())
    assert files == sorted(f.name for f in (world / "fp16").iterdir())
    for name in files:
        assert (tmp_path / "store" / name).read_bytes() == (world / "fp16" / name).read_bytes(), name
    assert all((tmp_path / "store" / name).stat().st_mtime_ns == t for name, t in before.items())


def test_two_processes_write_what_one_writes(world: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cmt_fast"]
    more = [a.replace("--n", "--count") for a in command(world, tmp_path / "store", "--shard-rows", "40")]
    done = subprocess.run([*run, *more], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for file in (world / "fp16").iterdir():
        assert (tmp_path / "store" / file.name).read_bytes() == file.read_bytes(), file.name


# ------------------------------------------------------------------------------------------ what trains from it


def test_a_student_needs_no_teacher(world: Path, tmp_path: Path, monkeypatch) -> None:
    """No network but the student's start is read, and what a machine without the teacher trains is the same."""
    opened: list[str] = []
    network = Workspace.network
    monkeypatch.setattr(Workspace, "network", lambda self, name: opened.append(name) or network(self, name))
    work = cached(world, tmp_path / "with", "fp16")
    loop.train(work, ["mid"])
    assert opened == []
    elsewhere = cached(world, tmp_path / "without", "fp16", "mid.teacher=null")
    loop.train(elsewhere, ["mid"])
    a, b = (checkpoint.complete(tmp_path / name / "mid").manifest for name in ("with", "without"))
    assert a["files"] == b["files"] and a["others"] == b["others"]
    found = a["others"]["trajectories.cache"]
    assert found["teacher"] == work.identity(work.run.mid) and found["rows"] == N and "trajectories" not in a
    assert flops.calls(work.stage("mid"))["forwards"] == 640 * 3


def test_a_teacher_of_another_run_that_is_not_here(world: Path, tmp_path: Path) -> None:
    """The recipe names a teacher that this machine does not have: the store's says which it was."""
    gone = cached(world, tmp_path / "run", "fp16", f"mid.teacher={tmp_path}/nowhere/pre")
    loop.train(gone, ["mid"])
    named = checkpoint.complete(tmp_path / "run" / "mid").manifest["others"]["trajectories.cache"]["teacher"]
    assert named == rolled.opened(world / "fp16").rolled.teacher


@pytest.mark.parametrize("mode", ["pool", "paper"])
def test_a_killed_run_goes_on_in_the_middle_of_an_epoch(mode: str, world: Path, tmp_path: Path) -> None:
    more = [f"mid.trajectories.mode={mode}", "mid.checkpoint_every_nimg=192"]
    loop.train(cached(world, tmp_path / "whole", "fp16", *more), ["mid"])
    stop_after_a_checkpoint(cached(world, tmp_path / "run", "fp16", *more))
    assert checkpoint.latest(tmp_path / "run" / "mid").manifest["step"] == 6  # of 20, 12 a whole epoch in a pool
    loop.train(cached(world, tmp_path / "run", "fp16", *more), ["mid"])
    a, b = (checkpoint.complete(tmp_path / name / "mid").manifest for name in ("whole", "run"))
    assert a["files"] == b["files"] and metrics(tmp_path / "whole" / "mid") == metrics(tmp_path / "run" / "mid")


def test_epochs_take_every_trajectory_once_in_an_order_of_seed_and_stage(world: Path) -> None:
    def epoch(seed: int, stage: int, first: int) -> list[int]:
        read = rolled.reader(world / "fp16", Torch(), seed, stage, CPU, 32)
        ends = torch.cat([read.rows(torch.arange(32) + 32 * k)[0][:, -1] for k in range(first, first + 3)])
        read.close()
        every = rolled.opened(world / "fp16").rows(torch.arange(N))[0][:, -1]
        return torch.cdist(ends.flatten(1), every.flatten(1)).argmin(1).tolist()

    orders = [epoch(0, 1, 0), epoch(0, 1, 3), epoch(0, 2, 0), epoch(1, 1, 0)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and epoch(0, 1, 0) == orders[0]


@pytest.mark.parametrize("form", ["fp16", "shards"])
def test_dali_feeds_what_torch_feeds(form: str, world: Path) -> None:
    pytest.importorskip("nvidia.dali")
    feeds = [rolled.reader(world / form, feed, 3, 1, CPU, 28) for feed in (Torch(), Dali(threads=1))]
    assert isinstance(feeds[1].loader, dali.DaliLoader)
    for index in (0, 1, 2, 3, 4, 9):  # across epochs, and a jump
        (x, y), (u, v) = (feed.rows(torch.arange(28) + 28 * index) for feed in feeds)
        assert torch.equal(x, u) and torch.equal(y, v) and x.shape == (28, 17, 1, 8, 8)
    for feed in feeds:
        feed.close()


# ------------------------------------------------------------------------------------------ what is refused

STALE = [
    (["mid.teacher={w}/other/pre"], "its teacher is [0-9a-f]{32}, this recipe's is [0-9a-f]{32}"),
    (
        ["mid.trajectories.nfe=8", "mid.trajectories.per_trajectory=4"],
        "its solver is dpmpp of order 3, 16 calls .* 8 calls",
    ),
    (["mid.trajectories.order=2"], "its solver is dpmpp of order 3, .* of order 2, "),
    (["mid.trajectories.guidance=1.5"], "its guidance is none, this recipe's is classifier-free 1.5"),
    (["mid.teacher=null", "sigma_data=0.6", "pre=null", "mid.start=null"], "its path is ve, sigma_data 0.5, .* 0.6"),
]


@pytest.mark.parametrize("changes, text", STALE, ids=lambda x: x if isinstance(x, str) else "")
def test_trajectories_of_something_else_are_refused(changes: list[str], text: str, world: Path, tmp_path: Path) -> None:
    more = [c.format(w=world) for c in changes] + (
        [] if "pre=null" not in changes else ["post.start=null", "post.anchor=null"]
    )
    more += ["post.teacher=null", "post.trajectories=null", "control=null"] if "pre=null" in changes else []
    for teacher in ([], ["mid.teacher=null"]):  # without a teacher all but the teacher is still compared
        if "teacher" in text and teacher:
            continue
        with pytest.raises(ConfigError, match=f"trajectories.cache: .*fp16 is of other trajectories: {text}"):
            work = Workspace(
                tiny("digits", *FEW, f"mid.trajectories.cache={world / 'fp16'}", *more, *teacher), tmp_path / "run",
                world / "run",
            )  # fmt: skip
            work.external_inputs(work.stage("mid"))


def test_trajectories_without_label_are_those_that_the_recipe_drops(world: Path, tmp_path: Path) -> None:
    """Rolled out, stored, sharded and read with the label of the null class; a store of another share is refused."""
    drops = ["pre.label_dropout=0.1", "mid.label_dropout=0.3"]
    loop.train(Workspace(tiny("digits", *FEW, *drops), tmp_path / "run"), ["pre"])
    assert main(command(tmp_path, tmp_path / "fp32", *drops, "--dtype", "fp32")) == 0
    store = rolled.opened(tmp_path / "fp32")
    work = Workspace(tiny("digits", *FEW, *drops), tmp_path / "run")
    p, ids = source_of(work, "mid").pool, torch.arange(N)
    x, labels = pools.starts(pools.Random(0, 1, 0), ids, p.shape, p.classes, p.path, p.config, 0.3)
    nodes = rollout(p.teacher, p.path, p.plan, x, labels).transpose(0, 1)
    found, told = store.rows(ids)
    torch.testing.assert_close(found, nodes, rtol=1e-5, atol=1e-5)
    assert torch.equal(told, labels) and int((labels == 10).sum()) in range(15, 45) and store.classes == 10
    shards.export(store, tmp_path / "shards", 20, 0, lambda done, total: None)
    packed = rolled.opened(tmp_path / "shards")
    assert sorted(packed.rows(ids)[1].tolist()) == sorted(labels.tolist()) and not packed.verify()
    with tarfile.open(sorted((tmp_path / "shards").glob("*.tar"))[0]) as archive:
        assert (
            {m.size for m in archive if m.name.endswith(".cls")} == {2} == {packed.digits}
        )  # 0 to 10, where 9 was the last
    assert "label_dropout" not in json.loads((world / "fp32" / "index.json").read_text())["trajectories"]
    for where, share, line in ((tmp_path, 0.0, "0.3, this recipe's is 0.0"), (world, 0.3, "0.0, this recipe's is 0.3")):
        here = Workspace(
            tiny("digits", *FEW, f"mid.trajectories.cache={where}/fp32", f"mid.label_dropout={share}"), tmp_path / "other",
            where / "run",
        )  # fmt: skip
        with pytest.raises(ConfigError, match=f"of other trajectories: its label_dropout is {line}"):
            here.external_inputs(here.stage("mid"))
    cached = Workspace(tiny("digits", *FEW, *drops, f"mid.trajectories.cache={tmp_path}/fp32"), tmp_path / "run")
    cached.external_inputs(cached.stage("mid"))
    points = source_of(cached, "mid").pool.draw(0, torch.arange(32))
    assert int(points.labels.max()) == 10 and points.drop is None


def test_other_shapes_and_folders_are_refused(world: Path, tmp_path: Path) -> None:
    facts = {"shape": (3, 8, 8), "classes": 10}
    with pytest.raises(ConfigError, match=r"its shape is \(1, 8, 8\), this recipe's is \(3, 8, 8\)"):
        rolled.check(str(world / "fp16"), facts)
    with pytest.raises(ConfigError, match="its classes is 10, this recipe's is 0"):
        rolled.check(str(world / "fp16"), {"classes": 0})
    with pytest.raises(
        ConfigError, match="trajectories.cache: .*nowhere' is not a folder; `cmt trajectories` writes one"
    ):
        work = cached(world, tmp_path / "run", "nowhere")
        work.external_inputs(work.stage("mid"))
    with pytest.raises(DatasetError, match="holds trajectories; they are for a stage's trajectories.cache"):
        opening.load(Latents(str(world / "fp16")))
    make_store(tmp_path / "rows", 20)
    with pytest.raises(ConfigError, match="holds mean\\+std rows of data, no trajectories"):
        rolled.opened(tmp_path / "rows")
    assert "trajectories" not in json.loads((tmp_path / "rows" / "index.json").read_text())


def test_an_index_that_lies_about_its_rows_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "fp16", tmp_path / "store")
    body = json.loads((tmp_path / "store" / "index.json").read_text())
    del body["xxh3_128"]
    body["trajectories"]["times"].pop()
    with pytest.raises(DatasetError, match="16 nodes of .* are no rows of"):
        write_index(tmp_path / "store", body)
    assert read_index(tmp_path / "store").trajectories is not None


def test_a_store_that_changed_since_the_stage_began_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "fp16", tmp_path / "fp16")
    work = lambda: Workspace(
        tiny("digits", *FEW, f"mid.trajectories.cache={tmp_path / 'fp16'}", "mid.checkpoint_every_nimg=192"),
        tmp_path / "run", world / "run",
    )  # fmt: skip
    stop_after_a_checkpoint(work())
    shutil.rmtree(tmp_path / "fp16")
    shutil.copytree(world / "fp32", tmp_path / "fp16")
    with pytest.raises(ConfigError, match="mid.trajectories.cache.xxh3_128: .* has changed since this stage began"):
        loop.train(work(), ["mid"])


def test_the_command_says_what_it_cannot_write(world: Path, tmp_path: Path, capsys) -> None:
    for more, text in (
        (["--stage", "pre"], "cmt: --stage: pre of digits draws from no trajectories"),
        (["--n", "0"], "cmt: --n: 0 is not at least 1"),
        (["mid.teacher=null", "mid.trajectories.cache=x"], "cmt: teacher: is missing"),
    ):
        assert main(command(world, tmp_path / "store", *more)) == 2
        assert capsys.readouterr().err.strip() == text
    assert not (tmp_path / "store.part").exists()


def test_the_bench_of_modes_trains_every_student_once(tmp_path: Path, capsys) -> None:
    """Two students at the teacher's work of paper mode, two of the recipe's, one of these without a teacher; all resumable."""
    recipe = tmp_path / "few.yaml"
    run = tiny("digits", *FEW, "mid.trajectories.pool_steps=2", "eval.n=60", "mid.images_nimg=128")
    recipe.write_text(yaml.safe_dump(loading.dump(run)))
    args = argparse.ArgumentParser()
    modes.add_arguments(args)
    given = args.parse_args(
        [str(recipe), "--seeds", "0", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "j")]
    )
    assert modes.run(given) == 0
    first = json.loads((tmp_path / "j").read_text())
    rows = {row["mode"]: row for row in first["rows"]}
    assert list(rows) == ["paper", "pool-all", "pool", "cache"] and all(r["nimg"] == 128 for r in rows.values())
    assert len({row["ema"] for row in rows.values()}) == 4 and rows["cache"]["cache_trajectories"] == 32
    assert [row["mode"] for row in first["summary"]] == list(rows) and first["images"] == {"mid": 128}
    assert all(row["ms_per_image"]["mean"] > 0 and set(row["frechet"]) == {"1", "2"} for row in first["summary"])
    others = checkpoint.complete(tmp_path / "out" / "few-0" / "cache" / "mid").manifest["others"]
    assert list(others) == ["trajectories.cache"]
    assert modes.run(given) == 0
    assert json.loads((tmp_path / "j").read_text())["rows"] == first["rows"]
    assert capsys.readouterr().out.count("ms an image") == 8


# ------------------------------------------------------------------------------------------ what it will take


def test_bytes_are_said_before_anything_is_rolled_out_and_are_those_on_disk(world, tmp_path, capsys) -> None:
    assert main(command(world, tmp_path / "store", "--dtype", "fp32", n=32)) == 0
    said = re.search(
        r"disk: 32 trajectories of 17 nodes in fp32 are .* \(([\d,]+) bytes each\); .* are free",
        capsys.readouterr().out,
    )
    row = int(said[1].replace(",", ""))
    assert row == 17 * 64 * 4 + 16  # a label and a checksum beside the nodes
    held = sum(f.stat().st_size for f in (tmp_path / "store").iterdir() if f.suffix in (".bin", ".npy"))
    assert 0 <= held - 32 * row <= 2 * 128  # the headers of two arrays


def test_a_store_larger_than_the_disk_is_refused_before_anything_is_written(
    world, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(files, "free", lambda folder: 100_000)
    assert main(command(world, tmp_path / "store", "--dtype", "fp32")) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"--cache: 96 trajectories .* and .* has 0.1 MB free; fewer trajectories \(-n\).*--dtype fp16", said
    )
    assert not list(tmp_path.iterdir())


def test_rollouts_are_cut_to_the_memory_at_hand_and_stay_the_same(world, tmp_path, capsys, monkeypatch) -> None:
    batches, made = [], rollouts.Rolling.__init__

    def seen(self, *args, **options):
        made(self, *args, **options)
        batches.append(self.batch)

    monkeypatch.setattr(rollouts.Rolling, "__init__", seen)
    monkeypatch.setattr(cli, "free_bytes", lambda device: 250_000)
    assert main(command(world, tmp_path / "store", "--dtype", "fp32", "--shard-rows", "40")) == 0
    assert len(batches) == 1 and 1 <= batches[0] < 40
    assert f"rollouts: {batches[0]} at once, not 40: " in capsys.readouterr().out
    index = torch.arange(N)
    (few, a), (all_at_once, b) = (rolled.opened(where).rows(index) for where in (tmp_path / "store", world / "fp32"))
    torch.testing.assert_close(few, all_at_once, rtol=1e-5, atol=1e-5)  # other batches, other roundings
    assert torch.equal(a, b)
