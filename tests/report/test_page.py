"""The report of a small run: what the page says, that it stands alone, that nothing is judged twice."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys

import pytest
import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.data import datasets
from cmt_fast.report import page
from cmt_fast.run import absent, standing
from cmt_fast.run.judging import Judging
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import machine
from cmt_fast.storage import checkpoint, sound
from cmt_fast.train import loop
from tests.fixtures.tiny import tiny

HOSTILE = "<script>alert(1)</script> | `$x$` \"'& \x1b[31m\u202e\u200b"
WATCHED = [f"{s}.eval_every_nimg=320" for s in ("mid", "post", "control")] + ["mid.grid_every_nimg=160"]
SHORT = ["pre.images_nimg=64", "mid.images_nimg=64", "post.images_nimg=64", "control.images_nimg=64", "eval.n=20"]


def train(folder, stages, *more, parents=None):
    run = dataclasses.replace(tiny("digits", *more), name=HOSTILE)
    work = Workspace(run, folder, parents)
    loop.train(work, stages)
    return work


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All four stages, judged and drawn on the way, and their report."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("report") / "run"
    train(folder, ["pre", "mid", "post", "control"], *WATCHED)
    return folder, page.write(folder)


def test_the_page_holds_both_tables_and_every_section(run, capsys):
    folder, _ = run
    for text in ((folder / "report.html").read_text(), (folder / "report.md").read_text()):
        assert {c for c in text if not c.isprintable()} <= {"\n"} and "x1b" in text
        for title in (
            "1 step",
            "2 steps",
            "Lineage",
            "Images the control needs to reach what mid",
            "by evaluations of 100 samples",
            "The resolved recipe",
            "Labels: data: 10 classes, 9.68 % to 10.2 %.",
        ):
            assert title in text
        assert re.search(r"Fréchet, classifier-64-32@[0-9a-f]{12}", text)
        for row in ("teacher, 16 steps", "pre → mid → post", "pre → control", "post / control", "post / mid"):
            assert row in text
        for what in (
            "real, again (floor)",
            "Fréchet, local-frequencies-1",
            "sharpness",
            "precision, recall",
            "Seeds of training are",
        ):
            assert what in text
    assert "Real rows against real rows: " in text and re.search(
        r"times the distance, after (as many|[\d,]+) student", text
    )
    html = (folder / "report.html").read_text()
    assert html.count("<svg ") == 2 + 4 and html.count("data:image/png") == 6 + 4 + 4
    assert (
        '<p class="lead subtitle">A diffusion model of 8 x 8 handwritten digits, made into a generator of 1 or 2 steps'
        in html
    )
    assert html.index("data:image/png") < html.index("In 1 step, post-training after mid-training reaches")


def test_the_page_loads_nothing_and_names_no_fid(run):
    html = (run[0] / "report.html").read_text()
    text = re.sub(r"base64,[^\"]*", "", html)
    assert "FID" not in text and "FID" not in (run[0] / "report.md").read_text()
    assert set(re.findall(r"https?://[\w./-]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert all(x.startswith(("#", "data:")) for x in re.findall(r"(?:src|href)=\"([^\"]*)", text))
    assert "<script" not in text and "@import" not in text and "default-src 'none'" in text


def test_a_hostile_name_is_text(run):
    html, markdown = ((run[0] / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt; | `$x$` &#34;&#39;&amp; \\x1b[31m\\u202e\\u200b</h1>" in html
    assert "<script" not in html and "# \\<script\\>alert(1)" in markdown


def test_the_pictures_of_the_markdown_are_there(run):
    links = re.findall(r"\]\((report/[^)]+)\)", (run[0] / "report.md").read_text())
    assert len(links) == 14 + 6 and all((run[0] / link).stat().st_size > 500 for link in links)
    assert not re.search(r"<metadata|<\?xml|<!--", (run[0] / "report" / "quality-1.svg").read_text())


def test_figures_are_the_judge_s(run):
    folder, out = run
    work = Workspace(page.stored_run(folder), folder)
    quality, judging = out["quality"], work.judging
    for name, kind, k, n, solver in (
        ("post", "few", 2, 200, 0),
        ("pre", "solver", 16, 200, 1),
        ("pre", "during", 16, 100, 1),
    ):
        want = judging.evaluate(work.network(name), (k,), n, solver=bool(solver))[str(k)]
        found = quality[name][kind][str(k)]
        near = {**want, "frechet": pytest.approx(want["frechet"], rel=1e-9)}  # of rows that were folded in other blocks
        assert (
            near == {k: found[k] for k in want} and {"frechet_2", "sharpness", "precision", "recall_2"} < found.keys()
        )
    whole = judging.evaluate(work.network("post"), (1,), 200, judge=judging.thorough)["1"]
    assert whole == {**quality["post"]["few"]["1"], "left_out": quality["post"]["left_out"]["few"]["1"]}
    assert out["floor"]["frechet"] < quality["pre"]["solver"]["16"]["frechet"]
    stored = json.loads((folder / "post" / "figures.json").read_text())
    assert stored["few"] == out["quality"]["post"]["few"]
    assert (
        stored["key"]["ema"] == checkpoint.complete(folder / "post").manifest["files"]["ema-0.safetensors"]["xxh3_128"]
    )


def test_student_images_add_up_along_the_path(run):
    folder, out = run
    assert {(r["stage"], r["nimg"]) for r in out["reach"]} == {("mid", 640), ("post", 1280)}
    assert (
        "| post |" in (folder / "report.md").read_text()
        and "| 1,280 | pre → mid → post |" in (folder / "report.md").read_text()
    )


def test_the_second_report_judges_nothing_and_a_new_checkpoint_alone(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    called = []
    figures = Judging.figures
    monkeypatch.setattr(Judging, "figures", lambda self, *a, **k: called.append(a[1:]) or figures(self, *a, **k))
    before = (folder / "report.html").read_text()
    with (
        monkeypatch.context() as patch
    ):  # the run can only be read: what is not judged yet is, and all is written elsewhere
        figures_of_mid = (folder / "mid/figures.json").read_text()
        for name in ("mid/figures.json", "mid/shown-1.png", "reference/shown.png"):
            (folder / name).unlink()
        patch.setattr(page.os, "access", lambda path, _: path != folder)
        tree = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
        with pytest.raises(ConfigError, match="cannot be written to; --out FOLDER puts the page elsewhere"):
            page.write(folder)
        page.write(folder, out=tmp_path / "page")
        assert tree == sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
        assert (
            called == [((1, 2), (200,), False)] and (tmp_path / "page/mid/figures.json").read_text() == figures_of_mid
        )
        assert all(
            (tmp_path / "page" / name).is_file() for name in ("report.html", "mid/shown-1.png", "reference/shown.png")
        )
        called.clear()
        page.write(folder, out=tmp_path / "page")
    for name in ("mid/figures.json", "mid/shown-1.png", "reference/shown.png"):
        shutil.copy(tmp_path / "page" / name, folder / name)
    page.write(folder)
    assert not called and (folder / "report.html").read_text() == before
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")

    found = checkpoint.complete(folder / "mid")
    files = {name: found.tensors(name) for name in ("model", "ema-0", "optimizer")}
    about = {k: v for k, v in found.manifest.items() if k not in ("format", "step", "files", "xxh3_128")}
    checkpoint.save(folder / "mid", found.manifest["step"], files | {"ema-0": files["model"]}, about)
    page.write(folder)
    assert called == [((1, 2), (200,), False)]
    assert "retrained since" in (folder / "report.html").read_text()  # post comes from another mid

    rows, first = folder / "pre/metrics.jsonl", b'"step":1,'
    rows.write_bytes(
        rows.read_bytes().replace(first, b'"step":9,', 1)
    )  # long before the checkpoint, which vouches for it
    capsys.readouterr()
    page.write(folder)
    assert f"{rows}: 1 row of metrics.jsonl is damaged and left out" in capsys.readouterr().err


def test_an_unfinished_run_reports_what_it_has(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="is no run"):
        page.write(folder)
    work = train(folder, [], *SHORT)
    work.claim()
    with pytest.raises(ConfigError, match="no finished stage.*pre: not trained"):
        page.write(folder)
    loop.train(work, ["pre"])
    out = page.write(folder)
    text = out["markdown"].read_text()
    assert "| control | ect | – | – | – | – | not trained |" in text and "Images the control" not in text
    assert list(out["quality"]) == ["pre"] and not out["reach"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        page.write(folder)


def test_stages_of_another_run(run, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}
    train(tmp_path / "child", ["post"], *WATCHED, parents=run[0])
    out = page.write(tmp_path / "child")
    assert list(out["quality"]) == ["pre", "mid", "post", "control"] and {r["nimg"] for r in out["reach"]} == {
        640,
        1280,
    }
    assert out["quality"]["mid"] == run[1]["quality"]["mid"]
    assert before == {p: p.stat().st_mtime_ns for p in run[0].rglob("*")}


def test_samples_that_are_not_finite_are_said_to_be(tmp_path, monkeypatch):
    def broken(self, net, steps, counts, solver=False, judge=None):
        found = None if solver else {"frechet": 1.5, "sliced_wasserstein": 0.5, "accuracy": 0.25}
        return {k: dict.fromkeys(counts, found) for k in steps}

    train(tmp_path / "run", ["pre"], *SHORT)
    monkeypatch.setattr(Judging, "figures", broken)
    text = page.write(tmp_path / "run")["markdown"].read_text()
    assert f"| teacher, 16 steps |{' not finite |' * 7} 0 | pre |" in text
    assert "| pre-trained | 1.5 | – | – | – | – | 0.5 | 25.0% | 0 | pre |" in text


def test_the_page_is_drawn_at_any_moment_and_nothing_is_computed_for_it(tmp_path, monkeypatch):
    def look() -> str:
        with monkeypatch.context() as patch:
            for name in ("figures", "thorough", "judge", "space"):
                patch.setattr(Judging, name, property(lambda self: pytest.fail("was judged")))
            patch.setattr(checkpoint, "checksum", lambda path: pytest.fail("a checkpoint's tensors were read"))
            patch.setattr(machine, "device", lambda *_: pytest.fail("a device was asked for, which training may fill"))
            for module in (datasets, absent):
                patch.setattr(module, "load", lambda *_: pytest.fail("the data were opened"))
            patch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a network was called"))
            out = page.write(folder, judge=False, refresh_s=20)
        assert '<meta http-equiv="refresh" content="20">' in out["html"].read_text()
        return out["markdown"].read_text()

    folder = tmp_path / "run"
    work = train(folder, [], *SHORT, "mid.eval_every_nimg=32", "mid.grid_every_nimg=32", "saves=waiting")
    work.claim()
    assert "pre not begun, mid not begun, post not begun, control not begun" in look()  # nothing but run.json
    loop.train(work, ["pre"])
    text = look()
    assert "pre finished, mid not begun" in text and "Not judged yet: pre; \\`cmt report\\` judges" in text
    taken = []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: taken.append(look()) or save(*a, **k))
    loop.train(work, ["mid"])  # its rows and grids are there, its checkpoint is not
    monkeypatch.undo()
    assert "mid 100% of 64 images" in taken[-1] and "quality-1.svg" in taken[-1] and "grid-mid.png" in taken[-1]
    with open(folder / "mid" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "eval", "step')  # a row that is being written
    assert "mid finished" in look()
    page.write(folder)
    text = look()
    assert "Not judged yet" not in text and "In 1 step, mid-training reaches the Fréchet distance" in text
    assert "real, again (floor)" in text and "shown-teacher.png" in text
    page.write(folder)
    assert "As of" not in (folder / "report.md").read_text()
    assert "refresh" not in (folder / "report.html").read_text()


def test_a_mixture_gets_its_theory_once(tmp_path, monkeypatch):
    from cmt_fast.evaluation import theory

    figures = {
        "solver": {"nfe": [8, 16], "rms": {"1": [0.2, 0.1], "2": [0.04, 0.01]}, "slopes": {"1": 1.0, "2": 2.0}},
        "bias": {
            "<b>D": {"swept": "1/q", "x": [0.1, 0.01], "mse": [1e-2, 1e-4], "bias": [1e-3, 1e-3], "slope_mse": 2.0,
                     "slope_bias": -1e-9, "expected": "MSE 2"},
        },
    }  # fmt: skip
    calls = []
    monkeypatch.setattr(theory, "measure", lambda: calls.append(1) or figures)
    train(tmp_path, ["pre"], *SHORT, "data={kind: gmm, n: 200}", "model={kind: mlp, width: 8, depth: 1}")
    page.write(tmp_path)
    html = page.write(tmp_path)["html"].read_text()
    assert calls == [1] and sound.read(tmp_path / "theory.json") == figures
    assert "Fréchet, identity" in html and "accuracy" not in html
    for text in ("order 2: slope 2.00", "&lt;b&gt;D", "gradient", "MSE of the target"):
        assert text in html
    assert "-0.00" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.S) and "<b>D" not in html


@pytest.mark.parametrize(
    "target, images",
    [(20.0, 100), (16.0, 100), (8.0, 150), (4.0, 200), (2.0, 300), (1.9, None), (0.0, None)],
)
def test_reach_interpolates_the_log_distance(target, images):
    assert page.reach([(100, 16.0), (200, 4.0), (300, 2.0)], target) == (images and pytest.approx(images))


def test_a_stage_ended_by_the_runs_clock_and_not_when_it_was_copied(tmp_path):
    (tmp_path / "manifest.json").touch()
    os.utime(tmp_path / "manifest.json", (1e9, 1e9))
    for bill, moment in (({"until": 1.2e9}, 1.2e9), ({"until": 0.0}, 1e9), (None, 1e9)):
        assert standing.moment(tmp_path, {"bill": bill}) == moment


def test_reach_of_nothing():
    assert page.reach([], 1.0) is None
    assert page.reach([(10, 1.0), (20, 0.0)], 0.0) == pytest.approx(20)
