"""Samples on disk: what is written is what is drawn, whatever was killed, and however many ranks wrote it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmt_fast import api
from cmt_fast.cli import main
from cmt_fast.diffusion.sampling import Sampler
from cmt_fast.render import grids
from cmt_fast.run import claiming, pictures, samples
from cmt_fast.storage import npz_blocks
from tests.fixtures import forked
from tests.fixtures.tiny import tiny
from tests.run.test_guidance import weights

KEYS = ["eval.n=20", "eval.batch=10", "pre.label_dropout=0.1", "mid.trajectories.guidance=1.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of digits with the stages pre and post, which no training made."""
    folder = tmp_path_factory.mktemp("samples") / "run"
    weights(tiny("digits", *KEYS), folder)
    return weights(tiny("digits", *KEYS), folder, stage="post")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def images(folder: Path) -> torch.Tensor:
    """What the PNGs hold, (n, 1, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(Image.open(p)))[None] for p in sorted(folder.glob("*.png"))])


def test_a_folder_holds_the_samples_and_how_each_is_drawn_again(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sample", f"{run}/post", "--n", "25", "--seed", "4", "--steps", "2", "--out", f"{out}/"]) == 0
    x, labels = api.sample(run / "post", n=25, steps=2, seed=4)
    assert sorted(contents(out)) == [*(f"{i:06d}.png" for i in range(25)), "samples.json"]
    assert torch.equal(images(out), samples.as_bytes(x))
    about = json.loads(Image.open(out / "000017.png").text["cmt-fast"])
    assert (about["index"], about["seed"], about["steps"], about["class"]) == (17, 4, 2, int(labels[17]))
    whole = json.loads((out / "samples.json").read_text())
    assert whole["weights"] == about["weights"] and whole["n"] == 25 and whole["names"][3] == "3"
    alone = ["--first", str(about["index"]), "--n", "1", "--seed", "4", "--steps", "2", "--out", str(tmp_path / "one")]
    assert main(["sample", f"{run}/post", *alone]) == 0
    got, want = images(tmp_path / "one")[0].int(), images(out)[17].int()
    assert (got - want).abs().max() <= 1  # products of other batches round otherwise


@pytest.mark.parametrize("kind", ["png", "arrays", "adm"])
def test_a_killed_command_goes_on_to_the_same_bytes(run, tmp_path, kind, monkeypatch):
    """What a kill left, and what a disk cut off, is no sample. Nothing is mapped: on a full disk a map is a SIGBUS."""
    name = "png" if kind == "png" else "x.npz"
    say = lambda folder: [
        "sample",
        f"{run}/post",
        "--n",
        "35",
        "--format",
        kind,
        "--out",
        str(tmp_path / folder / name),
    ]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    assert main(say("whole")) == 0
    monkeypatch.setattr(time, "time", lambda: 2e9)  # another day
    place, what = (grids, "png") if kind == "png" else (npz_blocks.np.lib.format, "write_array_header_1_0")
    real, calls = getattr(place, what), []

    def dies(*arguments, **more):
        calls.append(1)
        if len(calls) == (14 if kind == "png" else 3):
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, what, dies)
        assert main(say("killed")) == 130  # as a Ctrl-C does
    part = tmp_path / "killed" / ("png" if kind == "png" else "x.npz.part")
    done = sorted(p for p in part.iterdir() if p.suffix in (".png", ".npy"))
    assert len(done) == (13 if kind == "png" else 2) and not (tmp_path / "killed/x.npz").exists()
    (part / ".tmp-left-1").write_bytes(b"torn")
    if kind == "png":
        done[5].write_bytes(done[5].read_bytes()[:-1])
    kept = done[0].stat().st_mtime_ns
    drawn, block = [], samples.Drawing.block
    monkeypatch.setattr(samples.Drawing, "block", lambda self, rows: drawn.append(rows) or block(self, rows))
    assert main(say("killed")) == 0
    assert [rows.start for rows in drawn] == ([0, 10, 20, 30] if kind == "png" else [20, 30])
    if kind == "png":
        assert contents(tmp_path / "killed/png") == contents(tmp_path / "whole/png")
        assert done[0].stat().st_mtime_ns == kept
        return
    one, other = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "killed"))
    assert one == other
    assert os.listdir(tmp_path / "killed") == ["x.npz"]


def test_blocks_go_as_they_are_joined_and_a_killed_joining_goes_on(run, tmp_path, monkeypatch):
    """Killed with two of four blocks in the archive to be: nothing is drawn again, of more samples only what is new."""
    say = lambda out, n: ["sample", f"{run}/post", "--n", str(n), "--out", str(tmp_path / out)]
    assert main(say("whole.npz", 35)) == 0 and main(say("more.npz", 47)) == 0
    monkeypatch.setattr(npz_blocks, "SAFE", 1)
    record, drawn, block = npz_blocks._record, [], samples.Drawing.block
    monkeypatch.setattr(samples.Drawing, "block", lambda self, rows: drawn.append(rows.start) or block(self, rows))
    for out, n, then, at, again in (
        ("a.npz", 35, 35, 2, []),
        ("b.npz", 35, 47, 2, [30, 40]),
        ("c.npz", 35, 47, 4, [30, 40]),  # all of 35, of which five are half a block of 47
    ):
        done = []

        def dies(file, gone, state, at=at, done=done):
            record(file, gone, state)
            done.append(state.rows)
            if len(done) == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(npz_blocks, "_record", dies)
            assert main(say(out, n)) == 130
        left = sorted(p.name for p in (tmp_path / f"{out}.part").glob("*.npy"))
        assert left == [f"{i:09d}-{min(i + 10, n):09d}.npy" for i in range(0, n, 10)][at:] and done[-1] == min(
            10 * at, n
        )
        drawn.clear()
        assert main(say(out, then)) == 0 and drawn == again
        want = "whole.npz" if then == 35 else "more.npz"
        assert (tmp_path / out).read_bytes() == (tmp_path / want).read_bytes()
    assert np.load(tmp_path / "c.npz")["images"].shape == (47, 1, 8, 8) and not list(tmp_path.glob("*.part"))


def test_arrays_are_those_of_the_api_and_adm_reads_bytes_in_three_channels(run, tmp_path):
    x, labels = api.sample(run / "post", n=25)
    for kind in ("arrays", "adm"):
        said = api.sample_to(run / "post", tmp_path / f"{kind}.npz", n=25, format=kind)
        assert "25 samples" in said and said.startswith(str(tmp_path / f"{kind}.npz"))
    arrays, adm = np.load(tmp_path / "arrays.npz"), np.load(tmp_path / "adm.npz")
    assert torch.equal(torch.from_numpy(arrays["images"]), x) and arrays["images"].dtype == np.float32
    assert adm.files == ["arr_0", "arr_1"] and adm["arr_0"].shape == (25, 8, 8, 3) and adm["arr_0"].dtype == np.uint8
    assert np.array_equal(adm["arr_0"], samples.as_bytes(x).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    assert np.array_equal(adm["arr_1"], labels.numpy()) and np.array_equal(arrays["labels"], labels.numpy())
    with pytest.raises(TypeError, match="'clases' is no argument; valid are batch, classes"):
        api.sample_to(run / "post", tmp_path / "x", clases="3")


def test_a_folder_goes_on_only_with_its_own_samples(run, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["sample", f"{run}/post", "--out", str(out), "--n"]
    assert main([*command, "12"]) == 0
    before = contents(out)
    for more, said in (
        (["12", "--seed", "1"], "holds other samples (seed: 0, not 1)"),
        (["12", "--class", "3"], "holds other samples (labels: data"),
        (["12", "--steps", "2"], "holds other samples (steps: 1, not 2; sampler: "),
        (["11"], "holds 12 samples, more than --n 11"),
    ):
        assert main([*command, *more]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    assert contents(out) == before
    assert main([*command, "22"]) == 0
    after = contents(out)
    assert len(after) == 23 and all(after[k] == v for k, v in before.items() if k != "samples.json")
    with claiming.alone(out):
        assert main([*command, "22"]) == 2 and "is being written by another process" in capsys.readouterr().err
    assert main([*command, "22"]) == 0 and contents(out) == after


def test_samples_of_other_times_are_other_samples(run, tmp_path, monkeypatch, capsys):
    """A trained stage does not depend on them, so a run may have others today; what was drawn before they were told goes on."""
    command = ["sample", f"{run}/post", "--steps", "2", "--n", "4", "--out"]
    places = [str(tmp_path / name) for name in ("out", "x.npz")]
    assert [main([*command, place]) for place in places] == [0, 0]
    capsys.readouterr()
    monkeypatch.setattr(Sampler, "mid_times", lambda self, steps: (0.5,))
    for place in places:
        assert main([*command, place]) == 2
        assert "(sampler: {'t_max': 80.0, 'mid_times': [1.2]}, not" in capsys.readouterr().err
    about = json.loads((tmp_path / "out" / samples.ABOUT).read_text())
    (tmp_path / "out" / samples.ABOUT).write_text(json.dumps({k: v for k, v in about.items() if k != "sampler"}))
    assert main([*command, places[0]]) == 0


def test_an_npz_is_not_written_over(run, tmp_path, capsys, monkeypatch):
    """A finished one says what drew it; the same command again draws nothing, any other and any other file are refused."""
    out = tmp_path / "x.npz"
    command = ["sample", f"{run}/post", "--out", str(out), "--n", "12"]
    assert main(command) == 0
    before, left = out.read_bytes(), tmp_path / "x.npz.part"
    left.mkdir()  # by a kill between the file and the end
    (left / "samples.json").write_text("{}")
    assert np.load(out, allow_pickle=False).files == ["images", "labels"]
    monkeypatch.setattr(samples.Drawing, "block", None)
    capsys.readouterr()
    assert main(command) == 0 and "they were there" in capsys.readouterr().out
    for more, said in (
        (["--seed", "1"], "holds other samples (seed: 0, not 1)"),
        (["--format", "adm"], "holds other samples (kind: arrays, not adm)"),
        (["--n", "13"], "holds other samples (n: 12, not 13)"),
    ):
        assert main([*command, *more]) == 2 and said in capsys.readouterr().err
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    np.savez(out, images=np.zeros(3))
    assert main(command) == 2 and "is there and does not say what drew it" in capsys.readouterr().err
    assert json.loads(claiming.comment({"classes": list(range(20000))}, 3))["classes"] != list(range(20000))


@pytest.mark.parametrize("name", ["pipe.npz", "nowhere.npz", "round.npz", "round", "device.npz", "deep.npz"])
def test_what_is_no_file_in_the_place_of_samples_is_refused_in_time(run, tmp_path, capsys, name):
    """A pipe was waited for, /dev/zero read until memory ended, 60,000 brackets a traceback, a dead link replaced."""
    out = tmp_path / name
    if name == "pipe.npz":
        os.mkfifo(out)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(20)  # where it is opened
    elif name == "deep.npz":
        with zipfile.ZipFile(out, "w") as archive:
            archive.comment = b"[" * 60_000
    else:
        out.symlink_to({"nowhere.npz": "gone", "device.npz": "/dev/null"}.get(name, name))
    before = out.lstat()
    assert main(["sample", f"{run}/post", "--out", str(out), "--n", "2"]) == 2
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another name" in said
    assert out.lstat().st_ino == before.st_ino and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_pipe_in_the_place_of_a_picture_is_none_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "000000.png")
    reader = os.open(tmp_path / "000000.png", os.O_RDWR | os.O_NONBLOCK)  # else a fault would be a test that never ends
    os.write(reader, b"\x89PNG\r\n\x1a\n")
    assert not grids.whole_png(tmp_path / "000000.png")
    assert os.read(reader, 8)  # it was not opened
    os.close(reader)


def test_a_disk_that_is_full_is_told_with_the_way_on(run, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(grids, "png", full)
    assert (
        main(["sample", f"{run}/post", "--n", "2", "--out", f"{tmp_path}/guided-1.5/"]) == 75
    )  # and a name with a dot
    line = capsys.readouterr().err
    assert (
        "No space left" in line and "rerun the same command" in line and "guided-1.5" in line and line.count("\n") == 1
    )


@pytest.mark.parametrize(
    "options, said",
    [
        (["--seed", "-1"], "--seed: -1 is not between 0 and 4294967295"),
        (["--seed", "4294967296"], "--seed: 4294967296 is not between"),
        (["--grid", "x.jpg"], "--grid: 'x.jpg' is no file .png"),
        (["--n", "1", "--interpolate", "x.png"], "--interpolate: goes from one sample to another, and --n is 1"),
        (["--out", "guided-1.5"], "'guided-1.5' is neither a folder (FOLDER/) nor an .npz"),
    ],
)
def test_what_cannot_be_drawn_or_named_so_is_refused(run, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", f"{run}/post", *options]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and not list(tmp_path.iterdir())


def test_two_ranks_write_what_one_writes(run, tmp_path):
    command = ["-m", "cmt_fast", "sample", f"{run}/post", "--n=25", "--out", str(tmp_path / "two")]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*forked.python("torch"), *command],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert "25 samples" in said[0] and "samples" not in said[1]
    api.sample_to(run / "post", tmp_path / "one", n=25)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_signal_stops_between_pieces_and_what_is_there_counts(run, tmp_path, monkeypatch, capsys):
    command = ["sample", f"{run}/post", "--n", "30", "--out", str(tmp_path / "out")]
    drawn, block = [], samples.Drawing.block

    def asked(self, rows):
        drawn.append(rows)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return block(self, rows)

    monkeypatch.setattr(samples.Drawing, "block", asked)
    assert main(command) == 128 + signal.SIGTERM
    assert "stopped; nothing is lost, rerun the same command to resume" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.png"))) == 20 and len(drawn) == 2
    assert main(command) == 0 and [rows.start for rows in drawn] == [0, 10, 20]


def test_guidance_is_of_the_solver_and_few_steps_say_theirs(run, tmp_path, capsys):
    command = ["sample", f"{run}/post", "--n", "4", "--out", str(tmp_path / "x.npz"), "--guidance", "2"]
    assert main(command) == 2
    line = capsys.readouterr().err
    assert "post draws in few steps" in line and "trained at guidance 1.5 (mid.trajectories.guidance)" in line
    api.sample_to(run / "pre", tmp_path / "flag.npz", n=4, guidance=2.0)  # a diffusion model: by its solver
    weights(tiny("digits", *KEYS, "sampler.guidance=2"), tmp_path / "other")
    want, _ = api.sample(tmp_path / "other/pre", n=4, steps=16, solver=True)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "flag.npz")["images"]), want)
    assert not torch.equal(want, api.sample(run / "pre", n=4, steps=16, solver=True)[0])


def test_pictures(run, tmp_path, monkeypatch, capsys):
    """Nothing asked for is a grid; a way between two samples begins at the one and ends at the other; a strip says its gaps."""
    monkeypatch.chdir(tmp_path)
    assert main(["sample", f"{run}/post"]) == 0 and Path("digits-post.png").is_file()
    drawn = {}
    monkeypatch.setattr(pictures.grids, "grid", lambda rows, path: drawn.update({path.name: rows}))
    assert (
        main(["sample", f"{run}/post", "--class", "3", "--steps", "2", "--interpolate", "i.png", "--strip", "s.png"])
        == 0
    )
    said = capsys.readouterr().out
    assert "not in it: 8 steps: has no 7 times for 8 steps" in said
    opened = lambda k: samples.opened(f"{run}/post", samples.Request(12, k), samples.Asked("3"))
    two = opened(2)
    x = two.setting.generate(two.net, 2, 12, 0)
    ways = drawn["i.png"]
    assert main(["sample", f"{run}/post", "--n", "3", "--interpolate", "one.png"]) == 0 and len(drawn["one.png"]) == 1
    assert [len(row) for _, row in ways] == [pictures.BETWEEN] * pictures.PAIRS
    for i, (_, row) in enumerate(ways):
        torch.testing.assert_close(row[0], x[2 * i], rtol=1e-4, atol=1e-4)  # a batch of another size
        assert not torch.equal(row[0], row[4])
    assert [title.split("\n")[0] for title, _ in drawn["s.png"]] == ["1 step", "2 steps", "4 steps"]
    for k, (_, row) in zip((1, 2, 4), drawn["s.png"]):
        torch.testing.assert_close(row, opened(k).setting.generate(two.net, k, 10, 0), rtol=1e-4, atol=1e-4)


def test_noise_between_two_is_as_long_as_noise():
    a, b = torch.randn(2, 5, 3, 16, 16).unbind()
    lengths = [v.flatten(1).norm(dim=1) for v in (a, b)]
    torch.testing.assert_close(pictures.slerp(a, b, 0.0), a)
    torch.testing.assert_close(pictures.slerp(a, b, 1.0), b)
    torch.testing.assert_close(pictures.slerp(a, b, 0.5).flatten(1).norm(dim=1), sum(lengths) / 2)
    torch.testing.assert_close(pictures.slerp(a, a, 0.3), a)


def test_nan_is_no_pixel():
    with pytest.raises(FloatingPointError):
        samples.as_bytes(torch.tensor([[[[float("nan")]]]]))
    assert samples.as_bytes(torch.tensor([-2.0, -1, 0, 1, 9])).tolist() == [0, 0, 128, 255, 255]
