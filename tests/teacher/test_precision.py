"""The teacher in lower precisions, measured, chosen and kept; features of endpoints that are computed once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cmt_kernels import processor
from torch import nn

from cmt_fast import models
from cmt_fast.cli import main
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Edm
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.engine import LocalEngine
from cmt_fast.models.fp8 import LARGEST, Fp8Linear, in_fp8, quantised, shared
from cmt_fast.objectives import LossContext
from cmt_fast.objectives.cmt import cmt_cm
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.teacher import pool, precision
from cmt_fast.teacher.precision import Teacher
from cmt_fast.train import batches, loop
from cmt_fast.train.batches import BatchProvider
from tests.fixtures.tiny import metrics, source_of, stop_after_a_checkpoint, tiny
from tests.teacher.test_rollouts import network

CPU = torch.device("cpu")


def test_quantised_rows_keep_three_bits() -> None:
    x = torch.randn(50, 64) * 10.0 ** torch.arange(-3, 2).repeat(10)[:, None]
    x[3] = 0
    q, scale = quantised(x)
    back = q.float() * scale
    assert q.dtype == torch.float8_e4m3fn and torch.equal(back[3], torch.zeros(64))
    most = x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 16, most / LARGEST * 2**-9) * 1.0001).all()
    torch.testing.assert_close(back.abs().amax(-1, keepdim=True), most)


def test_an_fp8_linear_is_the_product_of_quantised_rows() -> None:
    linear, x = nn.Linear(48, 32), torch.randn(2, 5, 48)
    made = Fp8Linear(linear)
    q, s = quantised(x.view(10, 48).double())
    w, v = quantised(linear.weight.double())
    exact = (q.double() * s) @ (w.double() * v).t() + linear.bias.double()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 5, 32)
    torch.testing.assert_close(found.view(10, 32).double(), exact, rtol=1e-2, atol=2e-3)
    off = (found - linear(x)).norm() / linear(x).norm()
    assert 5e-3 < off < 6e-2


def test_a_network_in_fp8_keeps_its_first_and_last_layers_and_its_memory() -> None:
    net = network()
    made = in_fp8(net)
    kinds = {name: type(m) for name, m in made.named_modules()}
    changed = {name.rpartition(".")[2] for name, kind in kinds.items() if kind is Fp8Linear}
    assert changed == {"qkv", "proj", "fc1", "fc2"} and sum(k is Fp8Linear for k in kinds.values()) == 8
    own, theirs = dict(made.named_parameters()), dict(net.named_parameters())
    assert {p.data_ptr() for p in own.values()} <= {p.data_ptr() for p in theirs.values()}
    assert "net.final.weight" in own and "net.embed.weight" in own and "net.blocks.0.fc1.weight" not in own
    assert all(not isinstance(m, Fp8Linear) for m in net.modules())
    with pytest.raises(ValueError, match="none of its linears can be multiplied in fp8"):
        convolutions = models.build(Edm(preset="cifar10", width=8, multipliers=(1,), blocks=1), "ve", 0.5, (1, 8, 8), 0)
        in_fp8(convolutions)


def test_shared_weights_are_cast_as_autocast_casts_them() -> None:
    net = network()
    x, t, y = torch.randn(3, 1, 8, 8), torch.full((3,), 0.7), torch.arange(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x, t, t, y), shared(net)(x, t, t, y))


@pytest.fixture(scope="module")
def pre(tmp_path_factory) -> Path:
    """A run whose first stage is finished."""
    folder = tmp_path_factory.mktemp("rolling") / "run"
    loop.train(Workspace(tiny(*WIDE), folder), ["pre"])
    return folder


WIDE = ("digits", "model.width=32", "model.depth=2", "pre.images_nimg=3200", "mid.images_nimg=320")


def work_of(pre: Path, out: Path, *more: str) -> Workspace:
    return Workspace(tiny(*WIDE, *more), out, pre)


def test_errors_of_precisions_are_in_their_order_and_auto_takes_the_cheapest(pre, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "missing", lambda kind, device, asked=False: None)
    choices = {}
    for limit in (1e-9, 0.02, 0.9):
        more = ["mid.trajectories.precision=auto", f"mid.trajectories.precision_limit={limit}"]
        choices[limit] = source_of(work_of(pre, tmp_path / "run", *more), "mid").trajectories
    errors = choices[1e-9]["errors"]
    assert list(errors) == ["fp8", "bf16", "tf32"] and errors["tf32"] == 0.0  # which a CPU computes in fp32
    assert 1e-4 < errors["bf16"] < errors["fp8"] < 0.3
    assert choices[1e-9]["precision"] == "tf32" and choices[0.9]["precision"] == "fp8"
    assert choices[0.02]["precision"] == ("fp8" if errors["fp8"] <= 0.02 else "bf16")


def test_auto_on_a_cpu_is_fp32_and_fp32_is_what_it_was(pre, tmp_path) -> None:
    work = work_of(pre, tmp_path / "run", "mid.trajectories.precision=auto")
    chosen, plain = source_of(work, "mid"), source_of(work_of(pre, tmp_path / "run"), "mid")
    assert chosen.trajectories["precision"] == plain.trajectories["precision"] == "fp32"
    assert not chosen.trajectories["errors"]
    a, b = (s.pool.draw(3, torch.arange(32)) for s in (chosen, plain))
    assert torch.equal(a.x, b.x)
    assert chosen.teacher is None  # nothing else needs one


def test_auto_on_a_cpu_is_bf16_where_its_product_is_faster_and_the_gate_passes(
    pre, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("CMT_PROCESSOR", "")

    def chosen(speed: float, limit: float) -> dict:
        monkeypatch.setattr(precision, "product_speed", lambda: speed)
        more = ["mid.trajectories.precision=auto", f"mid.trajectories.precision_limit={limit}"]
        return source_of(work_of(pre, tmp_path / "run", *more), "mid").trajectories

    fast, strict = chosen(4.2, 0.02), chosen(4.2, 1e-9)
    assert fast["precision"] == "bf16" and 0 < fast["errors"]["bf16"] <= 0.02
    assert strict["precision"] == "fp32" and strict["errors"] == fast["errors"]  # measured, and beyond the limit
    assert fast["refused"].keys() == {"fp8", "tf32"}
    capsys.readouterr()
    slow = chosen(0.094, 0.02)
    assert slow["precision"] == "fp32" and not slow["errors"]
    reason = f"a product of matrices runs 0.09 times as fast as in fp32 on {processor.model()}"
    assert slow["refused"]["bf16"] == reason
    assert f"mid teacher in fp32: fp8: a CPU emulates it; bf16: {reason}; tf32: " in capsys.readouterr().out
    for speed in (processor.WORTH - 0.01, processor.WORTH):
        assert chosen(speed, 0.02)["precision"] == ("bf16" if speed >= processor.WORTH else "fp32")


def test_the_product_is_timed_once_on_this_processor(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(processor, "_known", {})
    assert "CMT_PROCESSOR=usual times nothing" in str(precision.missing("bf16", CPU)) and not list(tmp_path.iterdir())
    monkeypatch.setenv("CMT_PROCESSOR", "")
    first = precision.product_speed()
    kept = json.loads((tmp_path / "cmt_fast" / processor.FILE).read_text())
    assert kept == {processor.machine(): {"linear bf16": {"ratio": first}}} and first > 0
    processor._known.clear()
    monkeypatch.setattr(processor, "measure", lambda *_: pytest.fail("timed again"))
    assert precision.product_speed() == first
    assert (precision.missing("bf16", CPU) is None) == (first >= processor.WORTH)


def test_ranks_take_the_first_one_s_product(monkeypatch) -> None:
    """A rank that found otherwise would wait for collective calls that the others do not make."""
    monkeypatch.setenv("CMT_PROCESSOR", "")
    monkeypatch.setattr(precision, "product_speed", lambda: pytest.fail("another rank timed"))
    monkeypatch.setattr(precision.distributed, "rank", lambda: 1)
    monkeypatch.setattr(precision.distributed, "every_rank", lambda x: [[3.0], x])
    assert precision.missing("bf16", CPU) is None


def test_a_named_precision_beyond_the_limit_is_refused(pre, tmp_path, capsys) -> None:
    for kind in ("bf16", "fp8"):
        more = [f"mid.trajectories.precision={kind}", "mid.trajectories.precision_limit=1e-5"]
        with pytest.raises(ConfigError, match=f"mid.trajectories.precision: {kind} moves the endpoints by .*limit"):
            source_of(work_of(pre, tmp_path / "run", *more), "mid")
    source = source_of(work_of(pre, tmp_path / "run", "mid.trajectories.precision=fp8"), "mid")  # emulated
    said = capsys.readouterr().out
    assert "mid teacher in fp8: endpoints of 32 trajectories err by fp8" in said and "emulated on a CPU" in said
    exact = source_of(work_of(pre, tmp_path / "run"), "mid").pool.draw(0, torch.arange(32))
    found = source.pool.draw(0, torch.arange(32))
    error = float((found.x_r - exact.x_r).norm() / exact.x_r.norm())
    assert error == pytest.approx(source.trajectories["errors"]["fp8"], rel=0.5)
    more = ["mid.precision=bf16", "mid.trajectories.precision_limit=1e-5"]  # the stage's own is not refused
    assert source_of(work_of(pre, tmp_path / "run", *more), "mid").trajectories["precision"] == "bf16"
    assert "warning: that is beyond trajectories.precision_limit" in capsys.readouterr().out


def test_precisions_that_are_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu = torch.device("cuda", 0)
    assert precision.missing("bf16", gpu) is None and "8.9 has" in precision.missing("fp8", gpu)
    assert precision.missing("bf16", CPU) and precision.missing("bf16", CPU, asked=True) is None

    stage = tiny("digits", "mid.trajectories.precision=fp8").mid
    with pytest.raises(ConfigError, match="mid.trajectories.precision: 'fp8' cannot be had: a GPU has none"):
        precision.check("mid", stage, gpu)
    precision.check("mid", stage, CPU)
    sharded = Teacher("mid", stage, lambda name: lambda *a: a[0], ProbabilityPath("ve"), CPU)
    with pytest.raises(ConfigError, match="mid.trajectories.precision: 'fp8' cannot be had: the teacher is sharded"):
        sharded.choose(0, 1, (1, 8, 8), 10)


def test_what_auto_chose_is_kept_and_not_chosen_again(pre, tmp_path, monkeypatch) -> None:
    """A run that began in bf16 goes on in bf16 where auto would now take fp32, and ends as if it had not stopped."""
    more = ["mid.trajectories.precision=auto", "mid.checkpoint_every_nimg=128", "eval.n_during=50"]
    with monkeypatch.context() as patch:
        patch.setattr(precision, "missing", lambda kind, device, asked=False: None if kind != "fp8" else "no")
        loop.train(work_of(pre, tmp_path / "whole", *more), ["mid"])
        row = next(r for r in metrics(tmp_path / "whole" / "mid") if r["kind"] == "trajectories")
        assert row["precision"] == "bf16" and 0 < row["errors"]["bf16"] < 0.02
        stop_after_a_checkpoint(work_of(pre, tmp_path / "run", *more))
    begun = checkpoint.latest(tmp_path / "run" / "mid").manifest
    assert begun["trajectories"]["precision"] == "bf16" and not begun["done"]
    loop.train(work_of(pre, tmp_path / "run", *more), ["mid"])
    a, b = (checkpoint.complete(tmp_path / name / "mid") for name in ("whole", "run"))
    assert a.manifest["files"] == b.manifest["files"] and a.manifest["trajectories"] == b.manifest["trajectories"]
    assert metrics(tmp_path / "whole" / "mid") == metrics(tmp_path / "run" / "mid")


def test_a_checkpoint_that_says_nothing_goes_on_as_it_began(pre, tmp_path) -> None:
    """What a version made whose teacher was always in fp32, in a stage whose own precision is bf16."""
    work = work_of(pre, tmp_path / "run", "mid.precision=bf16", "mid.checkpoint_every_nimg=128")
    stop_after_a_checkpoint(work)
    found = checkpoint.latest(tmp_path / "run" / "mid")
    old = {k: v for k, v in found.manifest.items() if k != "trajectories"}
    stage = work.run.mid
    source = source_of(work, "mid")
    fresh = source.pool.draw(0, torch.arange(32))
    before = batches.provider(
        work, work.stage("mid"), LocalEngine(work.build(), stage, work.device), found=found._replace(manifest=old)
    )
    assert before.trajectories["precision"] == "fp32" and source.trajectories["precision"] == "bf16"
    exact = source_of(work_of(pre, tmp_path / "run"), "mid").pool.draw(0, torch.arange(32))
    assert torch.equal(before.pool.draw(0, torch.arange(32)).x_r, exact.x_r) and not torch.equal(fresh.x_r, exact.x_r)


# ------------------------------------------------------------------------------------------ endpoints' features


def test_features_of_an_endpoint_are_computed_once_a_trajectory(pre, tmp_path, monkeypatch) -> None:
    work = work_of(pre, tmp_path / "run", "mid.objective.distance=features")
    source = source_of(work, "mid")
    assert source.pool.keep and source.pool.keep[0] == "features"
    seen, original = [], source.features
    source.features = lambda x: seen.append(len(x)) or original(x)
    source.pool.keep = source._kept()
    plain = source_of(work, "mid")
    plain.pool.keep = None
    student = network()
    for step in range(source.pool.steps):
        a, b = (s.pool.draw(step, torch.arange(32)) for s in (source, plain))
        assert a.kept is not None and b.kept is None
        one, two = (
            cmt_cm(student, p, work.run.mid.objective, world_of(s, step))[0] for p, s in ((a, source), (b, plain))
        )
        assert torch.equal(one, two)
    count = source.pool.count
    assert sum(seen) == count + 32 * source.pool.steps and count < 32 * source.pool.steps  # and once for each f(x_t, t)
    monkeypatch.setattr(pool, "KEEP_BYTES", 100)
    source.pool.draw(99 * source.pool.steps, torch.arange(32))
    assert source.pool._kept is None and source.pool.keep is None


def world_of(source: BatchProvider, step: int) -> LossContext:
    return LossContext(source.path, Random(0, 1, step), features=source.features, perceptual=source.perceptual)


@pytest.mark.parametrize("augment", [False, True])
def test_a_perceptual_distance_takes_them_where_nothing_is_augmented(augment: bool, pre, tmp_path) -> None:
    features = ["features.width=4", "features.batch=128", "features.epochs=1"]
    assert main(["train-features", "digits", *features, "--out", str(tmp_path / "vgg")]) == 0
    weights = next((tmp_path / "vgg").glob("*.safetensors"))
    more = [
        "mid.objective.distance=latent_lpips",
        f"mid.perceptual={{weights: {weights}, augment: {str(augment).lower()}}}",
    ]
    work = work_of(pre, tmp_path / "run", *more)
    source, student = source_of(work, "mid"), network()
    points = source.pool.draw(1, torch.arange(32))._replace(sample=torch.arange(32))
    assert (points.kept is None) == augment
    if augment:
        return
    loss = lambda p: cmt_cm(student, p, work.run.mid.objective, world_of(source, 1))[0]
    assert torch.equal(loss(points), loss(points._replace(kept=None)))
    assert torch.isfinite(loss(points)).all()
