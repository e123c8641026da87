"""`cmt estimate`: every recipe, the table of savings, the arithmetic by hand, and the figures of docker/README.md."""

from __future__ import annotations

import json
import re

import pytest

from cmt_fast.cli import estimate as command
from cmt_fast.cli import main
from cmt_fast.config import loading, recipes
from cmt_fast.cost import activations, estimate, savings
from cmt_fast.cost.hardware import CARDS
from tests.fixtures.commands import ROOT


@pytest.fixture(scope="module")
def figures():
    """recipe -> its figures on eight H100, one for what does not divide over eight.

    Activations are counted for the largest and the smallest recipe, and made up for the others: a count takes a second.
    """
    made: dict[str, dict] = {}

    def of(name: str) -> dict:
        if name not in made:
            gpus = 1 if name.startswith(("digits", "gmm")) else 8
            with pytest.MonkeyPatch.context() as patch:
                if name not in ("imagenet512-ecd", "gmm"):
                    patch.setattr(activations, "of_model", lambda *of: activations.Kept(1e6, 1e6))
                    patch.setattr(activations, "of_features", lambda *of: activations.Kept(1e6, 0))
                    patch.setattr(activations, "working", lambda *of: 1e5)
                made[name] = command.figures(loading.load(name), CARDS["h100"], gpus)
        return made[name]

    return of


@pytest.mark.parametrize("name", sorted(recipes.recipes()))
def test_every_recipe(name, figures):
    found = figures(name)
    json.dumps(found)
    printed = "\n".join(command.text(found) + command.explained(found))
    assert "PREDICTED" in printed and "nan" not in printed
    for stage in found["stages"].values():
        assert stage["gpu_hours"] > 0 and stage["mark"] == "predicted" and 0 < stage["mfu_datasheet"] < 1
        assert stage["kwh"] == pytest.approx(stage["gpu_hours"] * 0.7 * estimate.POWER)
        assert stage["memory"]["fits"] and stage["memory"]["bytes"] < stage["memory"]["limit"]
        assert (stage["cache"] is not None) == any(t["rows"] for t in stage["work"])
    total = found["total"]
    assert total["gpu_hours"] == pytest.approx(sum(found["stages"][n]["gpu_hours"] for n in ("mid", "post")))
    rows = {line["what"].split(":")[0]: line for line in found["savings"]}
    ours = rows[savings.RECIPE]
    assert ours["gpu_hours"] == pytest.approx(total["gpu_hours"]) and ours["ratio"] == 1
    without = rows["without points reused"]
    assert without["flops_image"] > ours["flops_image"] and without["gpu_hours"] > ours["gpu_hours"]
    assert rows["without the kernels"]["gpu_hours"] > ours["gpu_hours"]
    assert rows["without the kernels"]["flops_image"] == ours["flops_image"]
    assert rows["with trajectories from a cache on disk"]["flops_image"] < ours["flops_image"]
    assert ("without selective tangents" in rows) == (
        loading.load(name).post.objective.kind in ("meanflow", "imeanflow")
    )
    if "with bf16 in mid-training, where targets are fixed" in rows:
        assert rows["with bf16 in mid-training, where targets are fixed"]["gpu_hours"] < ours["gpu_hours"]
    if "without bf16" in rows:
        assert rows["without bf16"]["gpu_hours"] > ours["gpu_hours"]
    for line in found["savings"]:
        if line["gpu_hours"]:
            assert line["ratio"] == pytest.approx(line["gpu_hours"] / ours["gpu_hours"])


def test_the_arithmetic_can_be_done_by_hand(figures):
    """Each printed product and quotient gives its printed result, and the results add up to the stage's hours."""
    found = figures("imagenet512-ecd")
    number = r"[\d,]+(?:\.\d+)?"
    value = lambda text: float(text.replace(",", ""))
    for stage in found["stages"].values():
        us = 0.0
        for line in stage["lines"][:-2]:
            times, took = re.match(rf"({number}) x .*?\): ({number}) us = ", line).groups()
            gflop, share, rate = re.search(
                rf"\[({number}) GFLOP / \(({number}) x ({number}) TFLOP/s\)\]", line
            ).groups()
            mine = value(times) * value(gflop) * 1e3 / (value(share) * value(rate))
            weights = re.search(rf"({number}) GB of weights / ({number}) TB/s / (\d+) rows", line)
            if weights:
                gb, tb, rows = map(value, weights.groups())
                mine += value(times) * gb * 1e3 / tb / rows
            assert value(took) == pytest.approx(mine, rel=2e-3)
            us += value(took)
        parts = re.match(
            rf"step: (\d+)/(\d+) rows x ({number}) us \+ optimizer ({number}) us \+ communication ({number}) us = ({number})",
            stage["lines"][-2],
        )
        batch, cards, each, optimizer, sent, step = map(value, parts.groups())
        assert each == pytest.approx(us, rel=1e-4)
        assert batch / cards * each + optimizer + sent == pytest.approx(step, rel=1e-4)
        steps, hours = (value(stage["lines"][-1].split(sep)[0].split("= ")[-1]) for sep in (" steps", " h x"))
        assert steps * step / 3.6e9 == pytest.approx(hours, rel=1e-3) == stage["hours"]


def test_published_budgets(figures):
    rows = {line["what"]: line for line in figures("imagenet512-ecd")["savings"]}
    ecd, whole = rows["ECD alone"], rows["CMT + ECD as published"]
    assert whole["images"] == 28_800_000 and ecd["images"] == 409_600_000 == rows["sCD"]["images"]
    assert ecd["images"] / whole["images"] == pytest.approx(14.2, abs=0.03)  # 93 % less
    # published: 5.7e19 FLOP in mid-training and 1.2e20 after it
    assert whole["flops_image"] * whole["images"] == pytest.approx(5.7e19 + 1.2e20, rel=0.03)
    meanflow = {line["what"]: line for line in figures("imagenet256-mf")["savings"]}
    assert (
        meanflow["MeanFlow from nothing"]["reported_hours"]
        == 2 * meanflow["CMT + MeanFlow as published"]["reported_hours"]
    )


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", "gmm", "--price", "2", "--explain"]) == 0
    printed = capsys.readouterr().out
    assert "mid + post" in printed and "store: unknown (no store)" in printed and "steps x" in printed
    assert main(["estimate", "gmm", "mid.images_nimg=256000", "--json", "--price", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stages"]["mid"]["images"] == 256000 and found["total"]["price"] == 2 * found["total"]["gpu_hours"]


def test_a_dry_run_names_work_and_hours(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = lambda: [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("work:")]
    assert main(["train", "gmm", "--dry-run", "device=cpu"]) == 0
    without = lines()
    assert len(without) == 4 and all("FLOP an image" in line and " h on " not in line for line in without)
    folder = tmp_path / "bench/results/cpu"
    folder.mkdir(parents=True)
    (folder / "ops.json").write_text(json.dumps({"roof": {"gb_s": 30.0, "gflop_s": 300.0}, "commit": "abc1234"}))
    assert main(["train", "gmm", "--dry-run", "device=cpu"]) == 0
    found = lines()
    assert [line.partition(";")[0] for line in found] == without
    assert all(line.endswith("h on 1 x cpu (predicted)") for line in found)
    assert main(["estimate", "gmm", "--gpu", "cpu"]) == 0
    assert "cpu/ops.json at abc1234" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, error",
    [(["gmm", "--gpu", "h20"], "--gpu: 'h20' is not valid.*did you mean h200"), (["gmm", "--gpus", "0"], "--gpus: 0"),
     (["gmm", "--results", "nowhere"], "--results: 'nowhere' is not a folder"), (["gm"], "did you mean gmm"),
     (["gmm", "--price", "nan"], "--price: nan is not valid"), (["gmm", "--price", "-3"], "--price: -3.0 is not valid"),
     (["gmm", "--gpus", "7"], "batch: 512 does not divide over 7")],
)  # fmt: skip
def test_wrong_input(arguments, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *arguments]) == 2
    assert re.search(error, capsys.readouterr().err)


def test_figures_of_the_docker_page(figures):
    """What the page names in its table is what the command prints, to the digits that stand there."""
    page = (ROOT / "docker/README.md").read_text("utf-8")
    found = figures("imagenet512-ecd")
    row = lambda start: [cell.strip() for cell in re.search(rf"^\| {start}.*$", page, re.M)[0].split("|")[2:-1]]
    assert float(row("store of latents")[0]) == round(found["store"]["bytes"] / 1e9)
    for name, start in (("mid", "mid-training"), ("post", "post-training")):
        disk, hours, _ = row(start)
        assert float(disk) == round(found["stages"][name]["checkpoints_bytes"] / 1e9)
        assert float(hours) == round(found["stages"][name]["hours"])
    classifier = re.search(r"some (\d+) hours of one GPU, predicted", page)
    assert float(classifier[1]) == round(found["classifier"]["gpu_hours"], -1)
    student, guide = (found["stages"]["post"]["networks"][of]["parameters"] for of in ("student", "guide"))
    files, imported = map(float, row("teacher and guide")[0].split(" + "))
    assert files == round(2 * (2 * student + guide) / 1e9)  # fp16
    assert imported == round((4 + 2 * 4) * (2 * student + guide) / 1e9)  # fp32 and two EMA tracks
    stop = re.search(r"(\d+) GB to a disk of 2 GB/s are (\d+) of them", page)
    assert float(stop[1]) == round(found["stages"]["post"]["checkpoints_bytes"] / 3e9) == 2 * float(stop[2])


def test_what_is_paid_beside_hours_is_named(figures):
    """Of the ImageNet-512 recipe: copies of the teacher, a cache nobody wrote, activations, and no fewer parts than there are."""
    mid, post = (figures("imagenet512-ecd")["stages"][name] for name in ("mid", "post"))
    parts = {p["what"]: p["bytes"] for p in mid["memory"]["parts"]}
    assert (
        parts["teacher's copies in bf16"] * 2
        == parts["teacher and guide"]
        == 4 * mid["networks"]["student"]["parameters"]
    )
    assert {
        "buckets, casts and what else a step makes of weights",
        "the averaged network",
        "activations of 16 rows",
        "rollouts, 16 at once",
        "pool of 128 trajectories",
    } <= set(parts)
    assert mid["cache"]["trajectories"] == 800_000 and "445.7 GB" in mid["disk_line"] and post["cache"] is None
    printed = "\n".join(command.text(figures("imagenet512-ecd")))
    assert "a process: " in printed and "fits in the 74.4 GB that are usable (predicted)" in printed
