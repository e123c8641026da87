"""`python -m bench seeds` and `python -m bench gallery`, of a run of seconds."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from bench.experiments import gallery, seeds
from bench.harness import tables
from bench.harness.pages import picture, seed_tables
from cmt_fast.config import loading
from cmt_fast.config.schema import Photos
from cmt_fast.data import photos
from cmt_fast.storage import checkpoint

NETWORK = ["model={kind: dit, patch: 8}", "model.width=16", "model.depth=1", "model.heads=2"]
LENGTHS = [f"{s}.{k}={n}" for s in ("pre", "mid", "post", "control") for k, n in (("images_nimg", 64), ("batch", 32))]
LESS = [*LENGTHS, "pre.warmup_nimg=0", "mid.eval_every_nimg=32", "mid.trajectories.pool_steps=2",
        "post.trajectories.pool_steps=2", "eval.n=40", "eval.n_during=40", "name=short", "control.lr=3e-4"]  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory, plain_plots) -> Path:
    """A folder with short.yaml and its run short-3, trained and measured as `bench seeds` does."""
    folder = tmp_path_factory.mktemp("short")
    few = photos.load(Photos())  # of all 3,600 rows the judge alone takes half a minute
    np.savez(folder / "few.npz", images=few.x[::30].numpy(), labels=few.labels[::30].numpy())
    run = loading.load("photos", [f"data={{kind: npz, path: {folder / 'few.npz'}}}", *NETWORK, *LESS])
    (folder / "short.yaml").write_text(yaml.safe_dump(loading.dump(run)), encoding="utf-8")
    seeds.measure(str(folder / "short.yaml"), 3, folder / "short-3")
    return folder


def asked(short: Path, **more) -> types.SimpleNamespace:
    """Arguments of a command about the short run."""
    given = {"recipe": str(short / "short.yaml"), "seeds": "3", "out": short, "json": short / "seeds.json"}
    return types.SimpleNamespace(**{**given, "together": 1, "rows_alone": False, **more})


def changed(short: Path, file: Path) -> Path:
    """The recipe with another learning rate of its control."""
    file.write_text(
        yaml.safe_dump(loading.dump(loading.load(str(short / "short.yaml"), ["control.lr=4e-4"]))), encoding="utf-8"
    )
    return file


def test_a_seed_that_is_measured_is_read_and_one_that_changed_is_not(short, monkeypatch):
    monkeypatch.setattr(seeds.loop, "train", lambda *_: pytest.fail("it is trained again"))
    assert seeds.run(asked(short)) == 0
    table = json.loads((short / "seeds.json").read_text("utf-8"))
    (row,) = table["seeds"]
    assert row["seed"] == 3 and set(row["stages"]) == {"pre", "teacher", "mid", "post", "control"}
    assert all(set(by) == ({"16"} if name == "teacher" else {"1", "2"}) for name, by in row["stages"].items())
    assert row["floor"]["frechet"] > 0 and row["second"].startswith("local-frequencies")
    assert table["recipe"] == "short" and [r["nimg"] for r in row["curve"]["mid"]] == [32, 64]
    other = changed(short, short / "other.yaml")
    with pytest.raises((pytest.fail.Exception, ValueError), match="trained again|another configuration"):
        seeds.measure(str(other), 3, short / "short-3")


@pytest.mark.parametrize("codes, status", [({"0": 0, "1": 0, "2": 0}, 0), ({"0": 0, "1": 1, "2": 0}, 1)])
def test_seeds_side_by_side_share_the_threads_and_all_are_tried(codes, status, short, monkeypatch, capsys):
    calls = {}

    def process(command, env, stdout, stderr):
        calls[command[command.index("--seeds") + 1]] = (command[-1], env["OMP_NUM_THREADS"])
        return types.SimpleNamespace(returncode=codes[command[command.index("--seeds") + 1]])

    monkeypatch.setattr(seeds.subprocess, "run", process)
    monkeypatch.setattr(seeds.os, "cpu_count", lambda: 4)
    folders = {k: short / f"side-{k}" for k in range(3)}
    assert seeds.side_by_side(asked(short, together=2), folders) == (status == 0)
    assert calls == {k: ("--rows-alone", "2") for k in codes}
    assert ("seed 1: exit code 1" in capsys.readouterr().out) == bool(status)


def test_the_gallery_says_of_a_run_what_its_own_records_say(short, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.filled("<!-- table: gallery-digits -->\n<!-- end -->").splitlines()[1].startswith("Not measured yet")
    with pytest.raises(ValueError, match="needs an <!-- end -->"):
        tables.filled("<!-- table: modes -->\nand a section\n<!-- table: tune -->\n<!-- end -->")
    (tmp_path / "gallery.md").write_text("# Gallery\n<!-- table: gallery-short -->\n<!-- end -->\n")
    args = types.SimpleNamespace(recipe=[str(short / "short.yaml")], runs=short, docs=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in short.glob("short-3/*/metrics.jsonl")}
    assert gallery.run(args) == 0
    assert len(before) == 4 and before == {p: p.stat().st_mtime_ns for p in before}, "it is trained again"
    said = (tmp_path / "gallery.md").read_text("utf-8")
    walls = {
        name: checkpoint.complete(short / "short-3" / name).manifest["wall"]
        for name in ("pre", "mid", "post", "control")
    }
    total = sum(wall["train_s"] + wall["eval_s"] for wall in walls.values())
    assert f"{total / 60:.1f} minutes" in said and "seed=3`" in said and "Seed 3; 40 samples" in said
    assert said.count("\n| `") == 4 and "teacher: the ODE solver, 16 steps | 0 |" in said
    with Image.open(tmp_path / "gallery" / "short.png") as image:
        assert image.mode == "RGB" and image.height == 6 * (64 + 2)  # real, teacher, four stages


def made_up(ratios: list[tuple[float, float]], sharpness=(0.3, 0.2)) -> list[dict]:
    """Seeds whose post is `ratios` (first space, second) of its control in one step; sharpness: of both."""
    of = lambda a, b, sharp: {"1": {"frechet": a, "frechet_2": b, "sharpness": sharp}}
    stages = [{"post": of(*pair, sharpness[0]), "control": of(1.0, 1.0, sharpness[1])} for pair in ratios]
    return [{"seed": k, "stages": s, "floor": {"sharpness": 0.3}} for k, s in enumerate(stages)]


@pytest.mark.parametrize(
    "seeds, said",
    [
        (made_up([(0.1, 0.2), (0.9, 0.8)]), "^In 1 step `post` is nearer than `control` in both spaces at every seed.$"),
        (made_up([(0.1, 0.2), (0.1, 1.2)]), "The two spaces disagree in 1 step.* at seed 1.$"),
        (made_up([(1.5, 1.2), (0.1, 0.2)]), "^In 1 step `control` is nearer in both spaces at seed 0.$"),
        (made_up([(1.5, 0.2), (1.5, 1.2), (1.1, 0.9)]), "disagree.* at seeds 0, 2. In 1 step `control` .* at seed 1.$"),
        (made_up([(0.1, 0.2)], (0.1, 0.4)), "both spaces. .* further from the sharpness .* at seed 0: .* 0.100, 0.400 in"),
    ],
)  # fmt: skip
def test_what_contradicts_a_table_stands_below_it(seeds, said):
    assert re.search(said, " ".join(seed_tables.contradictions(seeds)))


def test_the_gallery_takes_no_run_of_other_settings(short, tmp_path):
    other = changed(short, tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="is not a run of short as it stands .control.lr: 0.0004 -> 0.0003"):
        gallery.found(str(other), short)
    assert gallery.found(str(short / "short.yaml"), short) == (short / "short-3", 3)
    assert gallery.found(str(short / "short.yaml"), tmp_path) == (tmp_path / "short", 0)


def test_a_picture_is_drawn_of_a_run_in_colour(short, tmp_path):
    (tmp_path / "short-seeds.json").write_text((short / "seeds.json").read_text("utf-8"))
    (file,) = picture.draw(short / "short-3", tmp_path, tmp_path / "docs")
    with Image.open(file) as image:
        assert file == tmp_path / "docs" / "short.png" and len(image.convert("RGB").getcolors(1 << 20)) > 500
    with pytest.raises(ValueError, match="cannot be sampled"):
        picture.samples(short / "short-3" / "nothing")
