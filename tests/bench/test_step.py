"""The bench of steps: the peer's losses and gradients are ours, counted work and predictions are the cost model's."""

from __future__ import annotations

import pytest
import torch

from bench.training import baseline, contender, predict, runs
from bench.training.step import make_row, step_flops
from cmt_fast.config.schema import Dit
from cmt_fast.cost import estimate, flops
from cmt_fast.cost.flops import Term
from cmt_fast.cost.hardware import CARDS, Step
from cmt_fast.diffusion import rng
from cmt_fast.diffusion.rng import Random
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.models.dit import SIZES
from cmt_fast.objectives import OBJECTIVES, Batch, LossContext, Points
from cmt_fast.objectives.consistency import earlier_time
from cmt_fast.objectives.meanflow import draw_times, tangent_rows
from tests.fixtures.tape import tape

__all__ = ["tape"]
ROUNDING = 1e-9  # of float64, through a network and a hundred solver operations

# a step's work by hand, in calls of the network on all rows: MeanFlow's tangents are of the rows with r < t, a quarter
TRAINED = (Term("student", "forward", 1, ""), Term("student", "backward", 1, ""))
WORK = {
    "FM": TRAINED,
    "CMT-MF": (*TRAINED, Term("teacher", "forward", 1, "")),
    "MF": (*TRAINED, Term("student", "tangent", 0.25, "")),
}


@pytest.mark.parametrize("tokens", [256, 1024])
def test_flops_are_the_cost_models(tokens):
    work = f, attention = flops.dit_forward(*SIZES["XL"][:2], tokens, True)
    assert step_flops("FM", work) == 3 * f
    assert step_flops("CMT-CM", work) == step_flops("ECT", work) == 4 * f
    assert step_flops("CMT-MF", work, teacher=0.25) == 3.25 * f
    assert step_flops("MF", work) == 3 * f + 0.25 * (f + attention)


@pytest.mark.parametrize("way", predict.WAYS)
@pytest.mark.parametrize("objective", WORK)
@pytest.mark.parametrize("size", ["B", "XL"])
def test_predictions_are_the_cost_models(size, objective, way):
    """Whose own figures test_cost.py holds against the reference's."""
    bare = CARDS["h100"]._replace(steps=())
    net = flops.network(Dit(size=size), "linear", (4, 32, 32), 1000)
    wanted = estimate.step_us(list(WORK[objective]), net, bare, way, "bf16", predict.BATCH)
    assert predict.training(objective, size, 256, way, bare)[0] == pytest.approx(wanted)


def test_predictions_are_scaled_by_measured_steps():
    """To a step that was measured the scaled prediction is that measurement; a card without steps has none."""
    took = Step("MF", "bf16", 0.0, *SIZES["XL"][:2], 256, 64, 3000.0, "h100/step.json at 1234567, eager")
    rows = predict.steps({"h100": CARDS["h100"]._replace(steps=(took,)), "h200": CARDS["h200"]})
    by = {(row["model"], row["objective"]): row for row in rows}
    own, other = by["XL256", "MF"]["h100"], by["L256", "MF"]["h100"]
    assert own["scaled"] == pytest.approx(took.us) and own["mark"].startswith("measured: h100/step.json")
    ratio = took.us / own["fused"]
    assert other["scaled"] == pytest.approx(ratio * other["fused"], rel=0.01) and "another network's" in other["mark"]
    assert {row["h200"]["scaled"] for row in rows} == {None}
    assert own["fused"] == predict.step_us(
        "MF", "XL256", "eager", "bf16", "NVIDIA H100"
    )  # beside measurements, the bare one


class Twins:
    """One objective's network of both kinds in float64, and rows."""

    def __init__(self, objective: str) -> None:
        self.work = runs.workspace(objective, runs.model("dry"), "cpu")
        self.stage = runs.stage_of(self.work, objective, runs.model("dry"), "fp32", False, None)
        self.ours, self.teacher = self.work.build().double(), self.work.network("teacher").double()
        self.theirs, self.plain_teacher = baseline.plain(self.ours), baseline.plain(self.teacher)
        self.rows = torch.arange(16)
        self.x_0, self.labels = self.work.data.x[:16].double(), self.work.data.labels[:16]
        self.random = Random(0, 1, 7)
        self.world = LossContext(self.work.path, self.random, self.teacher)
        self.eps = self.random.normal(rng.NOISE, self.rows, tuple(self.x_0.shape[1:])).double()

    def same(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Losses (B,) and the gradients of their means, to rounding."""
        torch.testing.assert_close(theirs, ours, rtol=ROUNDING, atol=0)
        ours.mean().backward(), theirs.mean().backward()
        mine = dict(self.ours.named_parameters())
        for name, p in self.theirs.named_parameters():
            size = mine[name].grad.abs().max()
            assert size > 0, name
            assert (p.grad - mine[name].grad).abs().max() <= ROUNDING * size, name

    def objective(self) -> torch.Tensor:
        """Our loss of the rows."""
        batch = Batch(self.x_0, self.labels, self.rows, None)
        return OBJECTIVES[self.stage.objective.kind].function(self.ours, batch, self.stage.objective, self.world)[0]


def test_flow_matching_is_the_same_loss():
    w = Twins("FM")
    t = torch.sigmoid(w.stage.objective.mean + w.stage.objective.std * w.random.gauss(rng.TIME, w.rows)).double()
    w.same(w.objective(), baseline.flow_loss(w.theirs, w.x_0, w.labels, t, w.eps))


def test_meanflow_by_one_pass_of_func_jvp_is_the_same_loss():
    w = Twins("MF")
    c = w.stage.objective
    t, r = draw_times(w.rows, tangent_rows(16, c.ratio), c, w.world, torch.float64)
    w.same(w.objective(), baseline.meanflow_loss(w.theirs, w.x_0, w.labels, t, r, w.eps, c))


@pytest.mark.parametrize("name", ["ECT", "ECD"])
def test_consistency_tuning_is_the_same_loss(name):
    w = Twins(name)
    c = w.stage.objective
    t = torch.exp(c.mean + c.std * w.random.gauss(rng.TIME, w.rows)).double()
    teacher = w.plain_teacher if name == "ECD" else None
    r = earlier_time(t, c.q, c.k, c.b)
    w.same(w.objective(), baseline.consistency_loss(w.theirs, w.x_0, w.labels, t, r, w.eps, c, teacher))


@pytest.mark.parametrize("name", ["CMT-CM", "CMT-MF"])
def test_mid_training_is_the_same_trajectories_and_loss(name):
    w = Twins(name)
    c, labels = w.stage.trajectories, torch.tensor([3, 4])
    noise = w.eps[:2] * (c.t_max if name == "CMT-CM" else 1.0)
    solve = baseline.dpm_solver if name == "CMT-CM" else baseline.heun_solver
    states, times = solve(w.plain_teacher, noise, labels, c)
    plan = table(w.work.path, c.solver, c.nfe, c.t_max, c.t_min, c.order)
    mine = rollout(w.teacher, w.work.path, plan, noise, labels)
    assert times.tolist() == pytest.approx(plan.times, rel=1e-12)
    torch.testing.assert_close(states, mine, rtol=1e-8, atol=1e-9)
    last = len(states) - 1
    if name == "CMT-CM":
        i = torch.arange(last).repeat_interleave(2)
        j, which = torch.full_like(i, last), torch.arange(2).repeat(last)
        theirs = baseline.cmt_cm_loss(w.theirs, states, times, labels, w.stage.objective.distance, w.stage.objective.c)
    else:
        pick = torch.tensor([0, 5, 17, 40, 71])
        pairs = torch.triu_indices(last + 1, last + 1, offset=1)
        (i, j), which = pairs[:, pick // 2], pick % 2
        theirs = baseline.cmt_mf_loss(w.theirs, states, times, labels, pick)
    points = Points(states[i, which], times[i], states[j, which], times[j], labels[which], None)
    ours = OBJECTIVES[w.stage.objective.kind].function(w.ours, points, w.stage.objective, w.world)[0]
    w.same(ours, theirs)


def test_a_bench_step_is_the_trainers_step_and_both_move_their_weights():
    m = runs.model("dry")
    work = runs.workspace("CMT-CM", m, "cpu")
    stage = runs.stage_of(work, "CMT-CM", m, "fp32", False, None)
    work.network("teacher")
    ours = runs.Ours(work, "CMT-CM", stage)
    assert ours.pool.teacher_forwards == 1 and ours.pool.steps == m.pool_steps and ours.pool.rows == m.batch
    other = runs.Ours(work, "CMT-CM", stage, share=ours)
    theirs = baseline.Step(
        stage,
        baseline.plain(work.build()),
        baseline.plain(work.teacher),
        baseline.Rows(work.data.x, work.data.labels, 10),
    )
    for step, p in ((ours, ours.engine.p), (other, ours.engine.p), (theirs, theirs.net.net.final.weight)):
        before = p.detach().clone()
        step()
        assert not torch.equal(before, p) and torch.isfinite(p).all()


@pytest.mark.parametrize("name", ["XL", "XL257", "huge", "256"])
def test_a_model_that_is_none_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is not valid"):
        runs.model(name)


def test_a_model_by_size_and_tokens():
    m = runs.model("XL1024")
    assert (m.width, m.depth, m.heads, m.tokens, m.batch) == (1152, 28, 16, 1024, 16)


def test_a_graphed_bench_step_is_the_step_and_its_rows_are_of_their_own(tape):
    m, found = runs.model("dry"), []
    for graphed in (True, False):
        work = runs.workspace("MF", m, "cpu")
        one = contender.ours("MF", m, work, "eager", "fp32", None, more=["graph"] * graphed)
        one.warm("cpu")
        while one.step.step < 6:
            one.step()
        found.append(one.step.engine.p)
        fitted = {"batch": m.batch, "teacher": 0.0, "peak_gb": None, "saved": 1, "compile_s": None, "guarded": None}
        times = {"ms": [1.0], "host_ms": [1.0], "rounds_ms": [], "square_ms": [1.0]}
        row = make_row("MF", m, "eager", "fp32", fitted | {"more": one.more}, times, "cpu", 1.0)
        assert row["how"] == ("eager, graph" if graphed else "eager")
    assert tape.captures == 2 and torch.equal(*found)
