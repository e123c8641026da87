"""Bad input: one line that names the key, what it was and what is valid; exit code 2; nothing on disk changes."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from cmt_fast.cli import main
from cmt_fast.run.workspace import Workspace
from cmt_fast.train import loop
from tests.fixtures.tiny import NO_EVAL, SMALL, cmt, tiny

SHRUNK = [*SMALL, *NO_EVAL]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a run of one stage, damaged and foreign files."""
    folder = tmp_path_factory.mktemp("bad")
    loop.train(Workspace(tiny(), folder / "run"), ["pre"])
    (folder / "bad.yaml").write_text("name: [1\n")
    (folder / "list.yaml").write_text("- a\n")
    (folder / "tabs.yaml").write_text("name: a\n\tdata: b\n")
    (folder / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    (folder / "twice.yaml").write_text("name: a\nname: b\n")
    (folder / "evil.yaml").write_text("name: !!python/object/apply:os.system ['touch pwned']\n")
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "wrong.npz", pictures=np.zeros((2, 1, 8, 8), np.uint8))
    np.savez(folder / "flat.npz", images=np.zeros((2, 8), np.float32))
    np.savez(folder / "pickled.npz", images=np.array([{}], dtype=object))
    (folder / "file").write_text("")
    return folder


CASES = [
    # arguments, what the one line must contain
    (["train", "digit"], ["recipe", "'digit'", "did you mean digits?"]),
    (["train", "nowhere/r.yaml"], ["recipe", "nowhere/r.yaml", "digits-mf"]),
    (["train", "bad.yaml"], ["bad.yaml", "line", "not valid YAML"]),
    (["train", "list.yaml"], ["list.yaml", "no mapping"]),
    (["train", "twice.yaml"], ["twice.yaml", "name", "twice"]),
    (["train", "evil.yaml"], ["evil.yaml", "not valid YAML"]),
    (["sample", "run/pre", "--class", "", "--grid", "x.png"], ["--class: '' is no class with rows", "0, 1, 2"]),
    (["ckpt", "export", "run/pre", "--out", "x"], ["unknown argument '--out'", "other actions of `cmt ckpt`"]),
    (["train", "digits", "post.lrr=1e-3"], ["post.lrr", "unknown key", "did you mean lr?"]),
    (["train", "digits", "pots.lr=1e-3"], ["pots", "unknown key", "did you mean post?"]),
    (["train", "digits", "post.lr=fast"], ["post.lr", "fast", "number"]),
    (["train", "digits", "post.lr=-1"], ["post.lr", "-1", "greater than 0"]),
    (["train", "digits", "post.lr=.inf"], ["post.lr", "finite"]),
    (["train", "digits", "post.batch=0"], ["post.batch", "0", "greater than or equal to 1"]),
    (["train", "digits", "post.batch=1.5"], ["post.batch", "1.5", "integer"]),
    (["train", "digits", "post.objective.kind=etc"], ["post.objective.kind", "'etc'", "did you mean ect?"]),
    (["train", "digits", "post.objective.distance=lpip"], ["post.objective.distance", "lpip", "pseudo_huber"]),
    (["train", "digits", "post.objective.q=0.5"], ["post.objective.q", "0.5", "greater than 1"]),
    (["train", "digits", "model.kind=unet"], ["model.kind", "'unet'", "dit"]),
    (["train", "digits", "model.patch=3"], ["model.patch", "3", "8"]),
    (["train", "digits", "model.heads=3"], ["model.heads", "3"]),
    (["train", "digits", "model.kind=mlp", "model.size=null"], ["model.size", "unknown key"]),
    (["train", "digits", "path=vp"], ["path", "'vp'", "ve"]),
    (["train", "digits", "sampler.shift=2"], ["sampler.shift", "2", "path 'linear'", "take 1"]),
    (["train", "digits", "mid.trajectories.shift=2"], ["mid.trajectories.shift", "2", "path 'linear'"]),
    (["train", "digits-mf", "control.objective.velocity=teacher"], ["control.teacher", "missing"]),
    (
        ["train", "digits-mf", "post.objective.velocity=teacher", "post.objective.omega=2"],
        ["post.objective.omega", "2", "post.teacher_guidance"],
    ),
    (["train", "digits", "model.wide_head={width: 30, heads: 4}"], ["model.wide_head.heads", "4 heads of width 30"]),
    (["train", "digits", "path=linear"], ["pre.objective.kind", "denoise", "linear", "flow"]),
    (["train", "digits", "post"], ["override", "'post'", "a.b=value"]),
    (["train", "post.lr=1e-3"], ["recipe", "an override", "cmt train digits post.lr=1e-3"]),
    (["train", "run"], ["recipe", "of a run", "cmt train --resume run"]),
    (["train", "run/pre"], ["recipe", "of a run", "cmt train --resume run"]),
    (["train", "bad"], ["recipe", "did you mean bad.yaml?"]),
    (["train", "tabs.yaml"], ["tabs.yaml", "line 2", "a tab stands where YAML takes spaces"]),
    (["train", "latin.yaml"], ["latin.yaml", "UTF-8"]),
    (["train", "digits", "--lr", "1e-3"], ["--lr", "post.lr=1e-3", "without dashes"]),
    (["train", "digits", "--batch", "32"], ["--batch", "post.batch=32"]),
    (["train", "digits", "--class", "3"], ["--class", "data.expects.classes"]),
    (["train", "digits", "--seed", "3"], ["--seed", "did you mean seed=3"]),
    (["train", "digits", "--device", "cpu"], ["--device", "did you mean device=cpu"]),
    (["train", "digits", "--post.lr=3"], ["--post.lr=3", "did you mean post.lr=3, without dashes"]),
    (["train", "digits", "--resume", "run"], ["--resume", "its own recipe", "leave 'digits' out"]),
    (["train", "--resume", "nowhere"], ["RUN", "nowhere"]),
    (["train", "--resume", "run", "--out", "other"], ["--out", "its own folder"]),
    (["eval", "run/pre", "--steps", "1,1"], ["--steps", "1, 1", "twice"]),
    (["eval", "run/pre", "--steps", "0,1"], ["--steps", "at least 1"]),
    (["eval", "run/pre", "--steps", "1,3"], ["sampler.mid_times", "3 steps"]),
    (["eval", "run/pre", "--n", "1"], ["--n", "at least 2"]),
    (["train", "digits", "eval.steps=1,1"], ["eval.steps", "1, 1", "twice"]),
    (["train", "digits", "eval.steps=[]"], ["eval.steps", "empty"]),
    (["train", "digits", "eval.steps=0"], ["eval.steps", "greater than or equal to 1"]),
    (["train", "digits", "sampler.mid_times={2: [0.8, 0.4]}"], ["sampler.mid_times", "2 times for 2 steps", "needs 1"]),
    (["train", "digits", "sampler.mid_times={1: [0.8]}", "eval.steps=1"], ["sampler.mid_times", "no time in between"]),
    (["train", "digits", "sampler.mid_times.2=90"], ["sampler.mid_times", "[90.0]", "below sampler.t_max (80)"]),
    (["train", "digits", "eval.steps=4", "sampler.mid_times.4=0.4,1.5,5"], ["sampler.mid_times", "must fall"]),
    (["train", "digits-mf", "sampler.solver=dpmpp"], ["sampler.solver", "dpmpp", "path ve"]),
    (["keys", "pst.lr"], ["'pst.lr'", "did you mean post.lr?"]),
    (["keys", "batch_size"], ["'batch_size'", "did you mean post.batch?"]),
    (["keys", "xyzzy"], ["'xyzzy'", "`cmt keys` lists all"]),
    (["recipes", "new", "mine", "--like", "digits"], ["--data", "missing"]),
    (["recipes", "new", "mine", "--data", "run"], ["--like", "missing"]),
    (["recipes", "new", "mine", "--data", "none", "--like", "digits"], ["--data", "'none'", "not a folder"]),
    (["recipes", "new", "mine", "--data", "run", "--like", "gmm"], ["--like", "'gmm'", "points in a plane"]),
    (["recipes", "new", "digits", "--data", "run", "--like", "gmm"], ["'digits'", "recipe of the package"]),
    (["recipes", "new", "bad", "--data", "run", "--like", "gmm"], ["'bad.yaml'", "already exists"]),
    (["recipes", "new", "mine", "--data", "run", "--like", "digits", "--images", "0"], ["--images", "0", "at least 1"]),
    (["recipes", "copy", "digits", "x.yaml", "--images", "9"], ["--images", "cmt recipes new"]),
    (["train", "digits", "name.first=x"], ["name", "digits", "first"]),
    (["train", "digits", "pre.start=mid"], ["pre.start", "'mid'", "does not come before pre"]),
    (["train", "digits", "mid.teacher=null"], ["mid.teacher", "missing"]),
    (["train", "digits", "mid.trajectories=null"], ["mid.trajectories", "missing", "cmt_cm"]),
    (["train", "digits", "mid.trajectories.mode=paper", "mid.batch=100"], ["mid.batch", "100", "16"]),
    (
        ["train", "digits", "mid.trajectories.solver=heun", "mid.trajectories.nfe=15"],
        ["mid.trajectories", "nfe 15", "even"],
    ),
    (["train", "digits", "mid.trajectories.solver=jump"], ["mid.trajectories", "jump", "ve"]),
    (["train", "gmm", "mid.trajectories.guidance=2"], ["mid", "guidance", "class labels"]),
    (["train", "digits", "eval.steps=[1, 3]"], ["sampler.mid_times", "3 steps", "1, 2, 4"]),
    (["train", "digits", "device=gpu"], ["device", "'gpu'", "cpu"]),
    (["train", "digits", "device=cuda:99"], ["device", "'cuda:99'", "CUDA devices"]),
    (["train", "digits", "data={kind: npz, path: none.npz}"], ["data.path", "none.npz", "does not exist"]),
    (["train", "digits", "data={kind: npz, path: text.npz}"], ["data.path", "text.npz"]),
    (["train", "digits", "data={kind: npz, path: wrong.npz}"], ["data.path", "wrong.npz", "'images'"]),
    (["train", "digits", "data={kind: npz, path: flat.npz}"], ["data.path", "(2, 8)", "(N, C, H, W)"]),
    (["train", "digits", "data={kind: npz, path: pickled.npz}"], ["data.path", "pickled.npz"]),
    (["train", "digits", "data={kind: npz}"], ["data.path", "missing"]),
    (["train", "digits", "eval.metric=fid"], ["eval.weights", "missing"]),
    (
        ["train", "digits", "eval.metric=fid", "eval.weights=none.pth"],
        ["eval.weights", "'none.pth'", "eval.metric=frechet"],
    ),
    (["train", "digits", "mid.label_dropout=0.1"], ["mid.label_dropout", "cmt_cm", "pre", "null class is not trained"]),
    (["train", "digits", "loader.kind=dalli"], ["loader.kind", "'dalli'", "did you mean dali?"]),
    (["train", "digits", "loader.kind=dali"], ["loader.kind", "'dali'", "in memory", "torch"]),
    (["train", "digits", "data={kind: latents, path: none}"], ["data.path", "'none'", "not a folder"]),
    (["train", "digits", "data={kind: latents, path: run}"], ["run", "no store", "index.json"]),
    (["train", "digits", "data={kind: latents, path: run, flop: true}"], ["data.flop", "did you mean flip?"]),
    (["data", "verfy", "run"], ["verfy", "did you mean verify?"]),
    (["data", "verify", "run"], ["run", "no store"]),
    (["data", "stats", "nowhere"], ["nowhere", "no store"]),
    (["data", "encode", "nowhere", "out", "--vae", "v", "--size", "64"], ["IMAGES", "nowhere"]),
    (["data", "encode", "run", "out", "--vae", "v", "--size", "0"], ["--size", "at least 1"]),
    (["data", "import", "text.npz", "out", "--format", "edm2"], ["text.npz", "no zip"]),
    (["data", "import", "text.npz", "out", "--format", "edm3"], ["--format", "edm3", "did you mean edm"]),
    (["data", "import", "flat.npz", "out", "--format", "npy", "--factor", "nan"], ["--factor", "nan", "positive"]),
    (["data", "import", "flat.npz", "out", "--format", "edm2"], ["flat.npz", "(2, 8)"]),
    (["sample", "run/pre", "--decode", "--out", "x.npz"], ["--decode", "no latents"]),
    (["sample", "run/pre", "--vae", "v", "--out", "x.npz"], ["--vae", "--decode"]),
    (["train", "digits", "--stages", "pre,past", "--out", "x"], ["--stages", "'past'", "did you mean post?"]),
    (["train", "digits", *SHRUNK, "--stages", "post", "--out", "run"], ["mid", "train it first"]),
    (["train", "digits", *SHRUNK, "seed=7", "--out", "run"], ["--out", "another configuration", "seed: 0 -> 7"]),
    (["train", "digits", "--from", "nowhere", "--out", "x"], ["RUN", "nowhere"]),
    (["train", "digits", "--otu", "x"], ["--otu", "did you mean --out?"]),
    (["trian"], ["cmt: COMMAND: 'trian'", "valid are train, search", "did you mean train?"]),
    ([], ["cmt: COMMAND is missing", "valid are train, search", "`cmt --help`"]),
    (["recipes"], ["ACTION is missing; valid are ls, show, copy, new, validate\n"]),
    (["runs"], ["cmt runs: ACTION is missing; valid are ls, show", "`cmt runs --help`"]),
    (["sample"], ["cmt sample: RUN/STAGE is missing: a stage of a run, such as runs/digits/post"]),
    (["search", "digits", "control"], ["cmt search: --grid is missing: values", "--out is missing"]),
    (["runs", "ls", "--sort"], ["cmt runs ls: --sort: expected one argument"]),
    (["sample", "run/pots", "--out", "x.npz"], ["RUN/STAGE", "run/pots", "did you mean post?"]),
    (
        ["sample", "run"],
        ["RUN/STAGE: 'run' does not end in a stage", "it is a run, whose stages are named run/pre, run/mid"],
    ),
    (["sample", "nowhere/post", "--out", "x.npz"], ["RUN", "nowhere"]),
    (["sample", "run/mid", "--out", "x.npz"], ["mid", "no checkpoint"]),
    (["sample", "run/pre", "--steps", "0", "--out", "x.npz"], ["--steps", "at least 1"]),
    (["sample", "run/pre", "--steps", "3", "--out", "x.npz"], ["sampler.mid_times", "3 steps"]),
    (["sample", "run/pre", "--out", "no/folder/x.npz"], ["--out", "no/folder"]),
    (["sample", "run/pre", "--out", "x.png"], ["--out", "neither a folder", "--grid"]),
    (["sample", "run/pre", "--out", "x.npz", "--format", "png"], ["--format", "png", "arrays or adm"]),
    (["sample", "run/pre", "--out", "x", "--format", "adm"], ["--format", "adm", "a file .npz"]),
    (["sample", "run/pre", "--format", "adm"], ["--format", "goes with --out"]),
    (["sample", "run/pre", "--out", "run"], ["--out", "run holds other files"]),
    (["sample", "run/pre", "--n", "0", "--out", "x"], ["--n", "0 is not at least 1"]),
    (["sample", "run/pre", "--first", "-1", "--out", "x"], ["--first", "-1 is not at least 0"]),
    (["sample", "run/pre", "--guidance", "2", "--out", "x"], ["--guidance", "null class is not trained"]),
    (["sample", "run/pre", "--strip", "x.png", "--strip-steps", "1,3"], ["sampler.mid_times", "3 steps"]),
    (["sample", "run/pre", "--strip", "x.png", "--strip-steps", "1,a"], ["--strip-steps", "'1,a'"]),
    (["sample", "run/pre", "--strip-steps", "1"], ["--strip-steps", "goes with --strip"]),
    (["sample", "run/pre", "--interpolate", "no/x.png"], ["--interpolate", "no/x.png"]),
    (["eval", "run/pre", "--steps", "one"], ["--steps", "'one'"]),
    (["report", "nowhere"], ["RUN", "nowhere"]),
    (["watch", "nowhere"], ["RUN", "'nowhere'", "no run.json"]),
    (["watch", "run", "--every", "0"], ["--every", "0.0", "above 0"]),
    (["watch", "run", "--serve", "70000"], ["--serve", "70000", "1 to 65535"]),
    (["watch", "run", "run", "--serve"], ["--serve", "2 are named"]),
    (["train", "digits", "loggers=[tensorbord]"], ["loggers", "'tensorbord'", "tensorboard"]),
    (["ckpt", "verify", "nowhere"], ["RUN", "nowhere"]),
    (["runs", "lst"], ["'lst'", "did you mean ls?"]),
    (["runs", "ls", "nowhere"], ["FOLDER", "'nowhere'", "no folder"]),
    (["runs", "ls", "run", "--sort", "sise"], ["--sort", "'sise'", "did you mean size?"]),
    (["runs", "show", "run/pre"], ["RUN", "'run/pre'", "run.json"]),
    (["runs", "compare", "run", "nowhere"], ["RUN", "nowhere"]),
    (["runs", "compare", "run", "run", "--out", "x.jpg"], ["--out", "'x.jpg'", ".png"]),
    (["runs", "rm", "nowhere", "--yes"], ["RUN", "'nowhere'", "no run"]),
    (["runs", "rm", "run", "--yes"], ["RUN", "run", "sign of life", "--force"]),
    (["runs", "rm", "run", "--keep", "all"], ["--keep", "'all'", "nothing"]),
    (["runs", "rm", "run", "--force"], ["--yes", "--dry-run"]),
    (["ckpt", "reconstruct", "run/pre", "--sigma-rel", "0.1", "--out", "e.safetensors"], ["run/pre", "snapshots"]),
    (["recipes", "show", "digitz"], ["digitz", "did you mean digits?"]),
    (["recipes", "copy", "digits", "file"], ["'file'", "exists"]),
    (["search", "digits", "control", "--grid", "control.lr", "--out", "s"], ["--grid", "control.lr", "a.b=v1,v2"]),
    (["search", "digits", "control", "--grid", "control.lr=1,x", "--out", "s"], ["control.lr", "x"]),
]


def tree(folder) -> dict[str, int]:
    return {
        os.path.join(root, f): os.stat(os.path.join(root, f)).st_mtime_ns
        for root, _, files in os.walk(folder)
        for f in files
    }


# met in public: facebookresearch/pytorch_GAN_zoo#92
@pytest.mark.parametrize("arguments, words", CASES, ids=[" ".join(a for a in c[0] if a not in SHRUNK) for c in CASES])
def test_one_line_and_nothing_changes(arguments, words, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = tree(world)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("cmt: "), err
    for word in words:
        assert word in err, err
    assert {k: v for k, v in tree(world).items() if not k.endswith(".lock")} == {
        k: v for k, v in before.items() if not k.endswith(".lock")
    }


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no file")
def test_what_the_system_refuses_is_one_line_with_the_whole_path(monkeypatch, capsys):
    monkeypatch.chdir("/proc")
    assert main(["recipes", "copy", "digits", "a.yaml"]) == 1
    assert re.fullmatch(r"cmt: /proc/\S*a\.yaml: No such file or directory\n", capsys.readouterr().err)


def test_exit_code_of_the_process(tmp_path):
    done = cmt("train", "digits", "pre.lr=slow", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused(tmp_path):
    work = Workspace(tiny(), tmp_path)
    with work.lock():
        done = cmt("train", "digits", *SHRUNK, "--out", str(tmp_path))
    assert done.returncode == 2 and "in use by another process" in done.stderr


def test_a_command_of_its_own_process_follows_the_switches_of_this_one(tmp_path, monkeypatch):
    """The choice of an assembler sets some while tests run: children are of the same world, not refused."""
    before = cmt("train", "digits", "pre.lr=slow", cwd=tmp_path)
    monkeypatch.setenv("TRITON_PLANTED", "1")
    after = cmt("train", "digits", "pre.lr=slow", cwd=tmp_path)
    assert (before.returncode, before.stderr) == (after.returncode, after.stderr) and after.returncode == 2


@pytest.mark.parametrize(
    "command",
    [
        "tune-teacher RUN --json",
        "eval RUN/post --make-reference",
        "runs compare RUN RUN --out",
        "sample RUN/post -n 2 --strip",
        "search digits pre --out RUN --grid pre.batch=4,8 --record",
        "ckpt reconstruct RUN/post --out",
    ],
)
def test_no_file_takes_the_place_of_a_pipe_or_of_dev_stdout(command, tmp_path, capsys):
    """Files are written by rename: a pipe was replaced, and, as root, /dev/stdout for the whole machine."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for place in (str(pipe), "/dev/stdout"):
        assert main([*command.replace("RUN", str(tmp_path)).split(), place]) == 2
        option = command.split()[-1]
        assert f"{option}: {place} is there and is no file and no folder" in capsys.readouterr().err
    assert pipe.is_fifo() and os.path.islink("/dev/stdout") and os.listdir(tmp_path) == ["pipe.png"]
