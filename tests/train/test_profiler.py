"""The profiler looks and changes nothing; its table holds every op, whose work it is and how much."""

from __future__ import annotations

import gzip
import json

import cmt_kernels
import pytest
import torch
from cmt_kernels.cases import cases_of
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmt_fast import cli, schedule
from cmt_fast import engine as engines
from cmt_fast.run.workspace import Workspace
from cmt_fast.schedule import Schedule
from cmt_fast.train import loop
from cmt_fast.train.profile_table import GRAPH, Call, table
from cmt_fast.train.profiler import Profile, roof, window
from tests.fixtures.tiny import source_of, tiny
from tests.train.test_resume import assert_equal_stage

SIZE = ["model.width=32", "model.depth=2", "pre.images_nimg=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Pre-training, and mid-training under the profiler."""
    torch.set_num_threads(1)
    work = Workspace(tiny("digits", *SIZE), tmp_path_factory.mktemp("profiled") / "run")
    loop.train(work, ["pre"])
    loop.train(work, ["pre", "mid"], Profile(3))
    return work


def rows(work) -> dict[tuple[str, str], dict]:
    body = json.loads((work.folder / "mid/profile/table.json").read_text())
    return {(r["part"], r["op"]): r for r in body["rows"]}


def test_weights_and_metrics_are_those_of_a_run_without(run, tmp_path):
    work = Workspace(run.run, tmp_path, run.folder)
    loop.train(work, ["mid"])
    assert not (tmp_path / "mid" / "profile").exists()
    assert_equal_stage(run.folder / "mid", tmp_path / "mid")


def test_a_finished_stage_is_not_profiled(run):
    assert not (run.folder / "pre" / "profile").exists()


def test_the_trace_is_json_with_our_ranges(run):
    with gzip.open(run.folder / "mid/profile/trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    used = {op for _, op in rows(run)} & set(cmt_kernels.OPS)
    assert {f"op {op}" for op in used} <= names and "teacher" in names


def test_the_table_holds_the_ops_of_each_part(run):
    found = rows(run)
    ops = lambda part: {op for p, op in found if p == part}
    network = {
        "attention",
        "gated_residual",
        "gelu",
        "label_embedding",
        "linear",
        "modulated_norm",
        "silu",
        "time_embedding",
    }
    assert network <= ops("forward") and network <= ops("teacher")
    assert "solver_step" in ops("teacher") and "consistency_loss" in ops("forward") and ops("update") == {"adamw_ema"}
    assert network - {"time_embedding"} <= ops("backward") and "consistency_loss" in ops("backward")
    assert sum(r["share"] for r in found.values()) == pytest.approx(1)
    assert all(r["ms"] >= 0 for r in found.values())
    # a rollout of 16 network calls is for 4 steps
    assert found["teacher", "solver_step"]["calls"] == 16 / 4 and found["update", "adamw_ema"]["calls"] == 1
    blocks = run.run.model.depth
    assert found["forward", "attention"]["calls"] == found["backward", "attention"]["calls"] == blocks
    assert found["teacher", "attention"]["calls"] == 4 * blocks
    text = (run.folder / "mid/profile/table.md").read_text()
    assert "| forward | linear |" in text and "of a matmul" in text and "spread over the 4 steps" in text


def test_flops_are_those_that_torch_counts(run):
    """Of linears and attention, forward and backward, against torch's own counter of matmuls on the same step."""
    stage = run.run.mid
    source = source_of(run, "mid", stage)
    engine = engines.LocalEngine(run.build(), stage, run.device)
    with cmt_kernels.use("reference"), sdpa_kernel(SDPBackend.MATH):  # the counter does not know fused attention
        source.loss(engine, 0)  # the rollout of the first round is not the student's
        with FlopCounterMode(display=False) as forward:
            loss = source.loss(engine, 1)[0]
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    found = rows(run)
    ours = {part: sum(found[part, op]["flops"] for op in ("linear", "attention")) for part in ("forward", "backward")}
    assert ours["forward"] == forward.get_total_flops() > 0
    # of images and times no gradient is needed, which the formula does not know
    assert 0.95 * ours["backward"] < backward.get_total_flops() < ours["backward"]


def test_shares_of_the_roof(run):
    body = json.loads((run.folder / "mid/profile/table.json").read_text())
    best, found = body["roof"], rows(run)
    linear = found["forward", "linear"]
    least = 1e3 * max(linear["flops"] / best["flop_s"], linear["nbytes"] / best["byte_s"])
    assert linear["roof"] == pytest.approx(least / linear["ms"]) and 0 < linear["roof"] < 2
    assert found["backward", "gelu"]["roof"] is None and found["step", "host and waiting"]["roof"] is None


def test_the_roof_draws_nothing_of_the_runs_random_numbers():
    before = torch.get_rng_state()
    best = roof(torch.device("cpu"), "fp32")
    assert torch.equal(torch.get_rng_state(), before) and best and min(best.values()) > 1e8


def test_the_profiled_steps_begin_a_round_away_from_evaluations():
    plan = lambda **given: Schedule(**{**dict.fromkeys(Schedule._fields, 0), "total": 1000, **given})
    assert window(range(0, 1000), 4, 1, plan()) == 10
    assert window(range(500, 1000), 4, 1, plan()) == 510
    assert window(range(0, 1000), 4, 16, plan()) == 16
    assert window(range(0, 1000), 4, 16, plan(eval_every=20)) == 32  # 16 to 19 are followed by an evaluation
    assert window(range(0, 1000), 4, 16, plan(eval_every=2)) == 16  # there is no way round
    assert window(range(0, 12), 4, 1, plan(total=12)) == 1  # a short stage: at once, but for the warm-up
    assert window(range(7, 12), 4, 16, plan(total=12)) == 8


def test_a_stage_with_one_step_left_is_not_profiled(tmp_path, capsys):
    profile = Profile(4)
    plan = schedule.schedule(tiny("digits").pre)
    left = list(profile.over(range(3, 4), plan, 1, torch.device("cpu"), "fp32", False, tmp_path))
    assert left == [3] and profile.done and "nothing was profiled" in capsys.readouterr().out


def test_the_profiler_ends_with_the_stage(run, tmp_path):
    """An error within the profiled steps leaves the ops as they were."""
    before = {op: list(chosen) for op, chosen in cmt_kernels._op._resolved["cpu"].items()}
    steps = Profile(4).over(
        range(0, 50), schedule.schedule(run.run.mid), 1, torch.device("cpu"), "fp32", False, tmp_path
    )
    while next(steps) < 11:
        pass
    assert cmt_kernels._op._resolved["cpu"]["silu"] != before["silu"]
    steps.close()
    assert cmt_kernels._op._resolved["cpu"] == before


def test_the_command_line(capsys):
    arguments = cli.parser("train").parse_args(["train", "digits", "--profile", "--profile-steps", "2"])
    assert arguments.profile and arguments.profile_steps == 2
    assert cli.main(["train", "digits", "--profile", "--profile-steps", "0"]) == 2
    assert "--profile-steps: 0 is not a positive number" in capsys.readouterr().err


def events_of_a_gpu(launch: str) -> EventList:
    """What torch's profiler gives of two steps on a GPU, the first with a rollout that is replayed, in microseconds."""
    GPU, made = DeviceType.CUDA, []

    def event(name, start, stop, id, device=DeviceType.CPU, thread=1, annotation=False):
        made.append(
            FunctionEvent(id, name, thread, start, stop, device_type=device, is_user_annotation=annotation, use_device="cuda")
        )  # fmt: skip
        return made[-1]

    event("teacher", 0, 100, 1, annotation=True)
    event("aten::normal_", 5, 10, 2).append_kernel("normal", 0, 3000.0)
    event("cudaLaunchKernel", 6, 9, 60, thread=777)  # a runtime call has another thread number until it is linked
    event("normal", 1000, 4000, 60, GPU)
    event(launch, 20, 30, 61, thread=777)
    for i in range(4):
        event("kernel", 5000 + 2000 * i, 6000 + 2000 * i, 61, GPU)
    event("teacher", 1000, 13000, 1, GPU, annotation=True)  # the range's shadow on the device is no kernel
    event("op silu", 120, 140, 3, annotation=True)
    event("aten::silu", 121, 139, 4).append_kernel("silu", 0, 2000.0)
    event("silu", 14000, 16000, 62, GPU)
    event("teacher", 200, 210, 5, annotation=True)  # the second step takes points of the round that is there
    event("aten::index", 201, 209, 6).append_kernel("index", 0, 500.0)
    events = EventList(made, use_device="cuda")
    events._build_tree()
    return events


@pytest.mark.parametrize("launch", ["cudaGraphLaunch", "cuGraphLaunch_v12000"])
def test_a_replayed_rollout_is_the_time_of_its_graph(launch):
    silu = Call("silu", True, (0, 0), cases_of("silu").CASES[0], 4)
    found, step_ms = table(events_of_a_gpu(launch), [silu], 0.02, 2, 8, None, cuda=True)
    ms = {(r.part, r.op): r.ms for r in found}
    # a rollout is for 8 steps, the others for the two that were profiled
    assert ms["teacher", GRAPH] == pytest.approx(4 / 8) and ms["teacher", "between ops"] == pytest.approx(3 / 8)
    assert ms["forward", "silu"] == pytest.approx(2 / 2) and ms["step", "points of trajectories"] == pytest.approx(0.25)
    assert ms["step", "host and waiting"] == pytest.approx((20 - 4 - 3 - 2 - 0.5) / 2) and len(ms) == 5
    assert {r.calls for r in found if r.op == GRAPH} == {1 / 8}
    assert sum(ms.values()) == pytest.approx(step_ms) == pytest.approx(13 / 2 + 7 / 8)


@pytest.mark.gpu
def test_on_a_gpu_the_times_are_of_kernels(tmp_path):
    work = Workspace(tiny("digits", *SIZE, "device=cuda"), tmp_path)
    loop.train(work, ["pre"])
    loop.train(work, ["mid"], Profile(3))
    found = rows(work)
    assert found["forward", "linear"]["ms"] > 0 and found["backward", "linear"]["ms"] > 0
    # a replayed rollout calls no op: its kernels are its graph's, launched once for 4 steps; its noise is drawn before it
    assert found["teacher", GRAPH]["calls"] == 1 / 4 and found["teacher", GRAPH]["ms"] > 0
    assert {op for part, op in found if part == "teacher"} & set(cmt_kernels.OPS) == {"random_bits"}
    assert sum(r["share"] for r in found.values()) == pytest.approx(1, abs=0.05)
