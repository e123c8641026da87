"""An evaluation computes no row twice, and its figures are to the last bit those of every sampler by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cmt_fast.diffusion import rng
from cmt_fast.diffusion.rng import Random
from cmt_fast.evaluation import tallies
from cmt_fast.run.judging import Judging
from cmt_fast.run.workspace import Workspace
from cmt_fast.train import loop
from tests.fixtures.tiny import tiny

N = 130  # with batches of 40: three whole ones and one that is cut


class Counted(nn.Module):
    """A network that knows of how many rows it was called; raw: the solver's calls count too."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0
        self.scalings = net.scalings if hasattr(net, "scalings") else None

    def forward(self, x, *rest):
        self.rows += len(x)
        return self.net(x, *rest)

    def raw(self, x, *rest):
        self.rows += len(x)
        return getattr(self.net, "raw", self.net)(x, *rest)


def opened(folder, recipe: str = "digits") -> tuple[Workspace, Counted]:
    work = Workspace(tiny(recipe, "eval.batch=40", f"eval.n={N}", "eval.n_during=80"), folder)
    net = work.build()
    for p in net.parameters():  # a fresh network is zero times its input
        p.data += 0.05 * torch.randn(p.shape)
    return work, Counted(net.requires_grad_(False))


def alone(work: Workspace, net, k: int, n: int, solver: bool = False, seed: int | None = None, judge=None) -> dict:
    """Figures as one sampler by itself has them: every batch drawn from its starting noise."""
    tally = tallies.Tally(judge or work.judging.judge)
    for index in torch.arange(n).split(work.run.eval.batch):
        samples = work.setting.draw(net, k, work.run.eval.seed if seed is None else seed, index, solver)
        tally.add(samples, work.setting.labels(index))
    return tally.figures()


@pytest.mark.parametrize("recipe", ["digits", "digits-mf"])
def test_one_first_call_serves_every_number_of_steps(recipe, tmp_path) -> None:
    """On VE; jumps begin with another target time for every number of steps, so nothing is common there."""
    work, net = opened(tmp_path, recipe)
    steps = (1, 2, 4)
    want = {str(k): alone(work, net, k, N) for k in steps}
    before, net.rows = net.rows, 0
    assert work.judging.evaluate(net, steps, N, quiet=True) == want
    assert len({row["frechet"] for row in want.values()}) == 3  # the samplers differ
    assert before == N * sum(steps)
    assert net.rows == (before if recipe == "digits-mf" else N * (1 + sum(k - 1 for k in steps)))
    seeded = work.judging.evaluate(net, (2,), N, seed=5, quiet=True)
    assert seeded == {"2": alone(work, net, 2, N, seed=5)} != {"2": want["2"]}


@pytest.mark.parametrize("during", [80, 90, 30, N])
def test_smaller_counts_share_the_whole_batches_of_the_largest(during, tmp_path) -> None:
    """80 ends with a batch of 40, 90 and 30 cut one: those rows are drawn again, as their own evaluation draws them."""
    work, net = opened(tmp_path)
    whole, part = alone(work, net, 3, N, solver=True), alone(work, net, 3, during, solver=True)
    before, net.rows = net.rows, 0
    found = work.judging.figures(net, (3,), (N, during), solver=True, quiet=True)
    assert found == {3: {N: whole, during: part}}
    again = during % 40 if during < N else 0
    assert before == 3 * (N + during) and net.rows == 3 * (N + again)


def test_each_sampler_is_its_formula(tmp_path) -> None:
    """x_0 = f(80 z, 80), then f(x_0 + t z_i, t), z_i a stream of its own for every call after the first."""
    work, net = opened(tmp_path)
    index = torch.arange(7)
    labels = work.setting.labels(index)
    for k, samples in work.setting.draw_each(net, (4, 1, 2), 3, index):
        z = [Random(3, 0, i).normal(rng.RENOISE if i else rng.SAMPLE, index, (1, 8, 8)) for i in range(k)]
        x = net(80.0 * z[0], torch.full((7,), 80.0), None, labels)
        for t, noise in zip(work.run.sampler.mid_times.get(k, ()), z[1:], strict=True):
            x = net(x + t * noise, torch.full((7,), t), None, labels)
        assert torch.equal(samples, x)


def test_a_copy_of_a_tally_goes_on_alone(tmp_path) -> None:
    work, net = opened(tmp_path)
    judge = work.judging.open_judge(rows=True)
    a = tallies.Tally(judge)
    a.add(work.setting.draw(net, 1, 0, torch.arange(40)), torch.arange(40) % 10)
    a.add(work.setting.draw(net, 1, 0, torch.arange(40, 80)), torch.arange(40) % 10)
    before = a.figures()
    b = a.copy()
    b.add(work.setting.draw(net, 1, 0, torch.arange(80, 120)), torch.arange(40) % 10)
    assert a.figures() == before != b.figures()


def test_samples_that_are_not_finite_break_their_own_number_of_steps_alone(tmp_path) -> None:
    work, net = opened(tmp_path)
    late = lambda x, t, *rest: net(x, t, *rest) * (1.0 if float(t[0]) > 10 else float("nan"))
    found = work.judging.figures(late, (1, 2), (40, N), quiet=True)
    assert found[1] == {n: alone(work, net, 1, n) for n in (40, N)} and found[2] == {40: None, N: None}
    with pytest.raises(FloatingPointError, match="samples of 2 steps are not finite"):
        work.judging.evaluate(late, (1, 2), N, quiet=True)


def test_precision_and_recall_hold_the_features_of_one_number_of_steps_at_a_time(tmp_path, monkeypatch) -> None:
    work, net = opened(tmp_path)
    judge, groups, figures = work.judging.open_judge(rows=True), [], Judging.figures
    monkeypatch.setattr(Judging, "figures", lambda self, *a, **k: groups.append(a[1]) or figures(self, *a, **k))
    found = work.judging.evaluate(net, (1, 2), N, judge=judge, quiet=True)
    assert groups == [(1,), (2,)]
    assert found == {str(k): alone(work, net, k, N, judge=judge) for k in (1, 2)} and "recall" in found["1"]


def test_a_stage_judges_in_training_what_the_samplers_give_alone(tmp_path, monkeypatch) -> None:
    """The rows of metrics.jsonl, against each sampler by itself on the same network."""
    run = tiny("digits", "mid.eval_every_nimg=320", "eval.batch=40", "eval.n_during=90")
    work, seen, evaluate = Workspace(run, tmp_path), [], Judging.evaluate

    def both(self, net, steps, n, **more):
        counted = Counted(net)
        found = evaluate(self, counted, steps, n, **more)
        seen.append((found, {str(k): alone(work, net, k, n) for k in steps}, counted.rows))
        return found

    monkeypatch.setattr(Judging, "evaluate", both)
    loop.train(work, ["pre", "mid"])
    assert len(seen) == 2 and all(found == want for found, want, _ in seen)
    assert all(rows == 90 * 2 for *_, rows in seen)  # of one and two steps: 90 * 3 alone
