"""`python -m bench grid`: cells that are equal in what they say, a machine that is killed and goes on, and its verdict."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml

from bench.grid import advised, cells, collected, command, drawn, judged, machine, questions, tuning
from bench.grid.cells import ALONE, SUITES, Cell, Suite
from bench.grid.machine import Machine
from bench.harness.pages import grid_tables
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.run import validation
from cmt_fast.storage import checkpoint

SMALL = ["data.n=600", "model.width=8", "model.depth=1", "name=short"]
SHORT = Suite({"ve": "short"}, 16, pre=160, mid=160, total=480, n=60)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder, and a suite `short` on points and a network of a few hundred numbers; its cells `pre` and `mid` are in `done`."""
    folder = tmp_path_factory.mktemp("grid")
    file = folder / "short.yaml"
    file.write_text(yaml.safe_dump(loading.dump(loading.load("gmm", SMALL))), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "short", SHORT._replace(recipes={"ve": str(file)}))
        for start in ("pre", "mid"):
            Machine(folder / "done").measure(cell(start))
        yield folder
    cells.base.cache_clear()


def cell(start: str = "mid", seed: int = 0, suite: str = "short", **more) -> Cell:
    return Cell(suite, "ect", "ve", start, "images", seed, 1e-3)._replace(**more)


# ------------------------------------------------------------------------------------------------ what a cell is


def total(one: Cell) -> tuple[int, float]:
    spent = cells.spent(one, cells.run_of(one))
    return sum(spent["images"].values()), sum(spent["forwards"].values())


def test_cells_are_equal_in_images_or_in_forwards():
    one = cell(suite="digits")
    # by hand: mid-training 3,200 (3 + 16/4), ECT 9,600 (3 + 1)
    assert total(one) == (12_800, 3_200 * 7 + 9_600 * 4)
    for kind, path in (("ect", "ve"), ("scd", "ve"), ("imeanflow", "linear")):
        reference = total(one._replace(kind=kind, path=path))[1]
        for start in cells.STARTS:
            mine = one._replace(kind=kind, path=path, start=start)
            assert total(mine)[0] == 12_800
            images, forwards = total(mine._replace(equal="forwards"))
            rounds = 64 * (cells.POOL_STEPS if start == "anchored" else 1)
            each = forwards / images
            assert abs(forwards - reference) <= rounds * each * 1.2 / 2, (kind, start)
            assert images % 64 == 0


def test_a_start_is_what_it_says():
    runs = {start: cells.run_of(cell(start, suite="digits")) for start in cells.STARTS}
    assert [run.post.start for run in runs.values()] == [None, "pre", "mid", "mid"]
    assert [bool(run.post.anchor) for run in runs.values()] == [False, False, False, True]
    objectives = {loading.dump(run)["post"]["objective"]["q"] for run in runs.values()}
    assert objectives == {16.0}  # alike for all, tuned for the control
    assert runs["pre"].post.teacher is None and runs["anchored"].post.teacher == "pre"


@pytest.mark.parametrize("suite", ["digits", "photos"])
def test_every_objective_of_the_shelf_has_cells_that_make_sense(suite):
    """Anchored, an objective has the fewest rows of a batch: what it asks of their number must fit."""
    shape, classes = {"digits": ((1, 8, 8), 10), "photos": ((3, 32, 32), 6)}[suite]
    for kind, path in cells.objectives((), suite):
        validation.check(cells.run_of(cell("anchored", suite=suite, kind=kind, path=path)), shape, classes)


def test_an_objective_that_is_not_in_the_grid_is_named():
    assert ("meanflow", "linear") in cells.objectives() and ("cmt_cm", "ve") not in cells.objectives()
    with pytest.raises(ConfigError, match=r"--kinds: 'ect@linear' is not in the grid of digits; valid are .*meanflow"):
        cells.objectives(["ect@linear"])
    with pytest.raises(ConfigError, match="--question: 'pont' is none; valid are all, points"):
        questions.named("pont")


# ------------------------------------------------------------------------------------------------ the machine


def killed(name: str) -> dict:
    if name == "post":
        raise KeyboardInterrupt
    raise AssertionError(name)


def test_a_killed_cell_goes_on_and_a_done_one_is_read(short, monkeypatch):
    whole = Machine(short / "done").known(cell())
    shutil.copytree(short / "done" / "shared", short / "killed" / "shared")
    first = Machine(short / "killed")
    monkeypatch.setattr(first, "figures", lambda suite, work, name, *_, **__: killed(name))
    with pytest.raises(KeyboardInterrupt):
        first.measure(cell())
    (folder,) = (short / "killed" / "work").iterdir()
    assert checkpoint.complete(folder / "post")  # trained, and not judged
    row = Machine(short / "killed").measure(cell())
    assert (row["starts"], whole["starts"]) == (2, 1)
    assert row["steps"] == whole["steps"] and set(row["steps"]) == {"1", "2"}
    assert {"frechet", "frechet_2"} <= set(row["steps"]["1"])
    assert not folder.exists()
    monkeypatch.setattr(machine.loop, "train", lambda *_: pytest.fail("it is trained again"))
    assert Machine(short / "killed").measure(cell()) == row


def test_cells_share_what_they_begin_from_and_a_changed_run_is_measured_again(short, monkeypatch):
    grid = Machine(short / "done")
    assert [grid.known(cell(start))["parent"].split("-")[0] for start in ("pre", "mid")] == ["pre", "mid"]
    assert len(list((short / "done" / "shared").iterdir())) == 2
    assert not grid.known(cell(lr=2e-3))
    monkeypatch.setitem(SUITES, "short", SUITES["short"]._replace(total=640))
    assert not grid.known(cell())


def test_a_cell_that_is_not_finite_is_a_row(short, monkeypatch):
    grid, seed = Machine(short / "done"), 0

    def train(work, names):
        assert names == ["post"]
        raise FloatingPointError("loss is nan at step 3")

    with monkeypatch.context() as patch:  # the mid-training that it begins with
        patch.setattr(grid, "shared", lambda *_: train(None, ["post"]))
        row = grid.measure(cell("anchored", 1))
        assert row["failed"] and row["parent"] is None
        assert not any((short / "done" / "work").iterdir())
    monkeypatch.setattr(machine.loop, "train", train)
    row = grid.measure(cell("scratch", seed))
    assert row["failed"] == "loss is nan at step 3" and "steps" not in row
    data = json.loads(collected.write(grid, "short", short / "grid.json").read_text("utf-8"))
    assert {r["start"]: "failed" in r for r in data["rows"]} == {
        "pre": False,
        "mid": False,
        "anchored": True,
        "scratch": True,
    }
    table = grid_tables.distances(data)
    assert table.index("failed") < table.index("from `pre`")  # what loses comes first


# ------------------------------------------------------------------------------------------------ rates


class Scores:
    """A machine whose distance is least at one rate."""

    def __init__(self, best: float, fails: float = math.inf) -> None:
        self.best, self.fails, self.asked = best, fails, []

    def measure(self, one: Cell) -> dict:
        self.asked.append((one.start, one.seed, one.lr))
        if one.lr >= self.fails:
            return {"failed": "nan"}
        d = math.exp(abs(math.log(one.lr / self.best)))
        return {"steps": {k: {"frechet": d, "frechet_2": d} for k in ("1", "2")}}


@pytest.mark.parametrize(
    ("best", "fails", "lr", "edge"),
    [
        (2.1e-4, 1, 2e-4, False),
        (1e-2, 1, 3.2e-3, True),
        (9e-4, 1, 8e-4, False),
        (1e-5, 1, 5e-5, True),
        (1e-2, 1e-4, 5e-5, True),
    ],
)
def test_every_start_has_as_many_tries(best, fails, lr, edge):
    for start, searched in tuning.SEARCHED.items():
        tried = Scores(best, fails)
        found = tuning.tuned(tried, "digits", "ect", "ve", start)
        assert found["lr"] == pytest.approx(lr) and found["edge"] is edge
        assert len(tried.asked) == 3 and {(s, seed) for s, seed, _ in tried.asked} == {(searched, tuning.SEED)}


# ------------------------------------------------------------------------------------------------ what it says


def row(kind: str, start: str, seed: int, distance: float, equal: str = "images", second: float | None = None) -> dict:
    figures = {k: {"frechet": distance, "frechet_2": distance if second is None else second} for k in ("1", "2")}
    return {
        "kind": kind, "path": "ve", "start": start, "equal": equal, "seed": seed, "arm": "", "steps": figures,
        "forwards": {"student": 3.0, "teacher": 1.0}, "images": {"post": 64}, "lr": 1e-3, "cpu_s": {"train": 1.0}, "starts": 1,
    }  # fmt: skip


def grid_of(ratios: dict[str, list[float]], second: dict[str, list[float]] | None = None) -> dict:
    """Rows of objectives whose distance from `mid` and anchored over that from `pre` is given, a number a seed."""
    rows = []
    for kind, each in ratios.items():
        for seed, ratio in enumerate(each):
            base = 1.0 + seed
            other = (second or ratios)[kind][seed] * base
            for equal in cells.EQUAL:
                rows += [row(kind, "pre", seed, base, equal), row(kind, "anchored", seed, base * ratio, equal, other)]
            rows.append(row(kind, "mid", seed, base * ratio, second=other))
    lengths = {"total": 640, "mid": 320, "n": 100}
    about = {"device": "a processor", "threads": 1, "torch": "2", "commit": "abc", "date": "2026-01-01", "cpu_s": 36.0}
    return {"suite": "digits", "rows": rows, "lengths": lengths, "shared": [], "floor": None, "rates": [], **about}


def test_an_interval_over_seeds_is_students():
    found = judged.effect([0.5, 0.6, 0.4])
    logs = [math.log(x) for x in (0.5, 0.6, 0.4)]
    mean = sum(logs) / 3
    way = 4.30265 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert found.value == pytest.approx(math.exp(mean)) and found.low == pytest.approx(math.exp(mean - way))
    assert found.high == pytest.approx(math.exp(mean + way)) and found.says == "nearer"
    assert judged.effect([0.5]).says == "open" and judged.effect([]) is None
    assert judged.effect([1.9, 2.0, 2.1]).says == "farther" and judged.effect([0.5, 2.0]).says == "open"
    assert judged.effect([0.5] * 3 + [0.6] * 3).high < judged.effect([0.5] * 2 + [0.6] * 2).high


def test_pairs_are_of_one_seed_and_one_equality():
    data = grid_of({"ect": [0.5, 0.5, 0.5]})
    table = judged.Table(data["rows"])
    assert table.pairs("ect@ve", "mid", "forwards", "1", "frechet") == [0.5, 0.5, 0.5]  # its own cell is that of images
    data["rows"] = [r for r in data["rows"] if not (r["start"] == "pre" and r["seed"] == 1)]
    assert len(judged.Table(data["rows"]).pairs("ect@ve", "mid", "images", "1", "frechet")) == 2


def test_one_objective_that_is_farther_contradicts_the_claim():
    near, far = [0.5, 0.52, 0.48], [1.9, 2.0, 2.1]
    text = grid_tables.verdict(grid_of({"ect": near, "sct": far}))
    assert "does not stand here" in text and "`sct@ve` (from `mid`, equal images, 1 step)" in text
    text = grid_tables.verdict(grid_of({"ect": near, "sct": near}))
    assert "No objective here contradicts" in text and "for 2 of 2" in text and "do not decide" not in text
    text = grid_tables.verdict(grid_of({"ect": near, "sct": [0.5, 1.0, 2.0]}))
    assert "for 1 of 2" in text and "For `sct@ve` the seeds do not decide it" in text
    # the spaces contradict each other: neither for the claim nor against it
    text = grid_tables.verdict(grid_of({"ect": near}, {"ect": far}))
    assert (
        "No objective here contradicts" in text
        and "for 0 of 1" in text
        and "**the spaces contradict each other**" in text
    )
    one = judged.Table(grid_of({"ect": near}, {"ect": [0.5, 1.0, 2.0]})["rows"])
    assert one.says("ect@ve", "mid", "images", "1") == "open"  # nearer in one space alone
    assert "One seed has no interval" in grid_tables.verdict(grid_of({"ect": [0.5]}))


def test_a_cell_that_failed_where_the_control_did_not_is_against_it():
    data = grid_of({"ect": [0.5, 0.52, 0.48]})
    for r in data["rows"]:
        if r["start"] == "mid" and r["seed"] == 2:
            r["failed"] = "nan"
            del r["steps"]
    text = grid_tables.verdict(data)
    assert "does not stand here" in text
    assert "1 seed failed" in grid_tables.ratios(data)


def test_losing_rows_come_first():
    text = grid_tables.ratios(grid_of({"ect": [0.5, 0.52, 0.48], "sct": [1.9, 2.0, 2.1]}))
    assert text.index("`sct@ve`") < text.index("`ect@ve`")
    assert "**2 [1.8, 2.3]**" in text and "| 25% |" in text


def test_every_table_of_the_page_can_be_made(short, monkeypatch):
    page = (Path(grid_tables.__file__).parents[3] / "docs" / "grid.md").read_text("utf-8")
    marks = [mark.removeprefix("grid-") for mark in re.findall("<!-- table: ([a-z-]+) -->", page)]
    assert len(marks) > 8
    monkeypatch.setattr(grid_tables, "PICTURES", short / "pictures")
    assert "Not measured yet: `python -m bench grid digits`" in grid_tables.table(short, "digits")
    for suite in ("digits", "photos"):
        data = {**grid_of({"ect": [0.5, 0.52, 0.48], "sct": [1.9, 2.0, 2.1]}), "suite": suite}
        (short / f"grid-{suite}.json").write_text(json.dumps(data), encoding="utf-8")
        drawn.draw(data, short / "pictures" / f"{suite}.png")
    for mark in marks:
        assert len(grid_tables.table(short, mark)) > 50, mark
    assert (short / "pictures" / "digits.png").stat().st_size > 5_000


def test_questions_are_over_the_grids_own_arm():
    data = grid_of({"ect": [0.5, 0.5, 0.5]})
    own = [r for r in data["rows"] if r["start"] == "mid"]
    arm = [
        {**r, "arm": "points-1", "steps": {k: {m: v * 0.8 for m, v in f.items()} for k, f in r["steps"].items()}}
        for r in own
    ]
    for r in own + arm:
        r["parent"] = "mid-" + ("bb" if r["arm"] else "aa")
    figures = lambda d: {"1": {"frechet": d, "frechet_2": d}}
    data["shared"] = [
        {"stage": "mid", "key": key, "seed": s, "steps": figures(d)}
        for key, d in (("aa", 2.0), ("bb", 1.0))
        for s in range(3)
    ]
    data["rows"] += arm
    found = judged.Arms(data, "points", "ect", "ve", questions.QUESTIONS["points"].arms("digits", "ve"))
    assert found.reference == "4"
    assert found.effect("1", "1", "frechet", "post").value == pytest.approx(0.8)
    assert found.effect("1", "1", "frechet", "mid").value == pytest.approx(0.5)
    assert found.effect("4", "1", "frechet", "post") is None
    assert "Not measured yet" in grid_tables.answers(data) and "| 1 | 0.5 [0.5, 0.5]" in grid_tables.answers(data)
    assert judged.Table(data["rows"]).names == ["ect@ve"]  # arms are none of the grid's rows


def test_the_command_counts_before_it_trains(capsys):
    parser = __import__("argparse").ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["digits", "--kinds", "ect", "--dry-run"])) == 0
    text = capsys.readouterr().out
    assert "pre, forwards: 15,232 post images, 60,928 forwards of the student" in text
    assert "21 cells" in text and "6 cells to find learning rates" in text
    assert ALONE not in text


def test_the_cheapest_arm_that_the_nearest_is_not_told_apart_from_is_advised(short):
    logs = lambda *ratios: [math.log(r) for r in ratios]
    near, alike, far = logs(0.5, 0.52, 0.48), logs(0.55, 0.5, 0.49), logs(1, 1.01, 1)
    assert advised.cheapest({"1": near, "2": alike, "4": far}, {"1": 200, "2": 120, "4": 100}) == "2"
    assert advised.cheapest({"1": near, "4": far}, {"1": 200, "4": 100}) == "1"  # cheaper, and farther
    data = grid_of({"ect": [1.0, 1.0, 1.0]})
    own = [r for r in data["rows"] if r["start"] == "mid"]
    data["rows"] += [{**row("ect", "mid", r["seed"], 0.5 + 0.5 * r["seed"]), "arm": "points-1"} for r in own]
    (found,) = advised.found(data)
    assert (found["key"], found["advised"], found["seeds"]) == ("mid.trajectories.per_trajectory", 1, 3)
    assert found["arms"] == [{"value": 4, "forwards": 4.0, "ratio": [0.5, 0.5, 0.5]}]
    file = short / "advice.json"
    file.write_text(json.dumps([{"suite": "photos"}, {"suite": "digits"}]), encoding="utf-8")
    assert [r["suite"] for r in json.loads(advised.write(data, file).read_text("utf-8"))] == ["photos", "digits"]
    key, values = questions.QUESTIONS["length"].values("digits", "ve")
    assert key == "share" and values["3,200"] == 0.25
    assert questions.QUESTIONS["solver"].values("digits", "linear")[0] == "mid.trajectories.solver"
    assert questions.QUESTIONS["teacher"].values("digits", "ve")[1] == {}  # no key of mid-training
