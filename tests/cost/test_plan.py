"""The search behind `cmt plan`: what more of a budget may never do, what memory forces, and what a plan costs to `estimate`."""

from __future__ import annotations

import functools

import pytest

from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.cost import activations, estimate, gap, host, levers, memory, plan
from cmt_fast.cost.flops import AS_IT_RUNS
from cmt_fast.cost.hardware import CARDS, Step
from cmt_fast.cost.plan import LEAST, Machine, Plan
from cmt_fast.run.resolved import resolve

SMALL = ("model.width=64", "model.depth=2", "model.heads=2", "mid.eval_every_nimg=null", "post.eval_every_nimg=null")
STAGES = ["mid", "post"]


def machine(run, of: str = "h100", gpus: int = 1, **changes) -> Machine:
    return Machine(CARDS[of]._replace(**changes), gpus, estimate.rows_of(run))


@functools.cache
def planned(hours: float, gpus: int = 1, name: str = "digits", held: float = 80e9, *more: str) -> Plan:
    run = loading.load(name, [*SMALL, *more])
    return plan.plan(run, STAGES, machine(run, gpus=gpus, memory=held), hours)


@functools.cache
def whole(gpus: int = 1) -> float:
    """Hours of the whole recipe laid out, and of the same with every change of the method."""
    return planned(1e6, gpus).full.hours


def keys(made: Plan) -> dict[str, object]:
    return {c.key: c.value for c in made.layout.changes}


def images(made: Plan) -> list[int]:
    return [stage.cost.images for stage in made.layout.stages]


@pytest.mark.parametrize("gpus", [1, 4])
def test_more_hours_never_plan_fewer_images_and_no_plan_takes_longer(gpus):
    budgets = [share * whole(gpus) for share in (0.02, 0.1, 0.3, 0.31, 0.6, 0.8, 0.99, 1.0, 1.5, 1e3)]
    found = [planned(hours, gpus) for hours in budgets]
    for a, b in zip(found, found[1:]):
        assert all(x <= y for x, y in zip(images(a), images(b))) and a.fraction <= b.fraction
    for made, hours in zip(found, budgets):
        assert made.layout.hours <= hours * (1 + 1e-9)
    assert images(found[0])[0] < images(found[3])[0] < 12800 == images(found[-1])[0] and found[-1].fraction == 1
    assert found[3].layout.hours > 0.9 * budgets[3]  # and little of a budget is left


def test_the_method_changes_only_where_the_whole_recipe_does_not_fit_and_is_named():
    assert not [c for c in planned(whole() * 1.01).layout.changes if c.method]
    little = planned(whole() * 0.95)
    assert [c for c in little.layout.changes if c.method] and little.fraction == 1
    least = planned(whole() * 0.1)
    assert {"mid.images_nimg", "post.images_nimg"} <= set(keys(least))
    for change in least.layout.changes:
        assert change.why and change.was != change.value
    assert not {"post.objective.q", "mid.lr", "mid.batch", "post.batch"} & set(keys(least))


def test_what_a_plan_says_is_what_estimate_says_of_its_overrides():
    for made in (planned(whole() * 0.2), planned(whole() * 0.5, 2)):
        run = loading.load("digits", [*SMALL, *(c.override for c in made.layout.changes)])
        at = machine(run, gpus=1 if made == planned(whole() * 0.2) else 2)
        for stage in made.layout.stages:
            resolved = resolve(run, stage.name)
            bill, choice, known = estimate.stage_bill(resolved, at.rows, at.card, at.gpus)
            assert bill.hours == pytest.approx(stage.cost.hours) and bill.images == stage.cost.images
            assert choice.stage == stage.choice.stage
            held = estimate.held(resolved, at.rows, known, choice, at.card, at.gpus)
            assert held.most == pytest.approx(stage.memory.most) and held.fits


def test_the_same_share_of_both_stages_in_whole_batches():
    made = planned(whole() * 0.1)
    mid, post = made.layout.stages
    assert mid.cost.images % 64 == post.cost.images % 64 == 0
    assert mid.cost.images / 12800 == pytest.approx(post.cost.images / 25600, abs=64 / 12800)


def test_less_memory_cuts_the_rows_of_a_pass_and_the_rollouts_never_the_images():
    roomy = planned(1e6)
    need = max(stage.memory.most for stage in roomy.layout.stages)
    for share in (0.8, 0.5, 0.35):
        tight = planned(1e6, 1, "digits", share * need / 0.93)
        assert all(stage.memory.fits for stage in tight.layout.stages) and images(tight) == images(roomy)
        assert not [c for c in tight.layout.changes if c.method]
        assert {"eval.batch", "mid.micro_batch", "mid.trajectories.rollout_batch"} & set(keys(tight))
        for stage in tight.layout.stages:
            assert stage.micro_batch * stage.passes == 64
    with pytest.raises(
        ConfigError, match="^--gpus: 1 x h100 do not hold post of this recipe: a process needs .* at least, .*MB"
    ):
        planned(1e6, 1, "digits", 1e5)


def test_a_teacher_that_finds_no_room_writes_its_trajectories_first():
    """One process on which states and teacher fit one after the other, not together."""
    without = planned(1e6, 1, "digits", 80e9, "mid.trajectories.cache=x", "mid.micro_batch=1", "eval.batch=1")
    size = 1.02 * without.layout.stages[0].memory.most / memory.USABLE
    run = loading.load("digits", SMALL)
    made = plan.plan(run, ["mid"], machine(run, memory=size), 1e6)
    (mid,) = made.layout.stages
    assert mid.writing_hours > 0 and mid.cache.trajectories == 3200 and mid.memory.fits
    assert keys(made)["mid.trajectories.cache"] == "runs/digits-mid-trajectories"
    assert "teacher and guide" not in {p.what for p in mid.memory.parts}
    beside = plan.plan(run, ["mid"], machine(run, memory=2 * size), 1e6)  # with more room it lies beside the student
    assert "mid.trajectories.cache" not in keys(beside) and not beside.layout.stages[0].writing_hours


def test_evaluations_are_paid_from_the_budget():
    more = ("mid.eval_every_nimg=6400", "eval.n_during=2000")
    judged = planned(1e6, 1, "digits", 80e9, *more)
    mid = judged.layout.stages[0]
    assert mid.judged.samples == 2 * 2 * 2000 and mid.judged.forwards == 2 * 2000 * 3
    assert mid.judging_hours > 0 and judged.layout.hours == pytest.approx(whole() + mid.judging_hours)
    few = planned(0.9 * judged.full.hours, 1, "digits", 80e9, *more)
    assert few.layout.hours <= 0.9 * judged.full.hours


def test_rows_that_do_not_divide_take_the_nearest_batch_and_say_so():
    made = planned(1e6, 3)
    change = next(c for c in made.layout.changes if c.key == "mid.batch")
    assert change.value == 63 and change.method and "64 rows do not divide over 3 processes" in change.why


def test_a_budget_below_the_least_says_what_the_least_takes():
    with pytest.raises(
        ConfigError, match="budget: .* hours on 1 x h100 hold less than 1% of this recipe's images; that takes"
    ):
        planned(1e-9)
    assert planned(whole() * 2 * LEAST).fraction >= LEAST


def test_a_plan_takes_bf16_where_targets_are_fixed():
    run = loading.load("digits")
    found = [c.key for c in levers.of_method(run, STAGES, CARDS["h100"], 1)]
    assert "mid.precision" in found and "post.precision" not in found
    same = CARDS["h100"]._replace(matmul=dict.fromkeys(("bf16", "tf32", "fp32"), 1e12))
    assert "mid.precision" not in [
        c.key for c in levers.of_method(run, STAGES, same, 1)
    ]  # a processor without a matrix unit


def test_the_way_from_the_recipe_to_the_budget_falls_line_by_line_and_ends_with_what_is_missing():
    run = loading.load("digits", SMALL)
    at = machine(run, gpus=4)
    made = planned(whole(4) * 0.3, 4)
    lines = gap.lines(made, at)
    hours = [line.gpu_hours for line in lines if line.gpu_hours is not None]
    assert hours[1:] == sorted(hours[1:], reverse=True) and hours[1] == pytest.approx(4 * made.whole.hours)
    assert {line.state for line in lines} >= {gap.TAKEN, gap.UNBUILT, gap.LACKING}
    lacking = [line for line in lines if line.state == gap.LACKING]
    assert (
        f"{4 * (made.full.hours - made.budget):,.4g} GPU-hours" in lacking[0].what and "times as fast" in lacking[0].why
    )
    of_post = next(line for line in lines if line.what.endswith("the student in bf16 too"))
    assert (
        of_post.state == gap.OPEN and "of post's rows to fp32" in of_post.why
    )  # its anchor's are in bf16 all the same
    fine = planned(
        whole(4) * 0.3, 4, "digits", 80e9, "post.objective.q=1024", "post.precision=tf32", "post.anchor.fraction=0.25"
    )
    fine_lines = gap.lines(fine, machine(fine.full.run, gpus=4))
    of_post = next(line for line in fine_lines if line.what.endswith("the student in bf16 too"))
    assert of_post.state == gap.USELESS and of_post.gpu_hours is None and "100% of post's rows" in of_post.why
    assert fine_lines[-1].what.startswith("with every lever above")  # of which this one is none
    enough = gap.lines(planned(whole(4) * 2, 4), at)
    assert all(line.what.endswith(": nothing") for line in enough if line.state == gap.LACKING)


def test_a_step_is_no_shorter_than_its_host_takes_unless_it_is_a_graph():
    """By a host that was measured: under ZeRO, whose steps cannot be captured, few rows a card wait for it."""
    run = loading.load("digits", [*SMALL, "engine=zero"])
    slow = Step("FM", "bf16", 0.0, 64, 2, 16, 64, 1.0, "a file at a commit, eager", None, 1e6)
    at = machine(run, gpus=4, steps=(slow,))
    each = host.call_us(at.card)
    assert each.source == slow.source
    eager, captured = (loading.load("digits", [*SMALL, f"engine={engine}"]) for engine in ("zero", "local"))
    cost = {}
    for name, of in (("zero", eager), ("local", captured)):
        resolved = resolve(of, "post")
        known, _ = estimate.networks(resolved, at.rows)
        cost[name] = estimate.bill_of(resolved, at.rows, known, at.card, 4, AS_IT_RUNS)[0]
    known, _ = estimate.networks(resolve(run, "post"), at.rows)
    calls = activations.calls(known["student"].model, "ve", (1, 8, 8), 10, True)
    # a forward and a backward of two, and the target of ECT; teacher's rollouts are a graph of their own
    assert cost["zero"].step_us == cost["zero"].host_us == pytest.approx(4 * calls * each.us)
    assert cost["local"].host_us == 0 and cost["local"].step_us < cost["zero"].step_us
    assert "its host takes" in cost["zero"].lines[-2]
    made = plan.plan(run, STAGES, at, 1e6)
    assert keys(made)["engine"] == "local" and not made.layout.stages[1].cost.host_us


def test_one_process_under_zero_may_be_laid_out_without_it():
    made = planned(1e6, 1, "digits", 80e9, "engine=zero")
    assert made.layout.stages[0].choice.stage in (None, 0)
    found = [keys_of for keys_of in levers.engines(loading.load("digits", ["engine=zero"]), 1)]
    assert [[c.override for c in one] for one in found] == [[], ["engine=local"]]
    many = [[c.override for c in one] for one in levers.engines(loading.load("digits", ["engine=zero"]), 2)]
    assert many[:2] == [[], ["engine=local"]] and many[-1] == ["zero_stage=3", "zero_teacher=sharded"]
