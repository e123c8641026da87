"""A run is used where its data, its teacher and the folder that it was trained from are not; and it goes on there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cmt_fast import cli
from cmt_fast.config import fingerprint, loading, paths
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import classes
from cmt_fast.run import absent, folder, workspace
from cmt_fast.storage import checkpoint, sound
from cmt_fast.storage.files import checksum
from tests.fixtures import small
from tests.fixtures.stores import make_store
from tests.fixtures.tiny import stop_after_a_checkpoint

pytestmark = pytest.mark.usefixtures("plain_plots")
MODEL = {"kind": "dit", "width": 16, "depth": 1, "heads": 2}


def cmt(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def recipe_of(home: Path, data: dict, **more) -> Path:
    """A recipe in `home` whose paths are relative."""
    tree = yaml.safe_load(small.recipe(home, MODEL, channels=3).read_text())
    tree["data"] = data
    for key, value in more.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    (home / "small.yaml").write_text(yaml.safe_dump(tree))
    return home / "small.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run trained at home by relative paths; then only its folder goes abroad: no data, no counts, another current folder."""
    home, abroad = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("abroad")
    recipe_of(home, {"kind": "npz", "path": "data.npz"}, eval={"labels": "counts.npy"})
    counts = np.array([0] * 6 + [2] * 2)
    np.save(home / "counts.npy", counts)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["train", "small.yaml"]) == 0
        assert cli.main(["sample", "runs/small/post", "--n", "8", "--out", "want.npz"]) == 0
    shutil.copytree(home / "runs" / "small", abroad / "run")
    return home, abroad


@pytest.fixture
def gone(world, monkeypatch):
    """Home is out of reach while the test runs."""
    home, abroad = world
    hidden = home.with_name(home.name + "-hidden")
    home.rename(hidden)
    monkeypatch.chdir(abroad)
    yield hidden
    hidden.rename(home)


def test_samples_are_those_of_home(gone, tmp_path, capsys):
    code, _, err = cmt(capsys, "sample", "run/post", "--n", "8", "--out", tmp_path / "x.npz")
    assert code == 0, err
    with np.load(tmp_path / "x.npz") as got, np.load(gone / "want.npz") as want:
        assert all(np.array_equal(got[k], want[k]) for k in ("images", "labels"))
        assert got["labels"].tolist().count(2) == 2  # the file of counts is not here, and its law is
    code, _, err = cmt(capsys, "sample", "run/post", "--n", "3", "--class", "1", "--out", tmp_path / "y.npz")
    assert code == 0, err


def test_exports_are_those_of_home(gone, tmp_path, capsys):
    code, _, err = cmt(capsys, "ckpt", "export", "run/post", tmp_path / "x.safetensors")
    assert code == 0, err
    from safetensors.torch import load_file

    want = checkpoint.complete(gone / "runs/small/post").tensors("ema-0")
    assert all(torch.equal(want[k], x) for k, x in load_file(tmp_path / "x.safetensors").items())


def test_figures_and_the_page_are_those_of_home(gone, capsys):
    """Judged anew, by what the run keeps of its data: every figure is the one that home had."""
    names = ("pre", "mid", "post")
    want = {name: json.loads((gone / "runs/small" / name / "figures.json").read_text()) for name in names}
    for name in names:
        (Path("run") / name / "figures.json").unlink()
    code, _, err = cmt(capsys, "report", "run")
    assert code == 0, err
    got = {name: json.loads((Path("run") / name / "figures.json").read_text()) for name in names}
    assert got == want
    code, out, err = cmt(capsys, "eval", "run/post", "--steps", "1", "--json")
    assert code == 0, err
    ours = json.loads(out)["steps"]["1"]
    assert ours["frechet"] == want["post"]["few"]["1"]["frechet"]


def test_data_that_are_here_are_opened_where_their_rows_are_read_and_not_before(world, tmp_path, monkeypatch, capsys):
    home, _ = world
    shutil.copytree(home / "runs/small", tmp_path / "run")
    monkeypatch.chdir(home)
    tree = lambda: sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(absent, "load", lambda *_: pytest.fail("the data were opened"))
        for stage in ("mid", "post"):
            (tmp_path / "run" / stage / "figures.json").unlink()
        for say in (
            ("report", tmp_path / "run"),
            ("eval", tmp_path / "run/post"),
            ("sample", tmp_path / "run/post", "-n", 4),
        ):
            before = tree()
            code, _, err = cmt(capsys, *say, *(("--out", tmp_path / "x.npz") if say[0] == "sample" else ()))
            assert code == 0, err
            assert say[0] == "report" or tree() == before, "a run that is read was written to, or gave a sign of life"
    for stage in ("mid", "post"):
        a, b = ((place / stage / "figures.json").read_text() for place in (home / "runs/small", tmp_path / "run"))
        assert a == b
    code, out, err = cmt(capsys, "eval", tmp_path / "run/post", "-n", 5, "--precision-recall", "--labels", "data")
    assert code == 0 and "floor" in out, err


def test_what_needs_rows_says_where_they_would_be(gone):
    work = workspace.open_run(Path("run"))
    assert not work.data.here and work.data.n == 12 and classes.counts(work.data).tolist() == [4, 4, 4]
    with pytest.raises(ConfigError, match="data.path: 'data.npz' is not here"):
        work.data.rows(torch.arange(2))


@pytest.mark.parametrize("file, said", [("reference/*.safetensors", "is damaged, which would do in their place"),
                                        ("extractor.safetensors", "figures of this run are in its features")])  # fmt: skip
def test_what_stands_for_the_data_and_is_damaged_is_named(gone, tmp_path, capsys, file, said):
    shutil.copytree("run", tmp_path / "run")
    for path in (tmp_path / "run").glob(file):
        path.write_bytes(path.read_bytes()[:-9])
    code, _, err = cmt(capsys, "eval", tmp_path / "run/post")
    assert code == 2 and err.count("\n") == 1 and said in err, err


def test_goes_on_where_its_data_are_now(gone, tmp_path, capsys):
    """The run goes on from another folder with its data in a third place, and others of the same name are refused."""
    code, out, err = cmt(capsys, "train", "--resume", "run")
    assert code == 0 and "nothing is left to train: pre, mid, post of run" in out, err
    shutil.copytree("run", tmp_path / "begun", ignore=shutil.ignore_patterns("post"))
    code, _, err = cmt(capsys, "train", "--resume", tmp_path / "begun")
    assert code == 2 and "data.path" in err
    with np.load(gone / "data.npz") as was:
        np.savez(tmp_path / "other.npz", images=was["images"] * 0.9, labels=was["labels"])
    code, _, err = cmt(capsys, "train", "--resume", tmp_path / "begun", f"data.path={tmp_path / 'other.npz'}")
    assert code == 2 and "not the rows that" in err, err
    code, out, err = cmt(capsys, "train", "--resume", tmp_path / "begun", f"data.path={gone / 'data.npz'}")
    assert code == 0 and "mid done" in out, err
    a, b = (checkpoint.complete(p / "post").tensors("ema-0") for p in (Path("run"), tmp_path / "begun"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_stage_begun_at_home_ends_abroad_with_the_same_bits(tmp_path, monkeypatch, capsys):
    home, abroad = tmp_path / "home", tmp_path / "abroad"
    home.mkdir()
    recipe_of(home, {"kind": "npz", "path": "data.npz"}, mid={"images_nimg": 32, "checkpoint_every_nimg": 8})
    monkeypatch.chdir(home)
    code, _, err = cmt(capsys, "train", "small.yaml", "--stages", "pre,mid", "--out", "whole")
    assert code == 0, err
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/mid")
    stop_after_a_checkpoint(workspace.Workspace(loading.load("small.yaml"), Path("cut")))
    abroad.mkdir()
    shutil.move("cut", abroad / "cut")
    (home / "data.npz").rename(tmp_path / "moved.npz")
    monkeypatch.chdir(abroad)
    say = ("train", "--resume", "cut", "--stages", "mid", f"data.path={tmp_path / 'moved.npz'}")
    code, out, err = cmt(capsys, *say)
    assert code == 0 and "resumes at step" in out, err
    a, b = (checkpoint.complete(p / "mid").tensors("ema-0") for p in (home / "whole", abroad / "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_store_that_became_another_is_not_taken_for_the_run_s(tmp_path, monkeypatch, capsys):
    """The path stands, what is there is another store: samples keep the labels of the one that was trained on."""
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "store", 30, (4, 8, 8), classes=3, vae=("some/vae", "ab" * 16))
    recipe = recipe_of(tmp_path, {"kind": "latents", "path": "store"})
    code, _, err = cmt(capsys, "train", recipe, "--stages", "pre", "--out", "run")
    assert code == 0, err
    before = workspace.open_run(Path("run"))
    assert getattr(before.data, "here", True)
    shutil.rmtree(tmp_path / "store")
    make_store(tmp_path / "store", 40, (4, 8, 8), classes=2, vae=("other/vae", "cd" * 16))
    after = workspace.open_run(Path("run"))
    assert not after.data.here and after.data.classes == 3 and after.decoding.latents.vae == "some/vae"
    with pytest.raises(ConfigError, match="holds other rows than this run was trained on"):
        after.data.rows(torch.arange(2))
    assert torch.equal(after.setting.labels(torch.arange(30)), before.setting.labels(torch.arange(30)))
    assert after.decoding.latents == before.decoding.latents and after.data.normalisation == before.data.normalisation


def test_a_teacher_that_moved_along_is_found_beside_the_run(tmp_path, monkeypatch):
    """From here and beside the run only the one of the weights that the run saw, not another that is called so."""
    for name in ("a", "b"):
        (tmp_path / "old" / name).mkdir(parents=True)
        about = {"root": str(tmp_path), "networks": {"old/a/pre": "ab" * 16, "gone/b/pre": "cd" * 16}}
        (tmp_path / "old" / name / folder.RUN_FILE).write_text(sound.signed(about))
        step = checkpoint.folder_of(tmp_path / "old" / name / "pre", 1)
        step.mkdir(parents=True)
        body = {
            "format": checkpoint.FORMAT,
            "step": 1,
            "files": {"ema-0.safetensors": {"bytes": 8, "xxh3_128": "ab" * 16}},
        }
        (step / "manifest.json").write_text(checkpoint.signed(body))
    monkeypatch.chdir(tmp_path)
    assert folder.located("old/a", Path("old/b")) == tmp_path / "old/a"
    shutil.move("old", "new")
    monkeypatch.chdir("/")
    assert folder.located("old/a", tmp_path / "new/b") == tmp_path / "new/a"
    assert folder.located("old/none", tmp_path / "new/b") == Path("old/none")
    # a name that the run has not had is no run beside it, and no run is its own teacher
    assert folder.located("other/a", tmp_path / "new/b") == Path("other/a")
    assert folder.located("gone/b", tmp_path / "new/b") == tmp_path / "gone/b"
    manifest = checkpoint.folder_of(tmp_path / "new/a/pre", 1) / "manifest.json"
    manifest.write_text(
        checkpoint.signed({**body, "files": {"ema-0.safetensors": {"bytes": 8, "xxh3_128": "ef" * 16}}})
    )
    assert folder.located("old/a", tmp_path / "new/b") == tmp_path / "old/a"
    about = {**about, "root": "/nowhere", "roots": [str(tmp_path)]}
    (tmp_path / "new/b" / folder.RUN_FILE).write_text(sound.signed(about))
    assert folder.located("new/a", tmp_path / "new/b") == tmp_path / "new/a"
    about = {**about, "root": str(tmp_path), "roots": []}
    (tmp_path / "new/b" / folder.RUN_FILE).write_text(sound.signed(about))
    shutil.copytree(tmp_path / "new", tmp_path / "here/old")
    monkeypatch.chdir(tmp_path / "here")
    assert folder.located("old/a", tmp_path / "new/b") == tmp_path / "old/a"


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """A folder with two runs `old/a` (seed 3) and `old/c` (seed 4), and `run`, whose finished `mid` was taught by old/a/pre."""
    home = tmp_path_factory.mktemp("lessons")
    recipe = recipe_of(home, {"kind": "npz", "path": "data.npz"})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for out, more in (
            ("old/a", ("seed=3", "--stages", "pre")),
            ("old/c", ("seed=4", "--stages", "pre")),
            ("run", ("mid.teacher=old/a/pre", "--stages", "pre,mid")),
        ):
            assert cli.main(["train", str(recipe), "--out", out, *more]) == 0
    return home


@pytest.fixture
def taught(lessons, tmp_path, monkeypatch):
    """They were trained here, as far as they know; the recipe."""
    hidden = lessons.with_name("lessons-hidden")
    lessons.rename(hidden)
    shutil.copytree(hidden, lessons)
    monkeypatch.chdir(lessons)
    yield lessons / "small.yaml"
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(lessons)
    hidden.rename(lessons)


def test_a_teacher_that_is_gone_is_missed_only_by_stages_that_are_left(taught, monkeypatch, capsys):
    assert json.loads(Path("run/run.json").read_text())["networks"]["old/a/pre"]
    shutil.copytree("run", "begun")
    shutil.rmtree("begun/mid")
    shutil.move("old", "new")
    shutil.copytree("new/c", "a")  # of the teacher's name, beside the run
    code, _, err = cmt(capsys, "train", "--resume", "begun")
    assert (
        code == 2 and f"mid.teacher: 'old/a/pre' is no run, and '{Path('a').absolute()}' is not known to be it" in err
    ), err
    assert "mid.teacher=RUN/pre says where it is now" in err
    code, out, err = cmt(capsys, "train", "--resume", "begun", "mid.teacher=new/a/pre")
    assert code == 0, err
    a, b = (checkpoint.complete(Path(p) / "mid").tensors("ema-0") for p in ("run", "begun"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    home = Path.cwd()
    Path("far").mkdir()
    monkeypatch.chdir("far")
    code, out, err = cmt(capsys, "train", "--resume", home / "run")
    assert code == 0 and "mid done" in out and checkpoint.complete(home / "run/post"), err
    about = json.loads((home / "run/run.json").read_text())
    assert (about["root"], about["roots"]) == (str(home / "far"), [str(home)]) and about["networks"]["old/a/pre"]


def test_another_network_or_cache_than_a_finished_stage_had_is_refused(taught, capsys):
    """Where a teacher is may change, not which it is; cached trajectories are not those that were rolled out."""
    shutil.move("old/a", "old/b")
    say = ("train", taught, "--out", "run", "--stages", "pre,mid")
    code, _, err = cmt(capsys, *say, "mid.teacher=old/c/pre")
    assert code == 2 and "mid.teacher." in err and "has changed since this stage began" in err, err
    code, _, err = cmt(capsys, *say, "mid.teacher=old/b/pre")
    assert code == 0, err
    code, _, err = cmt(
        capsys, "trajectories", taught, "mid.teacher=old/b/pre", "--from", "run", "--cache", "store", "-n", 8
    )
    assert code == 0, err
    code, _, err = cmt(capsys, *say, "mid.teacher=old/b/pre", "mid.trajectories.cache=store")
    assert code == 2 and "mid.trajectories.cache: None -> a path" in err, err
    code, _, err = cmt(capsys, "train", "--resume", "run", "--stages", "pre", "pre.lr=1")
    assert code == 2 and "--resume: pre of run is finished" in err, err


def test_a_run_of_before_this_record_samples_in_the_proportions_of_its_data(world, tmp_path, monkeypatch, capsys):
    """Its counts are in its data, which are here; where they are not, nobody knows them, and it says that labels are uniform."""
    home, _ = world
    monkeypatch.chdir(home)
    np.savez("data.npz.tmp.npz", images=np.load("data.npz")["images"], labels=np.array([0] * 8 + [1] * 2 + [2] * 2))
    shutil.copytree("runs/small", tmp_path / "run")
    about = json.loads((tmp_path / "run" / folder.RUN_FILE).read_text())
    del about["remembered"], about["root"]
    about["run"]["data"]["path"], about["run"]["eval"]["labels"] = "data.npz.tmp.npz", "data"
    about["data"]["xxh3_128"] = checksum(Path("data.npz.tmp.npz"))
    (tmp_path / "run" / folder.RUN_FILE).write_text(sound.signed(about))
    counts = lambda: np.bincount(workspace.open_run(tmp_path / "run").setting.labels(torch.arange(12)))
    assert counts().tolist() == [8, 2, 2] and not capsys.readouterr().err
    Path("data.npz.tmp.npz").unlink()
    assert counts().tolist() == [4, 4, 4]
    assert "kept no counts of its classes, and its data are not here: labels are uniform" in capsys.readouterr().err
    assert workspace.open_run(tmp_path / "run").setting.law.text() == "uniform over 3 classes"


def test_paths_start_from_a_root_that_is_said(world, tmp_path, monkeypatch, capsys):
    home, _ = world
    monkeypatch.chdir(tmp_path)
    say = ("train", home / "small.yaml", "--dry-run", "--out", tmp_path / "run")
    code, out, err = cmt(capsys, *say)
    assert "not here: data.path: 'data.npz'" in out or code == 2, err
    code, out, err = cmt(capsys, *say, "--root", home)
    assert code == 0 and "not here" not in out and str(home / "data.npz") in out, err
    monkeypatch.setenv(paths.VARIABLE, str(home))
    assert str(home / "data.npz") in cmt(capsys, *say)[1]
    monkeypatch.setenv(paths.VARIABLE, str(tmp_path / "none"))
    code, _, err = cmt(capsys, *say)
    assert code == 2 and err.startswith(f"cmt: {paths.VARIABLE}: "), err


def test_what_only_says_where_changes_no_content():
    """A moved store or cache is no other configuration; everything else that a stage depends on is compared."""
    run = loading.load("imagenet512-ecd")
    far = loading.load("imagenet512-ecd", ["data.path=/elsewhere", "data.expects=null"])
    assert fingerprint.content(run, "mid") == fingerprint.content(far, "mid")
    assert fingerprint.stage_facts(run, "mid") != fingerprint.stage_facts(far, "mid")
    other = loading.load("imagenet512-ecd", ["mid.lr=1"])
    assert fingerprint.content(run, "mid") != fingerprint.content(other, "mid")
    taught = loading.load("imagenet512-ecd", ["post.teacher=/elsewhere/teacher/pre"])
    assert fingerprint.content(run, "post") == fingerprint.content(taught, "post")
    inner = loading.load("imagenet512-ecd", ["post.teacher=pre"])
    assert fingerprint.content(run, "post") != fingerprint.content(inner, "post")
    cached = loading.load("imagenet512-ecd", ["mid.trajectories.cache=/elsewhere"])
    assert fingerprint.content(run, "mid") != fingerprint.content(cached, "mid")
