"""Trajectories with a guidance scale each, of which the student is told: where the guided velocity is known, and in a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmt_fast.cli import trajectories
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import CmtMf, Gmm, Trajectories
from cmt_fast.data.gmm import Exact, means
from cmt_fast.diffusion.guidance import Guided
from cmt_fast.diffusion.paths import ProbabilityPath, column
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.objectives import OBJECTIVES, Points, StageContext
from cmt_fast.run import guidance
from cmt_fast.run.workspace import Workspace
from cmt_fast.teacher import rollouts
from cmt_fast.teacher.pool import Pool, Prior
from cmt_fast.train import loop, solver_choice
from tests.fixtures.tiny import source_of, tiny

LINEAR, MIXTURE = ProbabilityPath("linear"), Gmm(components=4)
HOW = Trajectories(solver="heun", nfe=48, t_max=1.0, t_min=0.0, pool_steps=4, per_trajectory=4, omega_max=4.0)
TOLD = ["model.guided=true", "mid.trajectories.omega_max=8", "pre.label_dropout=0.1"]


def place_at(work: Workspace, scale: float) -> guidance.Place:
    """The run, asked for this scale."""
    sampler = dataclasses.replace(work.run.sampler, guidance=scale)
    return work.place._replace(run=dataclasses.replace(work.run, sampler=sampler))


class Classes(Exact):
    """The velocity of a mixture whose components are its classes: of one where a row has its label, else of all."""

    def __call__(self, x: Tensor, t: Tensor, r: Tensor | None, labels: Tensor, drop: Tensor) -> Tensor:  # type: ignore[override]
        self.known = None if labels is None else (labels, drop)
        return super().__call__(x, t)

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        m, *rest = super()._posterior(x, t)
        labels, drop = self.known
        mu = means(self.config, x.dtype)
        none = drop | (labels == len(mu))
        return torch.where(none[:, None], m, mu[labels.clamp(max=len(mu) - 1)]), *rest


def told(x: Tensor, t: Tensor, r: Tensor, labels: Tensor, drop: None, _: None, head: bool, guide: Tensor) -> Tensor:
    """The average velocity of what guidance of these scales and intervals gives, by many small steps of the midpoint rule."""
    v, steps, start = Classes(MIXTURE, LINEAR), 64, x
    yes, no = (torch.full_like(labels, b, dtype=torch.bool) for b in (True, False))
    h = (r - t) / steps

    def guided(x: Tensor, t: Tensor) -> Tensor:
        null, cond = v(x, t, None, labels, yes), v(x, t, None, labels, no)
        omega = torch.where((guide[:, 1] <= t) & (t <= guide[:, 2]), guide[:, 0], 1.0)
        return null + column(omega, x) * (cond - null)

    for i in range(steps):
        at = t + i * h
        x = x + column(h, x) * guided(x + column(h / 2, x) * guided(x, at), at + h / 2)
    return (start - x) / column(t - r, x)


def rows() -> Points:
    """64 pairs of nodes of 64 trajectories, in float64."""
    pool = Pool(Guided(Classes(MIXTURE, LINEAR), 1.0), LINEAR, HOW, Prior((2,), 4, 0, 0, 0.25), 64, torch.device("cpu"))
    wide = lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
    return Points(*map(wide, pool.draw(0, torch.arange(64))))


def test_a_student_is_at_rest_at_the_trajectory_of_the_scale_that_it_is_told() -> None:
    """Told the scale or the interval of another trajectory it is not, unless its row has no label to be guided by."""
    points = rows()
    assert points.guide is not None and points.labels is not None
    own, other, labelled = points.guide, points.guide.roll(1, 0), points.labels < 4
    loss = lambda guide: OBJECTIVES["cmt_mf"].loss(told, points._replace(guide=guide), CmtMf(), StageContext(LINEAR))[0]
    rest = loss(own)
    assert 0 < int((~labelled).sum()) < 32 and bool((own[:, 0] > 1).all()) and float(own[:, 0].max()) < 4
    assert (
        0 < int((own[:, 1:] == torch.tensor([0.0, 1.0])).all(1).sum()) < 64
    )  # every other trajectory is guided at all times
    for theirs in (torch.cat((other[:, :1], own[:, 1:]), 1), torch.cat((own[:, :1], other[:, 1:]), 1)):
        moved = loss(theirs)
        assert float(moved[labelled].mean()) > 50 * float(rest[labelled].mean())
        torch.testing.assert_close(moved[~labelled], rest[~labelled])


def test_a_window_of_a_graph_has_its_trajectories_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed through a window, five at a time, the last turn with rows of the turn before: as called, but for rounding."""
    monkeypatch.setattr(rollouts, "aside", lambda call, device: call())
    monkeypatch.setattr(rollouts, "captured", lambda call: call)
    plan = table(LINEAR, "heun", 4, 1.0, 0.0)
    guide = torch.stack((torch.linspace(1, 4, 12), torch.zeros(12), torch.full((12,), 0.6)), 1)
    made = []
    for graph in (False, True):
        torch.manual_seed(0)
        buffer = rollouts.Buffer(torch.randn(len(plan.times), 12, 2), torch.arange(12) % 4, guide)
        rolling = rollouts.Rolling(Guided(Classes(MIXTURE, LINEAR), 1.0), LINEAR, plan, buffer, 5)
        rolling.graph = graph
        rolling()
        made.append(buffer.nodes)
    torch.testing.assert_close(made[1], made[0])


def test_one_scale_at_all_times_is_the_guidance_of_that_scale() -> None:
    """To the bit; before its interval a row is not guided."""
    plan, x, labels = table(LINEAR, "heun", 8, 1.0, 0.0), torch.randn(12, 2), torch.arange(12) % 4
    roll = lambda scale, *of: rollout(
        Guided(Classes(MIXTURE, LINEAR), scale),
        LINEAR,
        plan,
        x,
        labels,
        guide=torch.tensor([of]).expand(12, 3) if of else None,
    )
    assert torch.equal(roll(1.0, 2.5, 0.0, 1.0), roll(2.5))
    assert torch.equal(roll(1.0, 2.5, 0.0, 0.6)[1], roll(1.0)[1])
    assert not torch.allclose(roll(1.0, 2.5, 0.0, 0.6)[3], roll(1.0)[3])


def test_a_run_is_told_and_says_so(tmp_path: Path) -> None:
    """Mid-training trains what guidance adds, and the anchor is told its trajectory's; who was told so alone can be asked."""
    short = [f"{stage}.images_nimg=64" for stage in ("pre", "mid")] + [
        "mid.trajectories.nfe=4",
        "post.trajectories.nfe=4",
    ]
    work = Workspace(tiny("digits-mf", *TOLD, *short, "post.trajectories.omega_max=8"), tmp_path / "run")
    loop.train(work, ["pre", "mid"])
    assert [bool(work.network(s).net.guidance.omega.out.weight.any()) for s in ("pre", "mid")] == [False, True]
    anchored = source_of(work, "post").draw(0).anchored
    assert anchored.guide.shape == (len(anchored.x), 3) and 1 < float(anchored.guide[:, 0].max()) <= 8
    guidance.check_asked(place_at(work, 6.0), "mid", False, 10)
    with pytest.raises(ConfigError, match="draws a scale a trajectory, and a solver is measured at one"):
        solver_choice.measure(work, work.stage("mid"))
    with pytest.raises(ConfigError, match="draws a scale a trajectory, and a store keeps none"):
        trajectories.make(work, "mid", tmp_path / "cache", 8)
    with pytest.raises(ConfigError, match="--guidance: 9.0 is told to a network that was told scales from 1 to 8"):
        guidance.check_asked(place_at(work, 9.0), "mid", False, 10)


@pytest.mark.parametrize(
    "more, line",
    [
        (["model.guided=false"], "mid.trajectories.omega_max: 8.0 needs a network that is told"),
        (["mid.trajectories.guidance=2"], "mid.trajectories.omega_max: 8.0 beside mid.trajectories.guidance"),
        (["mid.trajectories.nfe=auto"], "mid.trajectories.omega_max: 8.0 with mid.trajectories.nfe auto"),
        (
            ["mid.trajectories.cache=somewhere"],
            "with mid.trajectories.cache, whose trajectories are kept without a scale",
        ),
        (["pre.label_dropout=0"], "mid.trajectories.omega_max: 8.0 guides pre, whose null class is not trained"),
        (["sampler.told_guidance=[9, 0, 1]"], "sampler.told_guidance: 9.0 is above 8"),
        (["mid.trajectories.omega_max=0.5"], "mid.trajectories.omega_max"),
    ],
)
def test_scales_that_cannot_be_are_refused(more: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Workspace(tiny("digits-mf", *TOLD, *more), Path("nowhere"))
