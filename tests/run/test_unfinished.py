"""An evaluation that is killed goes on: the same figures, no sample drawn twice, and nothing left of it in the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import cmt_kernels
import pytest
import torch
from safetensors.torch import save_file

from cmt_fast.cli import main
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.evaluation import keeping, neighbours
from cmt_fast.evaluation.distances import Against
from cmt_fast.evaluation.features import Classifier
from cmt_fast.evaluation.measures import Seen
from cmt_fast.evaluation.tallies import Tally
from cmt_fast.run import unfinished
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed, machine
from cmt_fast.storage import files, sound
from tests.fixtures.tiny import tiny
from tests.run.test_guidance import weights

N, BATCH = 130, 20  # seven batches, the last one of ten


@pytest.fixture
def run(tmp_path):
    """A run of digits with the stage post, which no training made, and features of an untrained classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = weights(tiny("digits", f"eval.batch={BATCH}"), tmp_path / "run", stage="post")
        save_file(Classifier(64, 10).state_dict(), folder / "extractor.safetensors")
    return folder


def judged(run: Path, capsys, *more: str) -> dict:
    capsys.readouterr()
    assert main(["eval", f"{run}/post", "--n", str(N), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def killed(run: Path, what: type, name: str, call: int) -> None:
    """The same command in a process that is killed by SIGKILL at its call of a method."""
    real, calls = getattr(what, name), []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    def child() -> None:
        setattr(what, name, dies)
        main(["eval", f"{run}/post", "--n", str(N)])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def kept(run: Path) -> list[str]:
    """The files that wait, but for those that say what they are."""
    return sorted(p.name for p in (run / "judging").glob("*/*") if p.suffix == ".block")


def counted(patch, what: type, name: str) -> list:
    """What a method was given at each call from now on."""
    real, calls = getattr(what, name), []
    patch.setattr(what, name, lambda self, *a, **k: calls.append(a) or real(self, *a, **k))
    return calls


def test_a_killed_evaluation_goes_on_to_the_same_figures(run, capsys, monkeypatch):
    """Killed in the samples of its fourth batch, then among the figures, then in the floor."""
    killed(run, Sampler, "draw_each", 4)
    assert kept(run) == [f"{k}-{i:09d}-{i + BATCH:09d}.block" for k in (1, 2) for i in (0, 20, 40)]
    (block,) = (run / "judging").glob("*/1-000000020-*.block")
    block.write_bytes(block.read_bytes()[:-1])  # the disk lost its end
    (block.parent / ".tmp-left").write_bytes(b"torn")
    killed(run, neighbours._Tiles, "rows", 1)  # the distances have ended, of one step
    figures = sound.read(block.parent / "figures.json")
    assert [list(row) for row in figures.values() if row] == [["frechet", "frechet_2"]] and len(kept(run)) == 14
    with monkeypatch.context() as patch:
        drawn, distances = counted(patch, Sampler, "draw_each"), counted(patch, Against, "each")
        killed(run, Tally, "look", 3)  # of real rows
        assert len(kept(run)) == 2 and all(name.startswith("real-") for name in kept(run))
        looked = counted(patch, Tally, "look")
        found = judged(run, capsys)
        assert not drawn and [len(a[0]) for a in looked] == [20] * 4 + [10]
        assert len(distances) == 2  # both of the floor: those of one and two steps were written down
    assert not (run / "judging").exists()
    (run / "reference").rename(run / "away")
    assert judged(run, capsys) == found and found["steps"].keys() == {"1", "2"}


def test_what_waits_is_of_one_key(run, capsys, monkeypatch):
    """Another seed begins anew and leaves it alone; of other weights it can never go on, so it goes."""
    killed(run, Sampler, "draw_each", 3)
    before = kept(run)
    with monkeypatch.context() as patch:
        drawn = counted(patch, Sampler, "draw_each")
        judged(run, capsys, "--seed", "7")
        assert len(drawn) == 7 and kept(run) == before
        other = Workspace(tiny("digits", f"eval.batch={BATCH}", "seed=1"), run).build()
        weights(tiny("digits", f"eval.batch={BATCH}", "seed=1"), run.parent / "other", stage="post")
        manifest = {"files": {"ema-0.safetensors": {"xxh3_128": "other"}}}
        work = Workspace(tiny("digits", f"eval.batch={BATCH}"), run)
        with work.judging.going_on("post", manifest):
            work.judging.evaluate(other, (1,), 40, quiet=True)
    assert not kept(run)


def test_a_second_command_keeps_nothing_and_a_disk_that_takes_nothing_stops_nothing(run, capsys, monkeypatch):
    want = judged(run, capsys)
    key = {"weights": "a"}
    seen = Seen(torch.arange(3), torch.ones(3, 2), torch.zeros(2, dtype=torch.int64))
    with unfinished.opened(run, "post", key) as first, unfinished.opened(run, "post", key) as second:
        first.put("1", seen)
        second.put("1", seen)
        assert len(kept(run)) == 1 and second.folder is None and second.block("1", seen.index) is None
        back = first.block("1", seen.index)
        assert back is not None and torch.equal(back.features, seen.features) and back.slices is None
        assert first.block("2", seen.index) is None and first.block("1", seen.index + 1) is None
    assert not (run / "judging").exists()

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(unfinished.files, "write_bytes", full)
    assert judged(run, capsys) == want and files.write_bytes is full


def test_what_another_machine_or_version_took_is_not_mixed_in(run, capsys, monkeypatch):
    killed(run, Sampler, "draw_each", 3)
    before = kept(run)
    for where, what, other in (
        (machine, "__version__", "0.0.9"),
        (cmt_kernels, "table", lambda _: {"attention": "other"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, other)
            drawn = counted(patch, Sampler, "draw_each")
            judged(run, capsys)
            assert len(drawn) == 7 and kept(run) == before
    drawn = counted(monkeypatch, Sampler, "draw_each")
    judged(run, capsys)
    assert len(drawn) == 5


def test_what_a_shared_disk_shows_to_some_ranks_alone_is_taken_by_all(run, monkeypatch):
    """What is taken needs every rank: one that has found the files must not leave the others waiting."""
    keep = lambda: Workspace(tiny("digits"), run).judging.keep()
    keep()
    taken, real = [], keeping.take
    monkeypatch.setattr(keeping, "take", lambda *a: taken.append(1) or real(*a))
    keep()
    assert not taken
    monkeypatch.setattr(distributed, "smallest", lambda n: 0)  # of another rank, which has found nothing
    keep()
    assert taken


def test_where_nothing_can_be_kept_no_lock_is_kept_either(tmp_path, monkeypatch):
    """A disk that is full at one look of a stage has room at the next."""

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with unfinished.opened(tmp_path, "post", {"weights": "1"}) as kept:
            assert kept.folder is None
    with unfinished.opened(tmp_path, "post", {"weights": "1"}) as kept:
        assert kept.folder is not None and (kept.folder / unfinished.ABOUT).is_file()
