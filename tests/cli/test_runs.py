"""`cmt runs`: the list, one run, two side by side, and what is left of a run that was pruned."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_fast import cli
from cmt_fast.report import runs as runs_
from cmt_fast.run import folder as folder_
from cmt_fast.run import removing
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, heartbeat, pruning, sound
from tests.fixtures import small
from tests.fixtures.tiny import tiny

pytestmark = pytest.mark.usefixtures("plain_plots")
MODEL = {"kind": "dit", "width": 16, "depth": 1, "heads": 2}
LONG_AGO = 1.6e9


def cmt(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with its report, whose heart beat long ago."""
    home = tmp_path_factory.mktemp("runs")
    recipe = small.recipe(home, MODEL, channels=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["train", str(recipe)]) == 0
        assert cli.main(["sample", "runs/small/post", "-n", "4", "--out", "want.npz"]) == 0
    os.utime(home / "runs/small" / heartbeat.HEARTBEAT, (LONG_AGO, LONG_AGO))
    return home


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of it as runs/small, in the current folder."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return Path("runs/small")


def edit(file: Path, change) -> None:
    tree = sound.read(file)
    change(tree)
    file.write_text(sound.signed(tree), encoding="utf-8")


def unfinish(run: Path, stage: str) -> Path:
    """As though the last checkpoint were not the end of its stage."""
    folder = checkpoint.folder_of(run / stage, checkpoint.steps(run / stage)[-1])
    body = {k: v for k, v in checkpoint.read_manifest(folder).items() if k != "xxh3_128"}
    (folder / "manifest.json").write_text(checkpoint.signed({**body, "done": False}))
    return folder


# ------------------------------------------------------------------------------------------------ ls, show


def test_the_list_says_how_each_run_is_and_names_what_is_none(run, capsys, monkeypatch):
    for name in ("sweep/a", "sweep/b"):
        shutil.copytree(run, run.parent / name)
    unfinish(run.parent / "sweep/b", "post")
    for damaged, which in (("b", slice(None)), ("a", slice(1))):  # all checkpoints of mid, the newest
        for ema in sorted((run.parent / "sweep" / damaged / "mid").glob("checkpoints/*/ema-0*"), reverse=True)[which]:
            ema.write_bytes(ema.read_bytes()[:-1])
    shutil.rmtree(run.parent / "sweep/b/post")
    for name, text in (("broken", "{"), ("foreign", "[]"), ("bytes", "\xff")):
        (run.parent / name).mkdir()
        (run.parent / name / "run.json").write_bytes(text.encode("latin-1"))
    (run.parent / "empty/deep").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "checksum", lambda path: pytest.fail(f"{path} was hashed"))
    code, out, err = cmt(capsys, "runs", "ls")
    assert code == 0 and not err
    line = {words[0]: " ".join(words) for words in map(str.split, out.splitlines()) if words}
    figures = json.loads((run / "post/figures.json").read_text())["few"]
    assert out.startswith("3 runs in runs\n")
    assert "small pre mid post finished post" in line["small"] and f"{figures['1']['frechet']:.3g} @1" in line["small"]
    assert "sweep/b small pre mid damaged stopped pre" in line["sweep/b"], line
    assert "sweep/a small pre mid 100%; damaged post stopped post" in line["sweep/a"]
    for name, words in (("broken", "cannot be read"), ("foreign", "cannot be read"), ("bytes", "cannot be read")):
        assert words in line[f"runs/{name}:"] and out.count(f"runs/{name}:") == 1
    assert line["runs/empty:"].endswith("no run, it has no run.json")
    found = json.loads(cmt(capsys, "runs", "ls", "runs", "--json", "--sort", "size")[1])
    assert [r["bytes"] for r in found["runs"]] == sorted((r["bytes"] for r in found["runs"]), reverse=True)
    assert {o["folder"] for o in found["others"]} == {"runs/broken", "runs/foreign", "runs/bytes", "runs/empty"}
    mine = next(r for r in found["runs"] if r["run"] == "runs/small")
    assert mine["images"] == 24 and mine["hours"]["core"] > 0 and mine["bytes"] == pruning.size(run)
    assert mine["stages"]["post"]["figures"]["steps"]["2"]["frechet"] == figures["2"]["frechet"]
    assert "1 run in runs/small" in cmt(capsys, "runs", "ls", run)[1]


def test_a_run_that_trains_is_alive_and_its_figures_are_of_an_evaluation(run, capsys):
    unfinish(run, "post")
    (run / "post/figures.json").unlink()
    (run / "mid/figures.json").unlink()
    (run / heartbeat.HEARTBEAT).touch()
    row = {"kind": "eval", "step": 1, "nimg": 4, "steps": {"1": {"frechet": 7.25}, "2": None}}
    rows, end = run / "post/metrics.jsonl", checkpoint.latest(run / "post").manifest.get("metrics_bytes", 0)
    rows.write_text(rows.read_text()[:end] + json.dumps(row) + '\n{"kind": "tr')
    out = cmt(capsys, "runs", "ls")[1]
    out = " ".join(out.split())
    assert re.search(r"post 100% alive \d+ s ago", out) and "post 7.25 @1, – @2 *" in out, out
    os.utime(run / heartbeat.HEARTBEAT, (LONG_AGO, LONG_AGO))
    assert "stopped" in cmt(capsys, "runs", "ls")[1]


def test_figures_of_other_weights_are_not_shown(run):
    edit(run / "post/figures.json", lambda f: f["key"].update(ema="0" * 32))
    known = runs_.read(run)
    assert known.figures["mid"].final and "post" not in known.figures


def test_show_says_where_a_run_comes_from_and_what_it_changed(run, trained, tmp_path, capsys, monkeypatch):
    out = cmt(capsys, "runs", "show", run)[1]
    first = checkpoint.ema_sum(checkpoint.latest(run / "pre").manifest)[:12]
    assert f"pre @ 8, {first}" in out and "12 rows of 3 x 8 x 8, 3 classes" in out and "checkpoints: optimizer" in out
    assert "no recipe of the package is named 'small'" in out and f"here: data.path: {trained / 'data.npz'}" in out
    (trained / "data.npz").rename(trained / "hidden.npz")
    try:
        assert f"not here: data.path: '{trained / 'data.npz'}'" in cmt(capsys, "runs", "show", run)[1]
    finally:
        (trained / "hidden.npz").rename(trained / "data.npz")
    Workspace(tiny("digits", "post.lr=0.5"), tmp_path / "other").claim()
    about = json.loads(cmt(capsys, "runs", "show", tmp_path / "other", "--json")[1])
    assert about["settings"]["post.lr"]["run"] == "0.5" and "pre.lr" not in about["settings"]
    assert about["stages"]["pre"]["state"] == about["state"] == "not begun"


# ------------------------------------------------------------------------------------------------ compare


def test_compare_puts_settings_figures_and_pictures_side_by_side(run, capsys):
    other = Path("runs/other")
    shutil.copytree(run, other)
    edit(other / "run.json", lambda a: a["run"]["post"].update(lr=0.5))
    edit(other / "post/figures.json", lambda f: f["few"]["1"].update(frechet=2 * f["few"]["1"]["frechet"]))
    edit(other / "post/figures.json", lambda f: f["left_out"].clear())
    code, out, err = cmt(capsys, "runs", "compare", run, other, "--out", "both.png")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["post.lr", "0.0001", "0.5"] in lines or ["post.lr", "0.001", "0.5"] in lines, out
    row = next(words for words in lines[lines.index(["1", "step"]) :] if words[0] == "post")
    assert float(row[2]) == pytest.approx(2 * float(row[1]), rel=1e-3) and row[3] == "2", out
    assert "not comparable" not in out and ["post", "/", "mid"] in [words[:3] for words in lines]
    grid = Image.open(sorted((run / "post/grids").glob("*.png"))[-1])
    both = Image.open("both.png")
    assert both.width > 2 * grid.width and both.height > 3 * grid.height
    edit(other / "post/figures.json", lambda f: f["key"]["eval"].update(n=5))
    edit(other / "mid/figures.json", lambda f: f["key"].update(extractor="another"))
    out = cmt(capsys, "runs", "compare", run, other)[1]
    assert "post: not comparable: samples 4 and 5" in out and "mid: not comparable: features" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["post"])
    assert row[3] == "–", out


# ------------------------------------------------------------------------------------------------ rm


def test_a_pruned_run_is_sampled_judged_and_listed_and_says_why_it_cannot_go_on(run, trained, capsys):
    before, emas = pruning.size(run), {p: p.read_bytes() for p in run.glob("*/checkpoints/*/ema-*")}
    (run / "mid/snapshots/ema-0").mkdir(parents=True)
    (run / "mid/checkpoints/.tmp-step-9").mkdir()
    (run / "notes.txt").write_text("mine")
    last = {p: p.read_bytes() for p in emas if p.parent.name == max(q.parent.name for q in emas)}
    code, out, err = cmt(capsys, "runs", "rm", run, "--yes")
    assert code == 0 and "freed" in out and pruning.size(run) < before, err
    left = {p.name for p in run.glob("*/checkpoints/*/*")}
    assert left == {"manifest.json", "ema-0.safetensors"} and all(p.read_bytes() == b for p, b in last.items())
    assert (
        not list(run.glob("mid/snapshots"))
        and not list(run.glob("*/checkpoints/.tmp*"))
        and (run / "notes.txt").exists()
    )
    assert "nothing to remove" in cmt(capsys, "runs", "rm", run, "--yes")[1]
    assert "model, optimizer removed" in cmt(capsys, "ckpt", "verify", run)[1].replace(
        "optimizer, model", "model, optimizer"
    )
    assert cmt(capsys, "sample", run / "post", "-n", "4", "--out", "got.npz")[0] == 0
    with np.load("got.npz") as got, np.load(trained / "want.npz") as want:
        assert all(np.array_equal(got[k], want[k]) for k in ("images", "labels"))
    code, out, err = cmt(capsys, "train", "--resume", run)
    assert code == 0 and "nothing is left to train" in out, err
    unfinish(run, "post")
    code, _, err = cmt(capsys, "train", "--resume", run)
    assert code == 2 and err.count("\n") == 1 and "was removed by `cmt runs rm`; training cannot go on" in err, err


def test_without_weights_the_figures_stay(run, trained, capsys):
    figures = runs_.read(run).figures["post"]
    assert cmt(capsys, "runs", "rm", run, "--keep", "report", "--yes")[0] == 0
    assert not list(run.glob("*/checkpoints/*/*.safetensors"))
    known = runs_.read(run)
    assert known.life.word == "finished" and known.figures["post"] == figures
    assert cmt(capsys, "report", run, "--no-judge")[0] == 0
    assert f"{figures.steps['1']['frechet']:.3g}" in (run / "report.md").read_text()
    assert "sound" in cmt(capsys, "ckpt", "verify", run)[1]
    for say in (("sample", run / "post", "--out", "x.npz"), ("ckpt", "export", run / "post", "x.safetensors")):
        code, _, err = cmt(capsys, *say)
        assert code == 2 and err.count("\n") == 1 and "its ema-0 was removed" in err, err


def test_a_kill_at_any_moment_leaves_whole_checkpoints(run, monkeypatch):
    """Every call that changes the disk is the last one in turn."""
    sums = {name: checkpoint.ema_sum(checkpoint.latest(run / name).manifest) for name in ("pre", "mid", "post")}
    real = {(os, "replace"): os.replace, (Path, "unlink"): Path.unlink, (shutil, "rmtree"): shutil.rmtree}
    for allowed in range(40):
        left = allowed

        def counted(call):
            def stepped(*arguments, **more):
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                return call(*arguments, **more)

            return stepped

        work = run.with_name(f"cut-{allowed}")
        shutil.copytree(run, work)
        with monkeypatch.context() as patch:
            for (owner, name), call in real.items():
                patch.setattr(owner, name, counted(call))
            try:
                removing.apply(removing.plan(work, "final"))
                ended = True
            except KeyboardInterrupt:
                ended = False
        for name, ema in sums.items():
            assert checkpoint.ema_sum(checkpoint.complete(work / name).manifest) == ema
        removing.apply(removing.plan(work, "final"))
        files = sorted(str(p.relative_to(work)) for p in work.rglob("*.safetensors") if "checkpoints" in p.parts)
        assert len(files) == 3 and all("ema-0" in f for f in files), (allowed, files)
        if ended:
            break
    assert ended and allowed > 8


def test_links_are_not_followed(run, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    shutil.move(run / "mid", tmp_path / "disk/mid")
    (run / "mid").symlink_to(tmp_path / "disk/mid")
    shutil.move(run / "post/checkpoints", tmp_path / "disk/checkpoints")
    (run / "post/checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    before = sorted((tmp_path / "disk").rglob("*"))
    out = cmt(capsys, "runs", "rm", run, "--yes")[1]
    assert out.count("left as it is") == 2 and sorted((tmp_path / "disk").rglob("*")) == before
    Path("runs/link").symlink_to(run.absolute())
    code, _, err = cmt(capsys, "runs", "rm", "runs/link", "--keep", "nothing", "--yes")
    assert code == 2 and "is a link to" in err and run.is_dir()
    code, out, _ = cmt(capsys, "runs", "rm", run, "--keep", "nothing", "--yes")
    assert code == 0 and not run.exists() and sorted((tmp_path / "disk").rglob("*")) == before
    assert [p.name for p in Path("runs").iterdir()] == ["link"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_it_asks_and_refuses_what_is_in_use(run, capsys, monkeypatch):
    tree = lambda: sorted((str(p), p.stat().st_size) for p in run.rglob("*") if p.name != ".lock")
    before = tree()
    refused = lambda *more: cmt(capsys, "runs", "rm", run, *more)
    code, out, err = refused()
    assert code == 2 and "--yes" in err and not out
    assert "would free" in refused("--dry-run")[1]
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert "nothing was deleted" in refused()[1]
    with folder_.locked(run, "--out"):
        assert "in use by another process" in refused("--yes", "--force")[2]
    (run / heartbeat.HEARTBEAT).touch()
    assert re.search(r"sign of life \d+ s ago", refused("--yes")[2])
    old = time.time() - heartbeat.QUIET_S - 1
    os.utime(run / heartbeat.HEARTBEAT, (old, old))
    shutil.copytree(run, "runs/user")
    edit(Path("runs/user/run.json"), lambda a: a.update(parents="runs/small", root=os.getcwd()))
    assert "runs/user uses" in refused("--keep", "report", "--yes")[2]
    damaged = next(run.glob("pre/checkpoints/step-*/ema-0.safetensors")).parent.parent
    assert tree() == before
    for file in damaged.glob("step-*/ema-0.safetensors"):
        file.write_bytes(b"")
    code, _, err = refused("--yes")
    assert code == 2 and "none of its" in err
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    code, out, err = refused("--keep", "nothing", "--force")
    assert code == 0 and "note: runs/user uses its weights" in out and not run.exists(), err
