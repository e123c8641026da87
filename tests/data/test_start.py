"""A store that many processes open: who reads what, and the copy on a machine's own disk."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from bench.training.zero import launch
from cmt_fast.cli import main
from cmt_fast.config.schema import Latents
from cmt_fast.data import latents, opening, start
from cmt_fast.data.archives import DatasetError
from cmt_fast.runtime import distributed
from tests.fixtures.stores import make_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    made = make_store(tmp_path / "store", n=150, shard=64)
    (tmp_path / "near").mkdir()
    monkeypatch.setenv(start.VARIABLE, str(tmp_path / "near"))
    return made


def opened(folder: Path):
    with start.together(copy=True):
        return opening.load(Latents(path=str(folder)))


def everything(store) -> tuple:
    index = torch.arange(store.n)
    x, labels = store.rows(index, torch.zeros_like(index))
    return x.numpy().tobytes(), labels.tolist(), store.facts, store.class_names


def test_the_copy_is_the_store_and_is_made_once(store, tmp_path, monkeypatch):
    far = everything(opening.load(Latents(path=str(store.folder))))
    near = opened(store.folder)
    assert near.folder.parent == tmp_path / "near" and everything(near) == far
    assert sorted(p.name for p in near.folder.iterdir()) == sorted(p.name for p in store.folder.iterdir())
    before = {p.name: p.stat().st_mtime_ns for p in near.folder.iterdir()}
    monkeypatch.setattr(start, "_copy", lambda *_: pytest.fail("copied twice"))
    assert everything(opened(store.folder)) == far
    assert {p.name: p.stat().st_mtime_ns for p in near.folder.iterdir()} == before


def test_shards_of_webdataset_are_copied_with_their_index(store, tmp_path):
    assert main(["data", "shards", str(store.folder), str(tmp_path / "tars"), "--shard-rows", "64"]) == 0
    near = opened(tmp_path / "tars")
    assert {p.suffix for p in near.folder.iterdir()} == {".tar", ".idx", ".npy", ".json"}
    assert everything(near) == everything(opening.opened(tmp_path / "tars"))


def test_outside_training_nothing_is_copied(store, tmp_path, capsys):
    assert opening.load(Latents(path=str(store.folder))).folder == store.folder
    with start.together(copy=False):
        assert opening.load(Latents(path=str(store.folder))).folder == store.folder
    assert list((tmp_path / "near").iterdir()) == []
    assert "CMT_STORE_CACHE: training copies 0.000 GB" in capsys.readouterr().out


def test_a_copy_that_was_killed_goes_on_with_whole_shards_and_checks_them(store, tmp_path, monkeypatch):
    done, blocks = [], start._blocks

    def killed(source, target):
        if len(done) == 2:
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(source.name)
        yield from blocks(source, target)

    monkeypatch.setattr(start, "_blocks", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(store.folder)
    again = []
    monkeypatch.setattr(start, "_blocks", lambda s, t: again.append(s.name) or blocks(s, t))
    near = opened(store.folder)
    assert done == ["shard-00000.bin", "shard-00001.bin"] and not set(done) & set(again)
    sound = everything(near)
    assert sound == everything(opening.load(Latents(path=str(store.folder))))
    # a file of the copy that lost bytes since is copied again, and no other
    os.truncate(near.folder / "shard-00002.bin", 10)
    again.clear()
    assert everything(opened(store.folder)) == sound and again == ["shard-00002.bin"]


def test_who_waits_shows_the_copy_of_another_and_takes_it(store, tmp_path, monkeypatch):
    held, go, blocks = threading.Event(), threading.Event(), start._blocks

    def slow(source, target):
        held.set()
        assert go.wait(20)
        yield from blocks(source, target)

    monkeypatch.setattr(start, "_blocks", slow)
    found = []
    first = threading.Thread(target=lambda: found.append(start.copied(store, tmp_path / "near")))
    first.start()
    assert held.wait(20)
    titles = []

    def vanishing(folder, pattern):
        """As where the other process renames a file and takes its folder away between two looks."""
        yield folder / "copying" / "gone"
        raise FileNotFoundError(str(folder / "copying"))

    phase = start.progress.phase
    monkeypatch.setattr(start.progress, "phase", lambda title, *a: titles.append(title) or go.set() or phase(title, *a))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", vanishing)
        found.append(start.copied(store, tmp_path / "near"))
    first.join()
    assert found[0] == found[1] and titles == ["another process copies the store to this machine, MB"]


Usage = namedtuple("Usage", "total used free")


def test_who_may_only_read_the_folder_takes_the_copy_of_another_user(store, tmp_path, monkeypatch):
    near = opened(store.folder).folder

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(start, "_locked", refused)
    assert opened(store.folder).folder == near


def test_a_disk_that_is_full_or_no_folder_is_said(store, tmp_path, monkeypatch):
    def refusal() -> str:
        with pytest.raises(DatasetError) as error:
            opened(store.folder)
        return str(error.value)

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with monkeypatch.context() as m:
        m.setattr(start, "_blocks", full)
        assert refusal() == (
            f"CMT_STORE_CACHE: '{tmp_path}/near' is full; what was copied is kept, and the next start goes on with it"
        )
    with monkeypatch.context() as m:
        m.setattr(start.shutil, "disk_usage", lambda _: Usage(10**15, 0, 1000))
        wanted = sum(p.stat().st_size for p in store.folder.iterdir())
        assert f"has 0.000 GB free, and the copy of {store.folder} takes {wanted / 1e9:.3f} GB more" in refusal()
    with open(store.folder / "shard-00001.bin", "r+b") as f:
        f.seek(700)
        f.write(b"xx")
    text = refusal()
    assert "shard-00001.bin came as another" in text and "1 checksum differs" in text and "cmt data verify" in text
    monkeypatch.setenv(start.VARIABLE, str(tmp_path / "none"))
    assert refusal().startswith(f"CMT_STORE_CACHE: '{tmp_path}/none' is not a folder")


# ------------------------------------------------------------------------------------------------ several ranks


def _rank(folder: Path, near: Path) -> None:
    """What a rank of the test below does; what it saw goes to FOLDER/rank-N.json."""
    os.environ[start.VARIABLE] = str(near / ("a" if distributed.rank() < 2 else "b"))  # two machines
    read, copied = [], []
    small, copy = latents.small, start._copy
    start.small = lambda path, *a: read.append(path.name) or small(path, *a)
    start._copy = lambda *a: copied.append(1) or copy(*a)
    seen = everything(opened(folder / "store"))
    said = ""
    os.environ[start.VARIABLE] = str(near / ("a" if distributed.rank() < 2 else "none"))
    try:
        opened(folder / "store")
    except DatasetError as error:
        said = str(error)
    os.environ[start.VARIABLE] = str(near / "a") if distributed.rank() < 2 else ""  # set on one of the machines alone
    where = opened(folder / "store").folder.parent.name
    about = {
        "where": where,
        "read": sorted(read),
        "copied": len(copied),
        "rows": [hash(str(s)) for s in seen[1:]],
        "said": said,
    }
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(about))


def test_one_rank_reads_and_one_of_a_machine_copies(store, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "near" / name).mkdir()

    def work() -> None:
        distributed.start(torch.device("cpu"), 60)
        _rank(tmp_path, tmp_path / "near")
        distributed.stop()

    launch(3, work, tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(3)]
    small = [latents.CHECKSUMS, latents.INDEX, latents.LABELS]
    assert ranks[0]["read"] == sorted(small * 3), "once for each time that the store was opened, and none of the copy's"
    assert ranks[1]["read"] == ranks[2]["read"] == []
    assert ranks[0]["copied"] + ranks[1]["copied"] == 1 and ranks[2]["copied"] == 1
    assert len({json.dumps(r["rows"]) for r in ranks}) == 1
    assert [r["where"] for r in ranks] == ["a", "a", tmp_path.name]
    assert all("none' is not a folder" in r["said"] for r in ranks), ranks
