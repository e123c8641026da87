"""How trajectories are made: one buffer, the rollout as a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmt_fast import models
from cmt_fast.config.schema import Dit, Trajectories
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.guidance import guided
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout
from cmt_fast.models.fp8 import Fp8Linear, in_fp8, shared
from cmt_fast.runtime import distributed
from cmt_fast.teacher import precision as teacher
from cmt_fast.teacher import rollouts
from cmt_fast.teacher.pool import Pool, Prior
from cmt_fast.teacher.precision import Teacher
from cmt_fast.teacher.rollouts import Buffer, Rolling
from tests.fixtures.tiny import tiny

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
    return Pool(net, ProbabilityPath(path), config, Prior((1, 8, 8), 10, 5, 1), 16, CPU)


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
        patch.setattr(rollouts, "captured", self.capture)

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
            p._rolling = Rolling(net, p.path, p.plan, Buffer(p._states, p._labels), batch)
            p._rolling.graph = True
        p.draw(index * p.steps, torch.arange(16))
        plain = rebuilt(p, index)[0]
        torch.testing.assert_close(p._states, plain, rtol=1e-5, atol=1e-5)  # other batches, other roundings
    assert recorded.captures == 1 and recorded.replays == 3 * turns
    assert (p._rolling._window.nodes is p._states) == (turns == 1)


def test_what_cannot_be_captured_is_called_and_said(monkeypatch) -> None:
    said: list[str] = []
    p = pool_of(network(), rollout_batch=5)
    p._allocate()
    p._rolling = Rolling(p.teacher, p.path, p.plan, Buffer(p._states, p._labels), 5, tell=said.append)
    p._rolling.graph = True

    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(rollouts, "captured", refuse)
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
    made = Teacher("mid", stage, lambda name: net, ProbabilityPath("ve"), torch.device("cuda"))
    plan = pool_of(None).plan
    nodes, labels = torch.zeros(9, 64, 1, 8, 8, device="cuda"), torch.arange(64, device="cuda") % 10
    said: list[str] = []
    rolled = Rolling(
        held,
        ProbabilityPath("ve"),
        plan,
        Buffer(nodes, labels),
        batch,
        computing=made.computing(precision),
        tell=said.append,
    )
    for _ in range(3):
        nodes[0] = 80 * torch.randn_like(nodes[0])
        rolled()
        with made.computing(precision)():
            parts = zip(nodes[0].split(batch), labels.split(batch))
            wanted = torch.cat([rollout(held, ProbabilityPath("ve"), plan, x, y) for x, y in parts], dim=1)
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
