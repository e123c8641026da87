"""The speedrun: the t test, the rules, forwards against what networks are really called with, attempts, records, the table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from scipy import stats

from cmt_fast import cli
from cmt_fast.config import loading
from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import student
from cmt_fast.models.dit import DiT
from cmt_fast.speedrun import attempt, logs, records, tracks, verifying
from cmt_fast.speedrun.attempt import Attempt
from cmt_fast.storage import locks
from cmt_fast.train import loop, monitor
from tests.fixtures.tiny import tiny

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "records"
SMALL = (
    "mid.images_nimg=320",
    "pre.images_nimg=320",
    "post.images_nimg=320",
    "pre.warmup_nimg=0",
    "post.anchor.fraction=0.5",
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30])
def test_students_t_is_scipys(degrees):
    for t in (-40.0, -4.6, -1.0, 0.0, 0.3, 2.5):
        assert student.below(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), rel=1e-6, abs=1e-12)


def test_the_test_of_a_mean_is_one_sided():
    values = [0.35, 0.33, 0.28, 0.36, 0.31]
    assert student.mean_below(values, 0.4) == pytest.approx(stats.ttest_1samp(values, 0.4, alternative="less").pvalue)
    assert student.mean_below(values, 0.3) > 0.5
    assert student.mean_below([*values, math.inf], 0.4) == 1.0
    a, b = values, [0.5, 0.45, 0.52, 0.41, 0.44]
    assert student.pairs_below(a, b) == pytest.approx(stats.ttest_rel(a, b, alternative="less").pvalue)


# ------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize("name", tracks.names())
def test_a_track_keeps_to_its_own_rules(name):
    track = tracks.load(name)
    run = tracks.entered(track, None, (), "post")
    assert run.control is None and run.eval.n == track.judge["n"] and run.eval.steps == (1,)
    assert tracks.lineage(run, "post") == ["pre", "mid", "post"] and set(track.target) == {"frechet", "frechet_2"}


@pytest.mark.parametrize(
    "override, said",
    [
        ("model.depth=2", "model.depth: 2"),
        ("data.kind=photos", "data.kind: 'photos'"),
        ("mid.teacher=runs/other/pre", "mid.teacher: 'runs/other/pre' was trained elsewhere"),
        ("mid.objective.distance=features", "the judge's own"),
        ("mid.trajectories.nfe=auto", "forwards that nobody counts"),
        ("mid.trajectories.cache=store", "rolled out elsewhere"),
        ("mid.on_nonfinite=skip", "set it to stop"),
        ("engine=zero", "engine=local"),
    ],
)
def test_what_a_track_does_not_allow_is_named(override, said):
    with pytest.raises(ConfigError, match=said):
        tracks.entered(tracks.load("digits"), None, [override], "post")


def test_a_diffusion_model_and_a_stage_that_is_not_there_are_no_ends():
    track = tracks.load("digits")
    with pytest.raises(ConfigError, match="trains a diffusion model"):
        tracks.entered(track, None, (), "pre")
    with pytest.raises(ConfigError, match="is no stage"):
        tracks.entered(track, None, (), "last")
    with pytest.raises(ConfigError, match="valid are digits, photos; did you mean digits"):
        tracks.load("digit")


# ------------------------------------------------------------------------------------------ attempts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A track like digits of a network of a few thousand parameters, and what is entered on it."""
    file = tmp_path_factory.mktemp("track") / "small.yaml"
    file.write_text(yaml.safe_dump(loading.dump(tiny("digits", *SMALL))))
    track = tracks.load("digits")._replace(begin=str(file), judge={**tracks.load("digits").judge, "n": 200})
    return Attempt(track, tracks.entered(track, None, (), "post"), "post")


@pytest.fixture(scope="module")
def tried(small, tmp_path_factory):
    """An attempt of two seeds: its folder, its seeds, and rows that networks were called with while it trained the first."""
    rows, out = [], tmp_path_factory.mktemp("attempts") / "one"

    def count(module, args):
        if isinstance(module, DiT):
            rows.append(len(args[0]) * (3 if torch.is_grad_enabled() else 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            monitor, "observe", lambda *_, **__: None
        )  # a grid is drawn at a stage's end, which is no training
        whole = loop.train

        def trained(*args, **more):
            handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
            try:
                return whole(*args, **more)
            finally:
                handle.remove()

        patch.setattr(loop, "train", trained)
        seeds = attempt.train(small, [0], out, tell=lambda line: None)
    return out, seeds, sum(rows)


def test_forwards_are_those_that_networks_are_called_with(small, tried):
    """Ten steps of a pool of four: the third round is begun and counts whole."""
    out, seeds, called = tried
    assert seeds[0].end["forwards"] == called == sum(tracks.forwards(small.run, s) for s in ("pre", "mid", "post"))


def test_an_attempt_goes_on_and_keeps_its_recipe(small, tried):
    out, seeds, _ = tried
    assert [row["stage"] for row in seeds[0].judged] == ["mid", "post"] and not (out / "runs").exists()
    assert seeds[0].end["frechet"] == seeds[0].judged[-1]["frechet"] > 0 and seeds[0].end["cpu_s"] > 0
    assert seeds[0].end["joules"] is None and seeds[0].end["energy"] or seeds[0].end["joules"] > 0
    before = (out / logs.NAME).read_text()
    assert attempt.train(small, [0], out, tell=lambda line: None)[0].end == seeds[0].end
    assert (out / logs.NAME).read_text() == before
    again = tracks.entered(small.track, str(out / attempt.RECIPE), (), "post")
    assert small._replace(run=again).digest == small.digest
    with pytest.raises(ConfigError, match="another recipe"):
        attempt.train(small._replace(final="mid"), [0], out)


def test_a_folder_of_something_else_is_left_alone(small, tmp_path, monkeypatch):
    """Runs that somebody has there, seeds of other attempts that are kept, an attempt of another recipe or another process."""
    calls = []
    monkeypatch.setattr(attempt, "one", lambda entry, seed, folder: calls.append(folder) or lines(entry, seed))
    mine = tmp_path / "runs" / "mine" / "weights"
    mine.parent.mkdir(parents=True)
    mine.write_text("of weeks")
    with pytest.raises(ConfigError, match="--out: .* holds runs, and no recipe.yaml that says whose"):
        attempt.train(small, [0], tmp_path)
    out = tmp_path / "new"
    with locks.holding(tmp_path), pytest.raises(ConfigError, match="is in use by"):
        attempt.train(small, [0], tmp_path)
    attempt.train(small, [0], out, keep=True, tell=lambda line: None)
    kept = out / "runs" / "seed-0" / "weights"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    attempt.train(small, [0, 1], out, tell=lambda line: None)
    assert mine.read_text() == "of weeks" and kept.read_text() == "kept" and len(calls) == 2
    assert not (out / locks.LOCK).exists()
    (out / logs.NAME).unlink()  # one that was killed before its first seed was done
    other = small._replace(run=tracks.entered(small.track, None, ("pre.lr=3e-3",), "post"))
    with pytest.raises(ConfigError, match="another recipe"):
        attempt.train(other, [0], out)
    with pytest.raises(ConfigError, match="--out: .* cannot be written to"):
        attempt.train(small, [0], mine)


def lines(entry: Attempt, seed: int) -> list[dict]:
    """The least that an attempt writes."""
    about = {"kind": "seed", "seed": seed, "digest": entry.digest, "stop": False, "machine": {"gpu": "H"}}
    end = {"failed": "", "joules": 0.0, "images": 1, "forwards": 1.0, "wall_s": 0.0, "cpu_s": 0.0, "stopped": False}
    return [about, {"kind": "end", "seed": seed, **end}]


def test_an_earlier_stage_of_an_attempt_is_an_attempt_of_its_own(small, tried):
    """Its lines are those that `--final mid` writes, but for seconds."""
    cut = logs.cut(tried[1][0], "mid")
    assert cut.about["digest"] == small._replace(final="mid").digest and cut.end["frechet"] == cut.judged[0]["frechet"]
    assert cut.end["forwards"] == sum(tracks.forwards(small.run, s) for s in ("pre", "mid"))
    assert cut.end["cpu_s"] == pytest.approx(sum(row["cpu_s"] for row in cut.stages))
    with pytest.raises(ConfigError, match="no figures of pre"):
        logs.cut(tried[1][0], "pre")


def test_stop_ends_at_the_first_look_below_the_target(small, tmp_path):
    track = small.track._replace(target={"frechet": 1e9, "frechet_2": 1e9}, look_every_nimg=64)
    rows = attempt.one(small._replace(track=track, stop=True), 3, tmp_path / "run")
    stages = {row["stage"]: row for row in rows if row["kind"] == "stage"}
    assert rows[-1]["stopped"] and stages["post"]["steps"] == 2 and [r["kind"] for r in rows].count("look") == 1
    assert rows[-1]["forwards"] < sum(tracks.forwards(small.run, s) for s in ("pre", "mid", "post"))
    of = logs.Seed(rows[0], list(stages.values()), [], rows[-1])
    assert "stopped at a look" in records.verdict(track, [of]).why


# ------------------------------------------------------------------------------------------ records


def logged(values, forwards=1000.0, first=0, **end):
    """The seeds of a log with these distances."""
    track = tracks.load("digits")
    judge = {key: track.judge[key] for key in ("extractor", "second", "n")}
    about = {"track": "digits", "digest": "d-post", "machine": {"gpu": "none", "cpu": "x", "threads": 1, "torch": "2"}}
    return [
        logs.Seed(
            {**about, "seed": seed}, [], [judge],
            {"frechet": v, "frechet_2": 0.02, "forwards": forwards, "images": 1, "cpu_s": 1.0, "joules": None, **end},
        )
        for seed, v in enumerate(values, first)
    ]  # fmt: skip


GOOD = [0.35, 0.33, 0.28, 0.36, 0.31]


@pytest.mark.parametrize(
    "seeds, why",
    [
        (logged(GOOD), ""),
        (logged(GOOD[:4]), "4 of 5 seeds"),
        (logged(GOOD, first=1), "seeds are not 0"),
        (logged([0.49, 0.51, 0.47, 0.5, 0.49]), "p 0."),
        (logged([0.6, 0.51, 0.57, 0.5, 0.59]), "mean 0.554"),
        (logged(GOOD, frechet_2=0.031), "second space 0.0310"),
        (logged(GOOD, failed="not finite"), "mean inf"),
        (logged(GOOD, stopped=True), "stopped at a look"),
        (logged(GOOD[:4]) + logged(GOOD[:1], first=4, forwards=999.0), "more than one recipe"),
    ],
)
def test_what_counts(seeds, why):
    found = records.verdict(tracks.load("digits"), seeds).why
    assert (why in found) if why else found == ""


def test_a_record_is_faster_than_the_one_before():
    track = tracks.load("digits")
    made = lambda name, forwards, values=GOOD: records.Record(
        Path(name), track, {"idea": "", "final": "post"}, logged(values, forwards), []
    )
    found = [
        made("000-a", 900.0),
        made("001-b", 950.0),
        made("002-c", 800.0),
        made("failed-d", 100.0, [0.5] * 4 + [0.6]),
    ]
    assert list(records.standings(track, found).values())[:3] == ["counts", "not fewer forwards than 900", "counts"]
    assert "mean 0.520" in records.standings(track, found)["failed-d"]


FOLDERS = sorted(f for f in RECORDS.glob("*/*") if f.is_dir())
ids = lambda f: f"{f.parent.name}/{f.name}"


def test_there_are_records():
    track = tracks.load("digits")
    standing = records.standings(track, records.every(track, RECORDS))
    assert list(standing.values()).count("counts") >= 2
    failed = [text for name, text in standing.items() if name.startswith("failed-")]
    assert failed and "counts" not in failed


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_a_record_in_short(folder):
    """Its recipe keeps to the track, its sums are the recipe's, and its first steps come out again."""
    record = records.read(folder)
    lines = list(verifying.verify(record, steps=2))
    assert len(lines) == 4 and ("equal to the last bit" in lines[2] or "another kind of machine" in lines[2])
    assert not record.failed or lines[3].startswith("no record")
    assert (folder / "README.md").read_text("utf-8").count("\n") > 5
    if record.ablation:
        assert {of.about["seed"] for of in record.ablation} & {of.about["seed"] for of in record.seeds}
        assert {of.about["digest"] for of in record.ablation} != {of.about["digest"] for of in record.seeds}


def test_a_log_that_was_touched_is_seen(tmp_path):
    for change, said in (
        (lambda row: row.update(frechet=row["frechet"] / 2), "add up to"),
        (lambda row: row.update(forwards=row["forwards"] - 1), "add up to"),
        (lambda row: row["first"]["losses"].__setitem__(1, 1.0), "differ by"),
        (lambda row: row.update(digest="0-mid"), "the recipe is"),
    ):
        record = records.read(FOLDERS[0])
        file = tmp_path / logs.NAME
        rows = [json.loads(line) for line in (FOLDERS[0] / logs.NAME).read_text().splitlines()]
        kind = {"add up to": "end"}.get(said, "seed")
        change(next(row for row in rows if row["kind"] == kind))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ConfigError, match=said):
            list(verifying.verify(record._replace(seeds=logs.read(file)), steps=2))


def test_the_command(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        assert (
            cli.main(["speedrun", "digits"]) == 2 and "WORLD_SIZE: 2, and an attempt is one" in capsys.readouterr().err
        )
    assert cli.main(["speedrun", "table"]) == 0
    text = capsys.readouterr().out
    assert "000-" in text and "photos: no record yet" in text
    for words, said in (
        ("speedrun digits --seeds 0", "--seeds: 0"),
        ("speedrun verify 001-nothing", "is no record; there are digits/000"),
        ("speedrun digits a.yaml --record 000", "name one recipe or one record"),
    ):
        assert cli.main(words.split()) == 2
        assert said in capsys.readouterr().err
