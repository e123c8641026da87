"""The solver chosen by measurement: estimates beside the truth on the mixture, the choice, and `nfe: auto` in a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from cmt_fast.cli import main
from cmt_fast.config.schema import Gmm, Trajectories
from cmt_fast.data.gmm import Exact
from cmt_fast.diffusion import solvers
from cmt_fast.diffusion.paths import ProbabilityPath
from cmt_fast.report import sections
from cmt_fast.run import resolved
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint, sound
from cmt_fast.teacher import solver_error, solver_record
from cmt_fast.teacher.solver_error import Endpoints, Estimate, Solver
from cmt_fast.train import loop, solver_choice
from cmt_fast.train import steps as taking
from tests.fixtures.tiny import tiny
from tests.train.test_resume import assert_equal_stage

MIXTURE = Gmm(components=6, radius=1.0, std=0.25)
NFE = (4, 6, 8, 16, 32, 64)


def how(path: str) -> Trajectories:
    return Trajectories() if path == "ve" else Trajectories(solver="heun", t_max=1.0, t_min=0.0)


@functools.cache
def world(path: str) -> tuple[Endpoints, torch.Tensor]:
    """Rollouts of the closed form in float64, and where its ODE really ends."""
    c, net = how(path), Exact(MIXTURE, ProbabilityPath(path))
    x, labels = solver_error.starts(net.path, c, (2,), 0, 0, "cpu", 128)
    x = x.double()
    return Endpoints(net, net.path, x, labels, c), net.flow_map(x, c.t_max, c.t_min, steps=2048)


# ------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize("path", ["ve", "linear"])
def test_estimates_are_within_a_factor_of_two_of_the_truth(path: str) -> None:
    """Orders 1 to 3 and Heun, 4 to 64 calls, where they are asymptotic and where they are not."""
    ends, true = world(path)
    inside = []
    for setting in solver_error.settings(path, how(path), grids=True):
        for nfe in NFE if setting.shift == 1 else (4, 16):
            e = ends.estimate(setting, nfe)
            error = ends.distance(e, true)
            assert 0.5 < e.error / error < 2, (e, error)
            assert 0 <= e.low <= e.error <= e.high
            inside.append(e.low <= error <= e.high)
    assert len(inside) >= 24 and sum(inside) >= 0.95 * len(inside)


def test_the_truth_is_finer_than_any_estimate() -> None:
    """Another solver and more steps agree with it to a hundredth of the smallest error in the table."""
    for path in ("ve", "linear"):
        ends, true = world(path)
        smallest = min(ends.estimate(s, 64).error for s in solver_error.settings(path, how(path)))
        other = ends.at(Solver("dpmpp", 2, 1.0), 3000)
        assert float((other - true).square().mean().sqrt()) < smallest / 100


def test_observed_orders() -> None:
    """1 and 2 for orders 1 and 2; an order is not believed where the differences turn round, as between 4 and 8 calls."""
    ends, _ = world("ve")
    order = lambda k, nfe: ends.estimate(Solver("dpmpp", k, 1.0), nfe)
    assert order(1, 64).observed == pytest.approx(1, abs=0.1) and order(2, 64).observed == pytest.approx(2, abs=0.2)
    assert order(3, 64).clean and not order(3, 4).clean and not order(2, 4).clean


def test_rollouts_are_shared_and_counted() -> None:
    c, net = how("ve"), Exact(MIXTURE, ProbabilityPath("ve"))
    x, _ = solver_error.starts(net.path, c, (2,), 0, 0, "cpu", 16)
    ends = Endpoints(net, net.path, x.double(), None, c)
    candidates = [(Solver("dpmpp", 2, 1.0), n) for n in (4, 8, 16, 6)]
    for setting, nfe in candidates:
        ends.estimate(setting, nfe)
    assert ends.calls == solver_error.calls(candidates) == 4 + 8 + 16 + 32 + 64 + 6 + 12 + 24


def test_starts_are_a_function_of_the_seed() -> None:
    draw = lambda seed, n: solver_error.starts(ProbabilityPath("ve"), how("ve"), (2,), 10, seed, "cpu", n)
    assert torch.equal(draw(0, 16)[0], draw(0, 32)[0][:16]) and torch.equal(draw(0, 16)[1], draw(0, 32)[1][:16])
    assert not torch.equal(draw(0, 16)[0], draw(1, 16)[0])
    assert 60 < float(draw(0, 4096)[0].std()) < 100 and set(draw(0, 4096)[1].tolist()) == set(range(10))


def test_a_teacher_that_is_not_finite_is_never_chosen() -> None:
    broken = lambda x, t, r, labels: x * math.nan
    x, _ = solver_error.starts(ProbabilityPath("ve"), how("ve"), (2,), 0, 0, "cpu", 16)
    ends = Endpoints(broken, ProbabilityPath("ve"), x, None, how("ve"))
    with pytest.raises(FloatingPointError, match="not finite"):
        solver_error.choose(ends, [(Solver("dpmpp", 1, 1.0), 4)], 1e9, False)


# ------------------------------------------------------------------------------------------ the choice


def test_a_planted_worse_solver_is_not_chosen(monkeypatch) -> None:
    """Order 3 whose rows are secretly of order 1 passes for what it does, not for its name."""
    candidates = [(Solver("dpmpp", k, 1.0), n) for n in (8, 12, 16, 32, 64) for k in (2, 3)]
    limit = 0.01
    honest = solver_error.choose(Endpoints(*parts()), candidates, limit, False)[1]
    assert (honest.setting.order, honest.nfe) == (3, 16)
    real = solvers.table
    monkeypatch.setattr(
        solver_error, "table", lambda p, s, n, a, b, order, shift: real(p, s, n, a, b, {3: 1}.get(order, order), shift)
    )
    _, planted = solver_error.choose(Endpoints(*parts()), candidates, limit, False)
    assert planted.setting.order == 2 and planted.nfe == 32 and planted.high <= limit


def test_a_solver_that_converges_elsewhere_shows_in_the_common_limit(monkeypatch) -> None:
    real = solvers.table

    def early(p, s, n, a, b, order, shift):
        return real(p, s, n, a, 0.3 if order == 3 else b, order, shift)

    monkeypatch.setattr(solver_error, "table", early)
    ends = Endpoints(*parts())
    e, other = (ends.estimate(Solver("dpmpp", k, 1.0), 32) for k in (3, 2))
    limit, _, _ = ends.limit(other.setting, 32)
    assert ends.distance(other, limit) < 2 * other.error and ends.distance(e, limit) > 20 * e.error


def parts() -> tuple:
    c, net = dataclasses.replace(how("ve"), per_trajectory=1), Exact(MIXTURE, ProbabilityPath("ve"))
    return net, net.path, solver_error.starts(net.path, c, (2,), 0, 0, "cpu", 64)[0].double(), None, c


def test_cheapest_counts_calls_for_a_row_then_errors() -> None:
    row = lambda cost, high: Estimate(Solver("dpmpp", 2, 1.0), 8, cost, high / 2, 0.0, high, 2.0, True)
    rows = [row(2.0, 0.2), row(1.0, 0.5), row(1.0, 0.4), row(0.5, 0.6)]
    assert solver_error.cheapest(rows, 0.5) == rows[2] and solver_error.cheapest(rows, 0.3) == rows[0]
    assert solver_error.cheapest(rows, 0.1) is None and solver_error.best(rows) == rows[0]


def test_cost_is_what_a_student_row_takes_of_the_teacher() -> None:
    """All points drawn: one call a row whatever the nfe, Heun two; four drawn: nfe over four; pairs: over their number."""
    net, path, x, labels, c = parts()
    cost = lambda solver, nfe, **more: Endpoints(net, path, x, labels, dataclasses.replace(c, **more)).cost(solver, nfe)
    euler, heun = Solver("dpmpp", 1, 1.0), Solver("heun", 2, 1.0)
    assert [cost(euler, n, per_trajectory=16) for n in (4, 16, 32)] == [1, 1, 2]
    assert cost(heun, 16, per_trajectory=16) == 2 and cost(heun, 16) == 16
    assert [cost(euler, n, per_trajectory=4) for n in (4, 8, 16)] == [1, 2, 4]
    assert cost(euler, 32, mode="paper") == 1 and cost(heun, 32, mode="paper") == 2
    assert Endpoints(net, ProbabilityPath("linear"), x, labels, how("linear")).cost(heun, 8) == 0.5


def test_only_what_fills_the_batch_is_a_candidate() -> None:
    run = tiny("digits", "mid.trajectories.nfe=auto", "mid.trajectories.per_trajectory=16", "mid.batch=48")
    assert {n for _, n in resolved.resolve(run, "mid").candidates()} == {4, 6, 8, 12, 16, 24, 32, 48, 64}
    run = tiny("digits", "mid.trajectories.nfe=auto", "mid.trajectories.per_trajectory=16")  # 32 rows x 4 steps
    # a Heun trajectory of 2n calls has n nodes
    found = resolved.resolve(run, "mid").candidates()
    assert {n for s, n in found if s.solver == "dpmpp"} == {4, 8, 16, 24, 32, 48, 64}
    assert {n for s, n in found if s.solver == "heun"} == {4, 8, 16, 32, 48, 64}
    paper = tiny("digits", "mid.trajectories.nfe=auto", "mid.trajectories.mode=paper")
    assert {n for s, n in resolved.resolve(paper, "mid").candidates() if s.solver == "dpmpp"} == {4, 8, 16, 32}
    assert {
        s.solver for s, _ in resolved.resolve(tiny("digits-mf", "mid.trajectories.nfe=auto"), "mid").candidates()
    } == {
        "dpmpp",
        "heun",
    }
    assert solver_error.settings("linear", dataclasses.replace(how("linear"), solver="jump")) == [
        Solver("jump", 3, 1.0)
    ]


# ------------------------------------------------------------------------------------------ auto in a run

AUTO = ("mid.trajectories.nfe=auto", "post.trajectories.nfe=auto", "mid.checkpoint_every_nimg=160")


@pytest.fixture(scope="module", autouse=True)
def few_trajectories():
    """A quarter of the trajectories: a tiny network's errors are as broad as they are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            solver_choice,
            "measure",
            functools.partial(solver_choice.measure, search=solver_choice.Search(16, (4, 8, 16))),
        )
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose mid- and post-training chose their solvers."""
    out = tmp_path_factory.mktemp("auto") / "run"
    loop.train(Workspace(tiny("digits", *AUTO), out), ["pre", "mid", "post"])
    return out


def test_auto_is_settled_written_and_used(finished) -> None:
    work = Workspace(tiny("digits", *AUTO), finished)
    for name in ("mid", "post"):
        kept = solver_record.read(finished / name)
        settled = solver_record.settled(finished / name, work.run.stages[name].trajectories)
        assert settled.nfe in (4, 8, 16) and {k: getattr(settled, k) for k in kept.choice} == kept.choice
        manifest = checkpoint.complete(finished / name).manifest
        assert manifest["others"]["trajectories"] == kept.choice
        assert (
            kept.networks["teacher"]
            == checkpoint.complete(finished / "pre").manifest["files"]["ema-0.safetensors"]["xxh3_128"]
        )
        assert kept.trajectories == 16 and kept.calls > 0 and kept.epsilon["value"] > 0
        if kept.serves:
            row = next(r for r in kept.rows if all(r[k] == v for k, v in kept.choice.items()))
            assert row["high"] <= kept.limit == pytest.approx(solver_error.MARGIN * math.sqrt(kept.epsilon["value"]))
    assert "extrapolated to 20 steps from pilots of 2 and 4" in solver_record.read(finished / "mid").epsilon["source"]
    assert solver_record.read(finished / "post").epsilon["source"] == "measured of mid"


def test_the_bound_on_the_bias_is_told_beside_that_of_the_diffusion_model(finished) -> None:
    """By hand: E|D(x_T, T) - Psi(x_T)|^2 of the pre-trained network, and the student's error plus the solver's."""
    work, kept = Workspace(tiny("digits", *AUTO), finished), solver_record.read(finished / "mid")
    ends = solver_choice.endpoints(work, work.stage("mid"), lambda calls: None, 16)
    sure = solver_error.best(ends.estimate(s, n) for s, n in work.stage("mid").candidates((4, 8, 16)) if n == 16)
    t = torch.full((16,), 80.0)
    with torch.no_grad():
        far = work.network("pre")(ends.x, t, t, ends.labels).double().flatten(1) - ends.limit(sure.setting, 16)[0]
    bound = kept.epsilon["bias"]
    chosen = next(r for r in kept.rows if all(r[k] == v for k, v in kept.choice.items()))
    assert bound["before"] == pytest.approx(float(far.square().mean()), rel=1e-5)
    assert bound["after"] == pytest.approx(kept.epsilon["value"] + chosen["error"] ** 2) and bound["start"] == "pre"
    (line,) = [line for line in solver_choice.summary("mid", kept) if line.startswith("theory")]
    assert f"leaves {bound['after'] / bound['before']:.2g} of the bound" in line
    post = solver_record.read(finished / "post")
    assert "bias" not in post.epsilon and not any("theory" in line for line in solver_choice.summary("post", post))


@pytest.mark.parametrize("when", ["after the choice", "after a checkpoint"])
def test_a_killed_run_keeps_its_choice_and_ends_bit_equal(when, finished, tmp_path, monkeypatch) -> None:
    """The choice is made once, whatever a second measurement would say."""
    import shutil

    out, run = tmp_path / "run", tiny("digits", *AUTO)
    shutil.copytree(finished / "pre", out / "pre")
    shutil.copy(finished / "run.json", out)

    def killed(*_, **__):
        raise KeyboardInterrupt

    real, saves = taking._save, []
    save = lambda *a, **k: (real(*a, **k), saves.append(1), killed() if len(saves) == 2 else None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            *(
                (loop, "batches", SimpleNamespace(provider=killed))
                if when == "after the choice"
                else (taking, "_save", save)
            )
        )
        loop.train(Workspace(run, out), ["mid"])
    assert solver_record.read(out / "mid") == solver_record.read(finished / "mid")
    assert bool(checkpoint.steps(out / "mid")) == (when == "after a checkpoint")
    monkeypatch.setattr(solver_choice, "measure", killed)
    loop.train(Workspace(run, out), ["mid"])
    assert_equal_stage(out / "mid", finished / "mid")


def test_a_choice_that_was_made_with_another_teacher(finished, tmp_path) -> None:
    """Before the stage begins it is made anew, after that refused; and so is a choice that was tampered with."""
    import shutil

    out, run = tmp_path / "run", tiny("digits", *AUTO)
    shutil.copytree(finished, out)
    kept = json.loads((out / "mid" / solver_record.FILE).read_text())
    (out / "mid" / solver_record.FILE).write_text(sound.signed({**kept, "networks": {"teacher": "0"}}))
    work = Workspace(run, out)
    with pytest.raises(ValueError, match="mid.teacher.*was measured with"):
        solver_choice.settle(work, work.stage("mid"))
    shutil.rmtree(out / "mid" / "checkpoints")
    assert solver_choice.settle(work, work.stage("mid")) == {"trajectories": kept["choice"]}
    (out / "mid" / solver_record.FILE).write_text("{")
    with pytest.raises(ValueError, match="solver.json.*cannot be read"):
        solver_choice.settle(work, work.stage("mid"))


def test_auto_equals_the_same_numbers_typed(finished, tmp_path) -> None:
    import shutil

    kept = solver_record.read(finished / "mid")
    run = tiny("digits", *AUTO[2:], *solver_record.override("mid", kept.choice).split())
    shutil.copytree(finished / "pre", tmp_path / "pre")
    loop.train(Workspace(run, tmp_path), ["mid"])
    assert_equal_stage(tmp_path / "mid", finished / "mid")


def test_linear_flow(tmp_path) -> None:
    work = Workspace(tiny("digits-mf", "mid.trajectories.nfe=auto"), tmp_path)
    loop.train(work, ["pre", "mid"])
    kept = solver_record.read(tmp_path / "mid")
    assert kept.choice["shift"] == 1.0 and {"heun", "dpmpp"} == {r["solver"] for r in kept.rows}
    assert checkpoint.complete(tmp_path / "mid").manifest["done"]


def test_report_and_dry_run_show_it(finished, capsys) -> None:
    kept = solver_record.read(finished / "mid")
    section = sections.solvers({"mid": (kept, solver_choice.summary("mid", kept))})
    assert len(section.groups[0].items[0].rows) == len(kept.rows) and "epsilon" in " ".join(section.text)
    arguments = ["train", "digits", *(a for a in small() if a), "--dry-run"]
    assert main([*arguments, "--out", str(finished)]) == 0
    assert f"nfe auto was resolved: {solver_record.override('mid', kept.choice)}" in capsys.readouterr().out
    assert main([*arguments, "--out", str(finished.parent / "none")]) == 0
    assert "nfe auto is resolved when the stage begins; counted here with 16" in capsys.readouterr().out


def small() -> list[str]:
    from tests.fixtures.tiny import NO_EVAL, SMALL

    return [*SMALL, *NO_EVAL, *AUTO]


def test_the_command_on_a_run(finished, tmp_path, capsys) -> None:
    """It measures the finished student instead of a pilot, and proposes what a recipe takes."""
    file = tmp_path / "t.json"
    common = ["--trajectories", "8", "--nfe", "4,8"]
    assert main(["tune-teacher", str(finished), *common, "--json", str(file)]) == 0
    figures, out = json.loads(file.read_text()), capsys.readouterr().out
    assert figures["epsilon"]["source"] == "measured of mid" and "mid.trajectories.nfe=" in out.splitlines()[-1]
    assert main(["tune-teacher", str(finished), *common, "--epsilon", "1e-12", "--all"]) == 0
    out = capsys.readouterr().out
    assert "ABOVE" in out and "as given" in out


def test_the_command_on_the_mixture(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "t.json"
    assert main(["tune-teacher", "gmm", "--trajectories", "16", "--nfe", "8,16", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["paths"]
    for rows in (figures[p]["rows"] for p in ("ve", "linear")):
        assert len(rows) == 8 and all(0.5 < r["error"] / r["true"] < 2 for r in rows)
    assert "estimate / true" in capsys.readouterr().out and list(tmp_path.iterdir()) == [file]


BAD = [
    (["train", "digits", "mid.trajectories.nfe=atuo"], ["mid.trajectories.nfe", "atuo", "auto"]),
    (["train", "digits", "mid.trajectories.nfe=0"], ["mid.trajectories.nfe", "0", "greater than or equal to 1"]),
    (
        ["train", "digits", "mid.trajectories.nfe=auto", "mid.trajectories.mode=paper", "mid.batch=7"],
        ["mid.trajectories.nfe", "auto", "7 rows"],
    ),
    (["train", "digits", "mid.trajectories.nfe=auto", "mid.trajectories.t_min=90"], ["mid.trajectories.t_min", "90"]),
    (["tune-teacher", "digit"], ["recipe", "did you mean digits?"]),
    (["tune-teacher", "digits", "--stage", "pre"], ["--stage", "pre", "mid"]),
    (["tune-teacher", "digits", "--stage", "psot"], ["--stage", "did you mean post?"]),
    (["tune-teacher", "digits", "--nfe", "4,x"], ["--nfe", "4,x"]),
    (["tune-teacher", "digits", "--nfe", "1"], ["--nfe", "1", "at least 2"]),
    (["tune-teacher", "digits", "--trajectories", "1"], ["--trajectories", "at least 8"]),
    (["tune-teacher", "digits", "--epsilon", "1", "--student", "a/mid"], ["--student", "--epsilon"]),
    (["tune-teacher", "gmm", "--student", "a/mid"], ["--student", "RUN"]),
    (
        ["train", "digits", "mid.trajectories.budget_forwards=9000"],
        ["mid.trajectories.budget_forwards", "nfe is 16", "auto"],
    ),
    (
        ["train", "digits", "mid.trajectories.nfe=auto", "mid.trajectories.budget_forwards=10"],
        ["budget_forwards", "10", "no step", "256"],
    ),
    (
        ["train", "digits", "post.trajectories.nfe=auto", "post.trajectories.budget_forwards=9000"],
        ["post", "anchor", "mid"],
    ),
    (["tune-teacher", "digits", "--budget", "0"], ["--budget", "0", "above 0"]),
    (["tune-teacher", "gmm", "--budget", "9000"], ["--budget", "closed form", "RUN"]),
    (["tune-teacher", "digits", "--out", "nowhere"], ["pre", "train it first"]),
]


@pytest.mark.parametrize("arguments, said", BAD, ids=lambda v: " ".join(v)[:50])
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and all(word in error for word in said), error
    assert not list(tmp_path.iterdir())
