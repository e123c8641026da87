"""Teacher calls at a budget of forwards: the law, the choice, the targets' error, and a stage as long as its budget."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil

import pytest
import torch

from bench.experiments import worth
from cmt_fast.cli import main
from cmt_fast.config import loading
from cmt_fast.config.schema import Gmm, Run, Trajectories
from cmt_fast.cost import flops
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.diffusion.solvers import rollout, table
from cmt_fast.evaluation import theory
from cmt_fast.report import sections
from cmt_fast.run import standing
from cmt_fast.run.resolved import resolve
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.teacher import solver_error, solver_record, solver_worth
from cmt_fast.teacher.solver_error import Along, Endpoints, Estimate, Solver
from cmt_fast.teacher.solver_worth import Budget, Law
from cmt_fast.train import loop, replay, solver_choice
from cmt_fast.train import steps as taking
from tests.train.test_resume import assert_equal_stage

ORDER_2 = Solver("dpmpp", 2, 1.0)


def test_the_law_goes_through_both_pilots_and_never_rises() -> None:
    law = Law((1000, 2000), (0.4, 0.1))
    assert law.exponent == pytest.approx(2) and [law.at(n) for n in (1000, 2000)] == pytest.approx([0.4, 0.1])
    assert law.at(8000) == pytest.approx(0.1 / 16)
    assert Law((1000, 2000), (0.1, 0.4)).at(8000) == 0.4


# ------------------------------------------------------------------------------------------ the choice


class Told:
    """Endpoints whose figures are given: targets miss 1 / nfe. asked: what was measured."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def cost(self, setting: Solver, nfe: int) -> float:
        return nfe / 4

    def along(self, setting: Solver, nfe: int, fine: Solver) -> Along:
        self.asked.append(nfe)
        return Along(0.9 / nfe, 1 / nfe)

    def estimate(self, setting: Solver, nfe: int) -> Estimate:
        return Estimate(setting, nfe, nfe / 4, 0.0, 0.0, 0.0, None, False)


def chosen(forwards: int, whole: bool = False, weight: float = 1 / 16) -> tuple[solver_worth.Choice, list[int]]:
    """At a budget: epsilon is 1000 / images, of 3 forwards each and the teacher's."""
    ends = Told()
    affords = lambda setting, nfe: int(forwards / (3 + nfe / 4)) // 10 * 10
    budget = Budget(affords, Law((100, 200), (10.0, 5.0)), weight)
    candidates = [(ORDER_2, n) for n in (32, 4, 64, 8, 16)]
    return solver_worth.choose(ends, candidates, budget, ORDER_2, whole), ends.asked  # type: ignore[arg-type]


@pytest.mark.parametrize("forwards", [3_000, 30_000, 300_000, 3_000_000])
def test_the_least_sum_is_taken_whatever_is_left_unmeasured(forwards) -> None:
    (found, asked), (whole, every) = chosen(forwards), chosen(forwards, whole=True)
    by_hand = {n: (1000 / (int(forwards / (3 + n / 4)) // 10 * 10)) / 16 + 1 / n**2 for n in (4, 8, 16, 32, 64)}
    assert found.best.nfe == whole.best.nfe == min(by_hand, key=by_hand.__getitem__)
    assert found.best.bound == pytest.approx(by_hand[found.best.nfe])
    assert every == [4, 8, 16, 32, 64] and asked == every[: len(asked)]
    assert [n for _, n in found.passed] == every[len(asked) :] and not whole.passed
    assert [w.nfe for w in found.weighed if w.estimate] == [found.best.nfe] and all(w.estimate for w in whole.weighed)


def test_more_forwards_buy_calls_as_well_as_images() -> None:
    few, many = (chosen(forwards)[0].best for forwards in (300_000, 30_000_000))
    assert few.nfe < many.nfe and few.images < many.images
    assert len(chosen(300_000)[1]) < 5  # the student's share alone ends the search
    assert chosen(300_000, weight=1.0)[0].best.nfe < few.nfe  # the theorem's own sum spares calls


# ------------------------------------------------------------------------------------------ what targets miss


@pytest.mark.parametrize(
    "path, setting, nfe",
    [("ve", ORDER_2, 6), ("ve", Solver("dpmpp", 3, 1.0), 12), ("linear", Solver("heun", 2, 2.0), 16)],
)
def test_targets_are_checked_at_the_nodes_by_what_is_nearly_the_flow(path, setting, nfe) -> None:
    """Beside the closed form's own flow from every node that is looked at; a shifted grid is shifted once."""
    c = Trajectories() if path == "ve" else Trajectories(solver="heun", t_max=1.0, t_min=0.0)
    net = Exact(Gmm(components=6, radius=0.416, std=0.25), ProbabilityPath(path))
    x = solver_error.starts(net.path, c, (2,), 0, 0, torch.device("cpu"), 48)[0].double()
    fine = Solver("dpmpp", 3, 1.0) if path == "ve" else Solver("heun", 2, 1.0)
    ends = Endpoints(net, net.path, x, None, c)
    found = ends.along(setting, nfe, fine)
    plan = table(net.path, setting.solver, nfe, c.t_max, c.t_min, setting.order, setting.shift)
    nodes = rollout(net, net.path, plan, x)
    picked = solver_error.checked(len(plan.times) - 1)
    true = [nodes[-1] - net.flow_map(nodes[i], plan.times[i], c.t_min, steps=200) for i in picked]
    assert found.error == pytest.approx(float(torch.stack(true).square().mean().sqrt()), rel=0.1)
    assert found.error < found.high < 2 * found.error
    calls = nfe + solver_error.FINER * sum(len(plan.times) - 1 - i for i in picked)
    assert ends.apart == 48 * calls and solver_error.calls_along([(setting, nfe)], 48) == calls


def test_errors_that_cancel_on_the_way_from_noise_do_not_from_the_middle() -> None:
    """Order 2 at six calls passes for better than at eight by its endpoint alone, and is not."""
    c, net = Trajectories(), Exact(theory.MIXTURE, ProbabilityPath("ve"))
    x = solver_error.starts(net.path, c, (2,), 0, 0, torch.device("cpu"), 64)[0].double()
    ends = Endpoints(net, net.path, x, None, c)
    six, eight = (ends.estimate(ORDER_2, n).error for n in (6, 8))
    assert six < eight
    assert ends.along(ORDER_2, 6, Solver("dpmpp", 3, 1.0)).error > 2 * six


def test_a_teacher_that_is_not_finite_is_never_chosen() -> None:
    path, c = ProbabilityPath("ve"), Trajectories()
    x = solver_error.starts(path, c, (2,), 0, 0, torch.device("cpu"), 8)[0]
    ends = Endpoints(lambda x, t, r, labels: x * math.nan, path, x, None, c)
    assert ends.along(ORDER_2, 4, ORDER_2).high == math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        solver_worth.choose(ends, [(ORDER_2, 4)], Budget(lambda s, n: 100, Law((1, 2), (2.0, 1.0)), 1.0), ORDER_2)


# ------------------------------------------------------------------------------------------ where the bias is known


def test_the_choice_beside_the_bias_that_each_candidate_really_has(monkeypatch) -> None:
    """The bound orders candidates as their bias does, the theorem's plain sum and today's rule do worse, and the bound is one."""
    monkeypatch.setattr(theory, "ORACLE_STEPS", 250)
    world = worth.World(worth.Student(64, 1.0), (4, 6, 8, 16, 24), trajectories=256, samples=500, count=32)
    found = worth.at_budget(world, 40_000, seeds=2)
    rows, rules = found["candidates"], found["rules"]
    bias = {rule: rows[name]["bias"] for rule, name in rules.items()}
    assert all(row["bias"] < row["most"] for row in rows.values())
    assert bias["bound"] < 2 * bias["best"]
    assert bias["bound"] < bias["error"] and bias["bound"] < bias["theorem"] and bias["bound"] < found["random"] / 3
    right = found["correlation"]
    assert right["bound"] > 0.9 and right["bound"] > right["error"] > right["theorem"]


# ------------------------------------------------------------------------------------------ a stage with a budget

SMALL = (
    "data.n=600", "model.width=8", "model.depth=1", "eval.n=100", "eval.n_during=100",
    "pre.images_nimg=640", "pre.batch=32", "pre.warmup_nimg=0",
    "mid.images_nimg=640", "mid.batch=32", "mid.warmup_nimg=0", "mid.eval_every_nimg=null",
    "mid.trajectories.pool_steps=4", "mid.trajectories.per_trajectory=4",
    "post.images_nimg=640", "post.batch=32", "post.trajectories.pool_steps=4",
)  # fmt: skip
BUDGET = ("mid.trajectories.nfe=auto", "mid.trajectories.budget_forwards=4000", "mid.checkpoint_every_nimg=160")


def small(*more: str) -> Run:
    """Points of the plane and a network of a few hundred numbers."""
    return loading.load("gmm", [*SMALL, *more])


@pytest.fixture(scope="module", autouse=True)
def few_trajectories():
    """Of little search: a tiny network's errors are as broad as they are long."""
    search = solver_choice.Search(8, (4, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_choice, "measure", functools.partial(solver_choice.measure, search=search))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose mid-training is as long as its budget."""
    out = tmp_path_factory.mktemp("budget") / "run"
    loop.train(Workspace(small(*BUDGET), out), ["pre", "mid"])
    return out


def test_a_stage_is_as_long_as_its_budget(finished) -> None:
    run = small(*BUDGET)
    kept, stage = solver_record.read(finished / "mid"), Workspace(run, finished).stage("mid")
    assert kept and kept.worth and kept.worth["rule"] == "bias"
    images = stage.affords(4000, Solver(*(kept.choice[k] for k in Solver._fields)), kept.choice["nfe"])
    assert images == kept.images == stage.config.images_nimg != run.mid.images_nimg
    row = next(r for r in kept.rows if all(r[k] == v for k, v in kept.choice.items()))
    assert row["bound"] == min(r["bound"] for r in kept.rows)
    assert row["bound"] == pytest.approx(solver_error.MARGIN**2 * row["epsilon"] + row["along_high"] ** 2)
    manifest = checkpoint.complete(finished / "mid").manifest
    assert manifest["nimg"] == images and manifest["others"]["trajectories"] == {**kept.choice, "images_nimg": images}
    at = standing.of(run, finished, None, "mid")
    assert at.stage.images_nimg == images and at.done
    text = " ".join(solver_choice.summary("mid", kept))
    assert f"{images:,} images are what 4,000 forwards hold" in text and "chosen by the bound" in text
    tables = sections.solvers({"mid": (kept, solver_choice.summary("mid", kept))}).groups[0].items
    assert len(tables) == 2 and len(tables[1].rows) == len(kept.rows)
    cells = next(solver_record.cells(r) for r in kept.rows if r["error"] is None)
    assert cells[3:] == ["-"] * 4 and solver_record.serves(next(r for r in kept.rows if r["error"] is None), 1.0) == "-"


def test_a_killed_stage_goes_on_to_the_same_end_and_is_replayed(finished, tmp_path, monkeypatch) -> None:
    out, run = tmp_path / "run", small(*BUDGET)
    shutil.copytree(finished / "pre", out / "pre")
    shutil.copy(finished / "run.json", out)
    real, saves = taking._save, []

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            taking, "_save", lambda *a, **k: (real(*a, **k), saves.append(1), killed() if len(saves) == 2 else None)
        )
        loop.train(Workspace(run, out), ["mid"])
    monkeypatch.setattr(solver_choice, "measure", killed)
    loop.train(Workspace(run, out), ["mid"])
    assert_equal_stage(out / "mid", finished / "mid")
    last = checkpoint.complete(out / "mid").manifest["step"]
    assert replay.replay(Workspace(run, out), "mid", last).alike


def test_a_typed_length_is_the_same_stage(finished, tmp_path) -> None:
    kept = solver_record.read(finished / "mid")
    typed = (*solver_record.override("mid", kept.choice).split(), f"mid.images_nimg={kept.images}", BUDGET[2])
    shutil.copytree(finished / "pre", tmp_path / "pre")
    loop.train(Workspace(small(*typed), tmp_path), ["mid"])
    assert_equal_stage(tmp_path / "mid", finished / "mid")


def test_without_pilots_the_error_chooses_and_the_record_says_so(finished) -> None:
    work = Workspace(small(*BUDGET), finished)
    search = solver_choice.Search(8, (4, 8), epsilon=0.5)
    kept = solver_choice.measure(work, work.stage("mid"), search=search)
    plain = Workspace(small(BUDGET[0]), finished)
    assert kept.choice == solver_choice.measure(plain, plain.stage("mid"), search=search).choice
    assert kept.worth["rule"] == "error" and "no pilots" in " ".join(solver_choice.summary("mid", kept))
    setting = Solver(*(kept.choice[k] for k in Solver._fields))
    assert kept.images == work.stage("mid").affords(4000, setting, kept.choice["nfe"])


def test_a_record_of_before_is_read(finished, tmp_path) -> None:
    found = json.loads((finished / "mid" / solver_record.FILE).read_text())
    for key in ("worth", "xxh3_128"):
        found.pop(key, None)
    (tmp_path / solver_record.FILE).write_text(json.dumps(found))
    kept = solver_record.read(tmp_path)
    assert kept.worth is None and kept.images is None and solver_choice.summary("mid", kept)


def test_before_it_is_settled_a_budget_is_counted_with_sixteen_calls(capsys) -> None:
    stage = resolve(small(*BUDGET), "mid")
    assert stage.forwards("dpmpp", 16) == 7 and stage.config.images_nimg == 4000 // 7 // 32 * 32
    guided = stage.replaced(trajectories=dataclasses.replace(stage.trajectories, guidance=1.5))
    assert guided.forwards("dpmpp", 16) == 11 and stage.forwards("heun", 4) == 5
    assert main(["estimate", "digits", "mid.batch=32", "mid.trajectories.pool_steps=4", *BUDGET]) == 0
    assert "nfe auto is counted as 16" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["digits", "digits-mf", "imagenet256-mf", "imagenet512-dit"])
@pytest.mark.parametrize("more", [(), ("mid.trajectories.guidance=1.5",), ("mid.trajectories.nfe=32",)])
def test_a_budget_counts_forwards_as_estimates_do(recipe: str, more: tuple[str, ...]) -> None:
    """Two ways to one number: from the stage's own rows, and from the terms of what it will cost."""
    stage = resolve(loading.load(recipe, more), "mid")
    counted = flops.calls(stage)["forwards"] / (stage.schedule.total * stage.config.batch)
    assert stage.forwards(stage.trajectories.solver, stage.trajectories.calls) == pytest.approx(counted, rel=1e-12)


def test_the_command_weighs_a_budget_and_proposes_a_length(finished, capsys) -> None:
    assert main(["tune-teacher", str(finished), "--trajectories", "8", "--nfe", "4,8", "--budget", "3000"]) == 0
    out = capsys.readouterr().out
    assert "Bound on the gradient's bias at 3,000 forwards" in out
    assert "mid.images_nimg=" in out.splitlines()[-1] and "extrapolated" in out


def test_a_settled_length_is_not_changed_on_the_way(finished, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert main(["train", "--resume", str(out), "--change", "mid.images_nimg=9600"]) == 2
    error = capsys.readouterr().err
    assert "mid.images_nimg follows from mid.trajectories.budget_forwards" in error
