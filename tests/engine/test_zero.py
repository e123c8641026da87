"""The zero engine beside the local one: loss curves, checkpoints between any two, signals, deaths; and the rule of stages.

Groups of two processes are forked by zero_group.py, once for all tests here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from cmt_fast.config.errors import ConfigError
from cmt_fast.engine import LocalEngine, StageSize, choose, sharding
from cmt_fast.run import resolved
from cmt_fast.runtime import exits
from tests.engine.test_engine import CPU, net, stage
from tests.fixtures import forked
from tests.fixtures.tiny import tiny

GB = 10**9


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    command = [*forked.python(), "-m", "tests.fixtures.zero_group", str(folder)]
    extensions = folder / "extensions"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not extensions.exists(), "DeepSpeed compiled an op of its own"
    return json.loads((folder / "figures.json").read_text())


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", ["denoise", "cmt", "meanflow"])
def test_loss_curves_of_every_stage_are_those_of_the_local_engine(figures, case):
    assert len(figures["curves"][case]) == 4
    for setting, error in figures["curves"][case].items():
        assert max(error.values()) < 1e-6, setting


def test_checkpoints_go_from_any_stage_and_world_size_to_any_other(figures):
    assert len(figures["exchange"]) == 6
    for name, row in figures["exchange"].items():
        assert row["equal"], f"{name}: written again it is another"
        assert row["loss"] < 1e-6, name


def test_resume_at_equal_world_size_is_bit_equal(figures):
    for name in ("zero1-2", "zero3-2"):
        row = figures["exchange"][f"{name} to {name}"]
        assert row["end_equal"] and row["loss"] == 0, name


@pytest.mark.parametrize("engine", [None, 1, 2, 3])
def test_passes_of_micro_batches_give_the_same_gradients(figures, engine):
    assert difference(figures["variants"][f"passes-{engine}"], figures["losses"]["denoise-local-1"]) < 1e-6


def test_bf16_is_the_local_engines_but_for_the_linear_map_of_stage_3(figures):
    """Stage 3 has DeepSpeed's own linear map, which rounds before and after its bias: within bf16's unit roundoff."""
    local, exact = figures["variants"]["bf16-None"], figures["losses"]["meanflow-local-1"]
    assert difference(local, exact) > 1e-6
    for level in (1, 2):
        assert difference(figures["variants"][f"bf16-{level}"], local) < 1e-6, level
    assert 0 < difference(figures["variants"]["bf16-3"], exact) < 2**-8


def test_a_sharded_teacher_rolls_out_in_bf16(figures):
    """Its own forward is under autocast, though DeepSpeed would end one that is entered outside."""
    assert 1e-7 < difference(figures["variants"]["sharded-bf16"], figures["variants"]["sharded"]) < 1e-3


def test_a_sharded_teacher_gives_the_bits_of_a_whole_one(figures):
    """It calls torch's linear map; by DeepSpeed's it would differ in bf16, which is rounded there before the bias is added."""
    assert figures["constrained"]["teacher"] == {"fp32": True, "bf16": True, "bf16 by DeepSpeed's map": False}


def test_a_sharded_teacher_and_recomputed_blocks_change_nothing(figures):
    assert difference(figures["variants"]["sharded"], figures["losses"]["cmt-zero3-2"]) < 1e-6
    assert difference(figures["variants"]["recomputed"], figures["losses"]["meanflow-zero3-2"]) < 1e-6


@pytest.mark.parametrize("level", "0123")
def test_weight_constraints_hold_in_every_stage(figures, level):
    row = figures["constrained"][level]
    assert row["names"] and row["rows"] < 3e-7 and row["error"] < 1e-6


@pytest.mark.parametrize("level", ["edm2-1", "edm2-3"])
def test_edm2_trains_under_every_stage_as_locally(figures, level):
    """After three steps of 1e-2: Adam's first steps are signs, which a gradient near zero may have either way."""
    row = figures["constrained"][level]
    assert row["names"] and row["error"] < 1e-4


def test_no_engine_and_no_sharded_teacher_leaves_anything_in_the_process(figures):
    """DeepSpeed's stage 3 puts a linear map of its own in torch's place for good; it is put back."""
    assert len(figures["left"]) == 11 and figures["left"] == {name: [] for name in figures["left"]}


def test_a_closed_engine_holds_nothing_for_the_next_stage(figures):
    """Of its network's bytes, its sharded teacher's among them: DeepSpeed's caches keep engines as long as a process lives."""
    for level in (1, 3):
        assert figures["constrained"][f"edm2-{level}"]["left"] < 0.1, level
    assert figures["constrained"]["0"]["lent"]


def test_a_rank_holds_what_the_sizing_says(figures):
    """Above what it held before, on a CPU; activations of one row are small beside these weights."""
    for name, row in figures["held"].items():
        for phase, measured in row["measured"].items():
            assert row["sizing"][phase] == pytest.approx(measured, rel=0.15), f"{name}: {phase}"
    assert figures["held"]["zero3-2"]["measured"]["start"] < 0.7 * figures["held"]["local-2"]["measured"]["start"]


def test_weights_are_the_same_bits_whatever_holds_them(figures):
    """At the start for any engine; after two steps on as many ranks, as two addends have one order."""
    for when in ("start", "end"):
        assert len({row["sums"][when] for row in figures["held"].values()}) == 1, when


def test_sigkill_while_two_ranks_save_leaves_the_old_checkpoint(figures):
    killed = figures["killed"]
    assert killed["codes"]["0"] == -9 and killed["left"] == [2] and killed["equal"]


def test_one_rank_reads_a_checkpoint_and_what_it_finds_damaged_all_pass_over(figures):
    """Every file that is needed once, by the first rank alone; its verdict is every rank's."""
    first, second = figures["killed"]["damaged"]
    wrong = "/pre/checkpoints/step-00000004/optimizer.safetensors: does not match its checksum"
    for said in (first, second):
        assert said["error"] == wrong and said["steps"] == [4, 2]
    assert first["read"] == [1.0, 1.0] and second["read"] == [0.0, 0.0]


def test_a_full_disk_of_the_first_rank_is_every_ranks(figures):
    """The first save of the killed run waited for room, on both; where there is none, both give up, with the same words."""
    assert figures["killed"]["left"] == [2]
    first, second = (said["full"] for said in figures["killed"]["damaged"])
    assert (
        first == second
        and len(first) == 2
        and all(needed > 10_000 and free and not left for needed, free, left in first)
    )


def test_a_signal_on_one_rank_stops_all_within_a_row_and_the_row_goes_on(figures):
    stopped = figures["stopped"]
    assert set(stopped["codes"].values()) == {128 + 10} and stopped["step"] == 3
    assert "to resume" in stopped["said"]
    assert stopped["equal"] and stopped["losses"][0] == stopped["losses"][1]


def test_an_evaluation_that_fails_on_one_rank_is_left_by_both(figures):
    found = figures["one_fails"]
    assert found["done"] and found["kinds"].count("failed") == 2 and found["kinds"].count("train") == 4
    assert set(found["said"]) == {"another process could not judge, its output says why"}


@pytest.mark.parametrize(
    "what, words", [("dead", "another process died"), ("hung", "another process is dead or hangs")]
)
def test_a_lost_rank_is_one_line(figures, what, words):
    assert figures[what]["codes"]["0"] == exits.PEER_LOST and figures[what]["codes"]["1"] == -9
    said = figures[what]["said"]
    assert said.startswith(f"cmt: {words}") and ("none came from rank 1" in said) == (what == "hung"), said


def test_the_deepspeed_launcher_starts_the_command(tmp_path):
    pytest.importorskip("deepspeed")
    start = f"import sys; sys.executable = {forked.executable()!r}"  # by which it starts its ranks
    code = f"{start}; from deepspeed.launcher.launch import main; main()"
    world = "eyJsb2NhbGhvc3QiOiBbMCwgMV19"  # {"localhost": [0, 1]}, as its own front end passes it
    command = [sys.executable, "-c", code, f"--world_info={world}", "--master_port=29617", "--module", "cmt_fast"]
    done = subprocess.run(
        [*command, "train", "gmm", "--dry-run", "device=cpu", "engine=zero", "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "engine: zero, stage 1" in done.stdout and "on 2 processes" in done.stdout


def test_passes_in_the_local_engine_sum_to_the_whole_batch():
    whole, parts = (
        LocalEngine(net(), stage(grad_clip_norm=0.0), CPU),
        LocalEngine(net(), stage(grad_clip_norm=0.0), CPU, grad_accum_steps=4),
    )
    x = torch.randn(16, 5)
    whole.backward(whole(x).square().mean())
    for rows in x.split(4):
        parts.backward(parts(rows).square().mean())
    assert torch.allclose(whole.g, parts.g, rtol=1e-5, atol=1e-8)


def test_passes_of_a_recipe():
    assert resolved.resolve(tiny(), "pre").grad_accum_steps(1) == 1
    assert resolved.resolve(tiny("digits", "pre.micro_batch=8"), "pre").grad_accum_steps(2) == 2
    assert resolved.resolve(tiny("digits", "pre.micro_batch=64"), "pre").grad_accum_steps(2) == 1
    for more, processes, key in (
        (["pre.batch=30"], 4, "pre.batch: 30 does not divide over 4 processes"),
        (["pre.micro_batch=5"], 2, "pre.micro_batch: 5 does not divide a process's 16 rows"),
    ):
        with pytest.raises(ConfigError, match=key):
            resolved.resolve(tiny("digits", *more), "pre").grad_accum_steps(processes)
    with pytest.raises(ConfigError, match="post.objective.ratio: 0.25 of 8 rows are 2 rows with tangents"):
        resolved.resolve(tiny("digits-mf"), "post").grad_accum_steps(8)


@pytest.mark.parametrize(
    "parameters, teacher, processes, memory, stage, sharded",
    [
        (675e6, 675e6, 1, 80, 0, False),
        (675e6, 675e6, 8, 80, 1, False),
        (4.75e9, 0, 8, 80, 2, False),
        (5e9, 0, 8, 80, 3, False),
        (12e9, 0, 64, 80, 3, False),
        (12e9, 12e9, 64, 80, 3, True),
    ],
)
def test_the_rule_of_stages(parameters, teacher, processes, memory, stage, sharded):
    c = choose("zero", "auto", "auto", StageSize(int(parameters), int(teacher), 1, False), processes, memory * GB)
    assert (c.stage, c.teacher_sharded) == (stage, sharded), c.why
    assert "states may take" in c.why and f"stage {stage}" in c.why


def test_memory_by_the_table_and_what_is_asked_for():
    assert sharding.state_bytes(None, 100, 1, 1, False) == 2000
    assert sharding.state_bytes(1, 100, 4, 2, False) == 800 + 500
    assert sharding.state_bytes(3, 100, 4, 1, True) == 600
    forced = choose("zero", 2, "sharded", StageSize(10**6, 10**6, 1, False), 2, GB)
    assert (forced.stage, forced.teacher_sharded, forced.teacher_bytes) == (2, True, 2 * 10**6)
    assert choose("local", "auto", "auto", StageSize(10**6, 0, 1, False), 4, GB).stage is None


def test_each_stage_is_given_only_where_it_fits():
    small = choose("zero", "auto", "auto", StageSize(10**9, 0, 1, False), 2, 10 * GB)
    assert small.stage == 3 and "more than the 6.0 GB" in small.why


def test_nan_on_one_rank_of_two_is_one_decision_and_changes_nothing(figures):
    """A sample of `python -m bench nonfinite`: the same words and exit code, the state of before, the layer by replay too."""
    assert figures["nonfinite"]["faults"] == [] and figures["nonfinite"]["held"] == 2
