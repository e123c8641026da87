"""How trajectories are made: one buffer, the rollout as a CUDA graph, the teacher in lower formats, features kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmt_fast import checkpoint, distributed, loop, models, rng, teacher
from cmt_fast.cli import main
from cmt_fast.config import ConfigError
from cmt_fast.engine import LocalEngine
from cmt_fast.models.fp8 import LARGEST, Fp8Linear, in_fp8, quantised, shared
from cmt_fast.objectives import World
from cmt_fast.objectives.cmt import cmt_cm
from cmt_fast.paths import Path as ForwardPath
from cmt_fast.rng import Random
from cmt_fast.schema import Dit, Edm, Trajectories
from cmt_fast.solvers import guided, rollout
from cmt_fast.source import Source
from cmt_fast.teacher import Teacher
from cmt_fast.trajectories import Pool, Rolling, pool, rolling
from cmt_fast.workspace import Workspace
from tests.train.tiny import metrics, source_of, tiny

CPU = torch.device("cpu")
SHAPES = {"ve": (80.0, 0.002), "linear": (1.0, 0.0)}


def network(path: str = "ve") -> nn.Module:
    """A small DiT away from its zero start."""
    net = models.build(Dit(width=32, depth=2, heads=2), path, 0.5, (1, 8, 8), 10)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def pool_of(net, path: str = "ve", **options) -> Pool:
    t_max, t_min = SHAPES[path]
    config = Trajectories(**{"nfe": 8, "t_max": t_max, "t_min": t_min, "pool_steps": 3, "per_trajectory": 4} | options)
    return Pool(net, ForwardPath(path), config, (1, 8, 8), 10, 16, 5, 1, CPU)


def rebuilt(p: Pool, index: int) -> tuple[Tensor, Tensor]:
    """A round as the sum of its definition: starts, rollouts piece by piece, one after the other."""
    random, ids = Random(5, 1, index), torch.arange(p.count)
    labels = random.integers(rng.START_LABEL, ids, 10)
    x = random.normal(rng.START, ids, (1, 8, 8)) * (80.0 if p.path.name == "ve" else 1.0)
    size = p.config.rollout_batch
    parts = [rollout(p.teacher, p.path, p.plan, a, b) for a, b in zip(x.split(size), labels.split(size))]
    return torch.cat(parts, dim=1), labels


# ------------------------------------------------------------------------------------------ the buffer


@pytest.mark.parametrize("path", ["ve", "linear"])
@pytest.mark.parametrize("options", [{}, {"mode": "paper"}, {"rollout_batch": 5}, {"per_trajectory": 2}])
def test_rounds_in_one_buffer_are_the_rollouts_to_the_bit(path: str, options: dict) -> None:
    p = pool_of(guided(network(path), 1.5), path, **options)
    place, each = None, []
    for index in (0, 2, 1, 0):
        points = p.draw(index * p.steps, torch.arange(16))
        states, labels = rebuilt(p, index)
        assert torch.equal(p._states, states) and torch.equal(p._labels, labels)
        i = (torch.tensor(p.plan.times) - points.t[:, None]).abs().argmin(1)
        found = (states[i] == points.x[:, None]).flatten(2).all(-1)
        assert found.any(1).all() and torch.equal(labels[found.int().argmax(1)], points.labels)
        assert place in (None, p._states.data_ptr())
        place = p._states.data_ptr()
        each.append(points.x)
    assert torch.equal(each[0], each[3]) and not torch.equal(each[0], each[1])


@pytest.mark.parametrize("mode, each", [("paper", 8), ("pool", 3)])
def test_points_a_trajectory_in_either_mode(mode: str, each: int) -> None:
    """Paper mode takes all points of consistency models and so many random pairs of flow maps; Heun calls twice a point."""
    assert pool_of(None, mode=mode, per_trajectory=3).each == each
    assert pool_of(None, mode=mode, per_trajectory=4, solver="heun").each == 4
    assert pool_of(None, mode=mode, per_trajectory=99).each == 8
    flow = pool_of(network("linear"), "linear", mode=mode, per_trajectory=4)
    assert flow.each == 4 and flow.count * 4 == 16 * flow.steps
    points = flow.draw(0, torch.arange(16))
    assert (points.t > points.r).all() and len(set(points.t.tolist())) > 2


def test_two_processes_share_what_each_has_made(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    for rank in range(2):
        context.Process(target=_shares, args=(rank, str(tmp_path / "store"), queue), daemon=True).start()
    assert {queue.get(), queue.get()} == {0, 1}


def _shares(rank: int, file: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.full((4, 3), -1.0)
    x[2 * rank : 2 * rank + 2] = float(rank)
    distributed.share_rows(x)
    wanted = torch.tensor([0.0, 0, 1, 1])[:, None].expand(4, 3)
    queue.put(rank if torch.equal(x, wanted) else -1)
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------ the graph


class Recorded:
    """What stands in for a CUDA graph here: the call, which must find its inputs and outputs where they were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captures = self.replays = 0
        patch.setattr(rolling, "captured", self.capture)

    def capture(self, call):
        self.captures += 1
        call()

        def replay() -> None:
            self.replays += 1
            call()

        return replay


@pytest.mark.parametrize("batch, turns", [(12, 1), (99, 1), (5, 3), (4, 3)])
def test_a_rollout_is_captured_once_and_replayed_through_a_window(batch: int, turns: int, monkeypatch) -> None:
    recorded, net, plain = Recorded(monkeypatch), network(), None
    p = pool_of(net, rollout_batch=batch)
    for index in (0, 1, 2):
        if p._rolling is None:
            p._allocate()
            p._rolling = Rolling(net, p.path, p.plan, p._states, p._labels, batch)
            p._rolling.graph = True
        p.draw(index * p.steps, torch.arange(16))
        plain = rebuilt(p, index)[0]
        torch.testing.assert_close(p._states, plain, rtol=1e-5, atol=1e-5)  # other batches, other roundings
    assert recorded.captures == 1 and recorded.replays == 3 * turns
    assert (p._rolling._window[0] is p._states) == (turns == 1)


def test_what_cannot_be_captured_is_called_and_said(monkeypatch) -> None:
    said: list[str] = []
    p = pool_of(network(), rollout_batch=5)
    p._allocate()
    p._rolling = Rolling(p.teacher, p.path, p.plan, p._states, p._labels, 5, tell=said.append)
    p._rolling.graph = True

    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(rolling, "captured", refuse)
    for index in (0, 1):
        p.draw(index * p.steps, torch.arange(16))
        assert torch.equal(p._states, rebuilt(p, index)[0])
    assert len(said) == 1 and said[0].endswith("no CUDA graph: operation not permitted when stream is capturing")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp8"])
@pytest.mark.parametrize("batch", [64, 24])
def test_a_graph_of_a_rollout_gives_what_the_calls_give(precision: str, batch: int) -> None:
    if teacher.missing(precision, torch.device("cuda")):
        pytest.skip(f"no {precision} here")
    net = network().cuda()
    held = {"fp8": in_fp8, "bf16": shared}.get(precision, lambda n: n)(net)
    stage = tiny("digits", f"mid.trajectories.precision={precision}").mid
    made = Teacher("mid", stage, lambda name: net, ForwardPath("ve"), torch.device("cuda"))
    plan = pool_of(None).plan
    nodes, labels = torch.zeros(9, 64, 1, 8, 8, device="cuda"), torch.arange(64, device="cuda") % 10
    said: list[str] = []
    rolled = Rolling(
        held, ForwardPath("ve"), plan, nodes, labels, batch, computing=made.computing(precision), tell=said.append
    )
    for _ in range(3):
        nodes[0] = 80 * torch.randn_like(nodes[0])
        rolled()
        with made.computing(precision)():
            parts = zip(nodes[0].split(batch), labels.split(batch))
            wanted = torch.cat([rollout(held, ForwardPath("ve"), plan, x, y) for x, y in parts], dim=1)
        error = (nodes - wanted).norm() / wanted.norm()
        if batch == 64:
            assert torch.equal(nodes, wanted)
        assert error < (1e-4 if precision == "fp32" else 2e-2)  # the last part alone is a smaller batch
    assert rolled._replay is not None and not said


@pytest.mark.gpu
def test_fp8_on_a_gpu_is_what_the_emulation_says() -> None:
    if teacher.missing("fp8", torch.device("cuda")):
        pytest.skip("no fp8 here")
    linear = Fp8Linear(nn.Linear(256, 128))
    x = torch.randn(300, 256)
    wanted = linear(x).float()
    found = linear.cuda()(x.cuda()).float().cpu()
    assert (found - wanted).norm() / wanted.norm() < 5e-3  # bf16 has 8 bits; the sums are those of the tensor cores


# ------------------------------------------------------------------------------------------ formats


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


def test_errors_of_formats_are_in_their_order_and_auto_takes_the_cheapest(pre, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(teacher, "missing", lambda format, device, asked=False: None)
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


def test_a_named_format_beyond_the_limit_is_refused(pre, tmp_path, capsys) -> None:
    for format in ("bf16", "fp8"):
        more = [f"mid.trajectories.precision={format}", "mid.trajectories.precision_limit=1e-5"]
        with pytest.raises(ConfigError, match=f"mid.trajectories.precision: {format} moves the endpoints by .*limit"):
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


def test_formats_that_are_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    gpu = torch.device("cuda", 0)
    assert teacher.missing("bf16", gpu) is None and "8.9 has" in teacher.missing("fp8", gpu)
    assert teacher.missing("bf16", CPU) and teacher.missing("bf16", CPU, asked=True) is None

    stage = tiny("digits", "mid.trajectories.precision=fp8").mid
    with pytest.raises(ConfigError, match="mid.trajectories.precision: 'fp8' cannot be had: a GPU has none"):
        teacher.check("mid", stage, gpu)
    teacher.check("mid", stage, CPU)
    sharded = Teacher("mid", stage, lambda name: lambda *a: a[0], ForwardPath("ve"), CPU)
    with pytest.raises(ConfigError, match="mid.trajectories.precision: 'fp8' cannot be had: the teacher is sharded"):
        sharded.choose(0, 1, (1, 8, 8), 10)


def test_what_auto_chose_is_kept_and_not_chosen_again(pre, tmp_path, monkeypatch) -> None:
    """A run that began in bf16 goes on in bf16 where auto would now take fp32, and ends as if it had not stopped."""
    more = ["mid.trajectories.precision=auto", "mid.checkpoint_every_nimg=128", "eval.n_during=50"]
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "missing", lambda format, device, asked=False: None if format != "fp8" else "no")
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
    """What a version made whose teacher was always in fp32, in a stage whose own format is bf16."""
    work = work_of(pre, tmp_path / "run", "mid.precision=bf16", "mid.checkpoint_every_nimg=128")
    stop_after_a_checkpoint(work)
    found = checkpoint.latest(tmp_path / "run" / "mid")
    old = {k: v for k, v in found.manifest.items() if k != "trajectories"}
    stage = work.run.mid
    source = source_of(work, "mid")
    fresh = source.pool.draw(0, torch.arange(32))
    before = Source(work, "mid", stage, LocalEngine(work.build(), stage, work.device), found._replace(manifest=old))
    assert before.trajectories["precision"] == "fp32" and source.trajectories["precision"] == "bf16"
    exact = source_of(work_of(pre, tmp_path / "run"), "mid").pool.draw(0, torch.arange(32))
    assert torch.equal(before.pool.draw(0, torch.arange(32)).x_r, exact.x_r) and not torch.equal(fresh.x_r, exact.x_r)


def stop_after_a_checkpoint(work: Workspace) -> None:
    """Train until the second checkpoint would be written."""
    whole, written = checkpoint.save, []

    def save(*arguments, **more):
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return whole(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(KeyboardInterrupt):
            loop.train(work, ["mid"])


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


def world_of(source: Source, step: int) -> World:
    return World(source.path, Random(0, 1, step), features=source.features, perceptual=source.perceptual)


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
