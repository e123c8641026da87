"""Teachers and guides that live in other runs: read at their own size, checked, and part of a stage's facts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cmt_fast.cli import main
from cmt_fast.config import fingerprint
from cmt_fast.config.errors import ConfigError
from cmt_fast.cost import flops
from cmt_fast.run.folder import RUN_FILE
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, sound
from cmt_fast.teacher.pool import Pool
from cmt_fast.train import loop
from tests.fixtures.tiny import NO_EVAL, SMALL, source_of, tiny

WIDE = "model.width=24"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Finished first stages: `ve` and `weak` are denoisers, `mf` is a MeanFlow teacher with guidance inside."""
    folder = tmp_path_factory.mktemp("teachers")
    loop.train(Workspace(tiny(), folder / "ve"), ["pre"])
    loop.train(Workspace(tiny("digits", "model.width=8", "seed=3"), folder / "weak"), ["pre"])
    guided = "pre.objective={kind: meanflow, omega: 0.2, kappa: 0.92, guide_t_max: 0.8}"
    loop.train(Workspace(tiny("digits-mf", guided, "pre.label_dropout=0.1"), folder / "mf"), ["pre"])
    return folder


def manifest(stage: Path) -> dict:
    return checkpoint.complete(stage).manifest


def ema(stage: Path) -> str:
    return manifest(stage)["files"]["ema-0.safetensors"]["xxh3_128"]


def test_meanflow_teacher_of_another_run_and_size(world: Path, tmp_path: Path) -> None:
    """A small MeanFlow teacher's jumps train a larger student that starts from nothing; the run has no `pre` of its own."""
    jumps = "{solver: jump, nfe: 8, t_max: 1.0, t_min: 0.0, per_trajectory: 4, pool_steps: 4}"
    more = [WIDE, "mid.start=null", f"mid.teacher={world}/mf/pre", f"mid.trajectories={jumps}", "sampler.solver=jump"]
    run = tiny("digits-mf", *more)
    work = Workspace(run, tmp_path / "run")
    teacher, student = work.network(f"{world}/mf/pre"), work.build()
    assert sum(p.numel() for p in teacher.parameters()) < sum(p.numel() for p in student.parameters())
    source = source_of(work, "mid")
    assert isinstance(source.pool, Pool) and source.pool.nodes == 9
    points = source.pool.draw(0, torch.arange(32))
    rows = (points.t - points.r > 0.99).nonzero().flatten()  # one jump of eight does not make the whole path
    near = ((points.t - points.r - 1 / 8).abs() < 1e-6).nonzero().flatten()
    u = teacher(points.x, points.t, points.r, points.labels)
    span = (points.t - points.r).view(-1, 1, 1, 1)
    moved = points.x - span * u - points.x_r
    assert moved[near].abs().max() < 1e-5 and len(near) and (not len(rows) or moved[rows].abs().max() > 1e-4)
    loop.train(work, ["mid"])
    found = manifest(tmp_path / "run" / "mid")["others"]
    assert found == {
        "teacher": {
            "stage": f"{world}/mf/pre",
            "config": manifest(world / "mf/pre")["config"],
            "ema": ema(world / "mf/pre"),
        }
    }
    assert fingerprint.stage_digest(run, "mid", found) == manifest(tmp_path / "run" / "mid")["config"]
    assert fingerprint.stage_digest(run, "mid", found) != fingerprint.stage_digest(run, "mid")


def guided_run(world: Path, *more: str):
    objective = "post.objective={kind: ecd, q: 64, distance: pseudo_huber, c: 0.06, mean: -0.8, std: 1.6}"
    guide = f"post.autoguidance={{network: {world}/weak/pre, scale: 2.05}}"
    return tiny("digits", "mid.images_nimg=64", "post.anchor=null", "post.trajectories=null", objective, guide, *more)


def test_ecd_with_autoguidance(world: Path, tmp_path: Path) -> None:
    run = guided_run(world, "post.start=pre")
    work = Workspace(run, tmp_path / "run", world / "ve")
    source = source_of(work, "post")
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.arange(4)
    main_net, guide = work.network("pre"), work.network(f"{world}/weak/pre")
    want = guide(x, t, t, labels) + 2.05 * (main_net(x, t, t, labels) - guide(x, t, t, labels))
    assert source.teacher is not None
    torch.testing.assert_close(source.teacher(x, t, t, labels), want)
    loop.train(work, ["post"])
    found = manifest(tmp_path / "run" / "post")["others"]
    assert found["autoguidance.network"]["ema"] == ema(world / "weak/pre") and "teacher" not in found
    assert flops.calls(resolve(run, "post"))["forwards"] == 640 * (4 + 2 * 2)


def test_rollouts_are_autoguided_where_asked(world: Path, tmp_path: Path) -> None:
    guide = f"mid.autoguidance={{network: {world}/weak/pre, scale: 2.0, trajectories: true}}"
    run = tiny("digits", guide)
    work = Workspace(run, tmp_path / "run", world / "ve")
    pool, plain = (source_of(work, "mid", r.mid).pool for r in (run, tiny()))
    a, b = (p.draw(0, torch.arange(32)) for p in (pool, plain))
    assert torch.equal(a.x[a.t > 79], b.x[b.t > 79]) and not torch.allclose(a.x_r, b.x_r, atol=1e-3)


def test_a_guide_that_changed_is_refused_on_resume(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "weak", tmp_path / "guide")
    text = f"post.autoguidance.network={tmp_path}/guide/pre"
    work = Workspace(guided_run(world, "post.start=pre", text), tmp_path / "run", world / "ve")
    whole, save = checkpoint.save, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    written: list[int] = []

    def stop_after_first(*arguments, **more):
        if written:
            save()
        written.append(1)
        return whole(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after_first)
        with pytest.raises(KeyboardInterrupt):
            loop.train(work, ["post"])
    step = checkpoint.complete(tmp_path / "guide" / "pre")
    moved = {k: v * 1.01 if v.is_floating_point() else v for k, v in step.tensors("ema-0").items()}
    about = {k: step.manifest[k] for k in ("stage", "nimg", "done", "config", "parent")}
    checkpoint.save(tmp_path / "guide" / "pre", step.manifest["step"], {"ema-0": moved}, about)
    with pytest.raises(ConfigError, match="post.autoguidance.network.ema: .* has changed since this stage began"):
        loop.train(work, ["post"])


REFUSED = [
    (["mid.teacher={w}/ve/pre", "sigma_data=0.6"], ["ve/pre", "sigma_data", "0.5", "0.6"]),
    (["mid.teacher={w}/mf/pre"], ["mf/pre", "path", "linear"]),
    (["mid.teacher={w}/other/pre"], ["other/pre", "shape", "[1, 16, 16]", "[1, 8, 8]"]),
    (["mid.teacher={w}/old/pre"], ["old/pre", "data", "npz"]),
    (["mid.teacher={w}/ve/mid"], ["ve/mid", "no checkpoint", "train it first"]),
    (["mid.teacher={w}/nowhere/pre"], ["nowhere", "is no run"]),
    (["mid.teacher={w}/ve/per"], ["mid.teacher", "does not end in a stage", "did you mean pre?"]),
    (["mid.teacher=per"], ["mid.teacher", "'per' is no stage", "RUN/STAGE", "did you mean pre?"]),
    (["mid.teacher=post"], ["mid.teacher", "'post' does not come before mid"]),
    (["mid.autoguidance={network: pre}"], ["mid.autoguidance", "guides nothing", "cmt_cm"]),
    (
        ["mid.autoguidance={network: pre, trajectories: true}", "mid.trajectories.guidance=2"],
        ["mid.trajectories.guidance", "only one may guide"],
    ),
    (
        ["post.objective={kind: scd}", "post.autoguidance={network: pre}", "post.teacher_guidance=2"],
        ["post.teacher_guidance", "only one may guide"],
    ),
    (["post.objective={kind: scd}", "post.autoguidance={network: '{w}/mf/pre'}"], ["mf/pre", "path", "linear"]),
]


@pytest.mark.parametrize("overrides, words", REFUSED, ids=lambda v: "")
def test_what_does_not_fit_is_one_line(world: Path, tmp_path: Path, capsys, overrides, words) -> None:
    for name in ("other", "old"):
        if not (world / name).exists():
            shutil.copytree(world / "ve", world / name)
            about = json.loads((world / name / RUN_FILE).read_text())
            about["rows"]["shape"] = [1, 16, 16]
            about["run"]["data"] = {"kind": "npz", "path": "x.npz"}
            if name == "old":
                del about["rows"]
            (world / name / RUN_FILE).write_text(sound.signed(about))
    overrides = [o.replace("{w}", str(world)) for o in overrides]
    shrunk = [*SMALL, *NO_EVAL, *overrides]
    assert main(["train", "digits", *shrunk, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_the_data_are_one_line(world: Path, tmp_path: Path) -> None:
    """A teacher of the right rows on record whose table of labels has another size."""
    shutil.copytree(world / "ve", tmp_path / "ve")
    step = checkpoint.complete(tmp_path / "ve" / "pre")
    tensors = step.tensors("ema-0")
    tensors = {k: v[:-1] if k.endswith("label.table") else v for k, v in tensors.items()}
    about = {k: step.manifest[k] for k in ("stage", "nimg", "done", "config", "parent")}
    checkpoint.save(tmp_path / "ve" / "pre", step.manifest["step"], {"ema-0": tensors}, about)
    work = Workspace(tiny(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"ve/pre: checkpoint does not fit the model: .*label.table is \(10, 16\)"):
        work.network(f"{tmp_path}/ve/pre")
