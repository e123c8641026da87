"""The measures beside the distance: each is right where the answer is known, and says what it should of planted samples."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cmt_fast.config.schema import Digits
from cmt_fast.data import datasets
from cmt_fast.data.rows import Dataset
from cmt_fast.evaluation import distances, intervals, judges, keeping, kept, measures, sharpness, student, tallies
from cmt_fast.evaluation.distances import Moments, Stream
from cmt_fast.evaluation.features import Identity
from cmt_fast.evaluation.second import Second
from cmt_fast.report import verdict
from cmt_fast.run.judging import Judging
from cmt_fast.run.workspace import Workspace
from tests.fixtures.tiny import tiny


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def thorough(data: Dataset, space, n: int) -> judges.Judge:
    """A judge of every measure, of n samples."""
    judge = judges.Judge(data, space)
    judge.kept = keeping.take(judge, {})
    judge.expected = n
    return judge


# ---------------------------------------------------------------------------------------------- the second space


@pytest.mark.parametrize(
    "shape, name, width",
    [
        ((1, 8, 8), "local-frequencies-1", 16 * (4 + 1)),
        ((3, 32, 32), "local-frequencies-1", 3 * 16 * (4 * 3 + 1)),
        ((8, 16, 16), "local-frequencies-1", 8 * 16 * 3),  # too wide for fields
        ((40, 16, 16), "local-frequencies-1", 16 * 3),  # for channels too
        ((2,), "random-fourier-1", 192),
        ((1, 3, 8), "random-fourier-1", 192),  # less than one window
    ],
)
def test_the_second_space_measures_in_deviations_of_the_real_rows(shape, name, width) -> None:
    rows = normal(300, *shape) * 2 + 1
    space, found = Second(shape).fit(rows)
    assert (space.name, found.shape) == (name, (300, width))
    assert found.mean(0).abs().max() < 1e-4 and (found.std(0, correction=0) - 1).abs().max() < 1e-3
    again = Second(shape, space.fitted).features(rows[:7])
    assert torch.allclose(again, found[:7], atol=1e-5)


def test_rows_that_do_not_vary_have_features_all_the_same() -> None:
    flat = torch.ones(10, 1, 8, 8)
    assert torch.isfinite(Second((1, 8, 8)).fit(flat)[0].features(flat + 1)).all()


def test_the_second_space_sees_blur_and_not_where_an_edge_lies() -> None:
    rows = (normal(400, 1, 16, 16) > 1).float()
    space, _ = Second((1, 16, 16)).fit(rows)
    far = lambda x: distances.frechet(*(distances.moments(space.features(y)) for y in (rows, x)))
    blurred = F.avg_pool2d(rows, 3, 1, 1, count_include_pad=False)
    assert max(far(rows.flip(-1)), far(rows.roll(1, -1))) < far(blurred) / 50


# ---------------------------------------------------------------------------------------------- sharpness


def test_sharpness_is_the_share_of_energy_above_half_of_nyquist() -> None:
    i = torch.arange(16)
    wave = lambda f: torch.cos(2 * math.pi * f / 16 * i).expand(1, 1, 16, 16)
    share = lambda x: sharpness.share(sharpness.energies(x))
    assert share(5 + wave(4)) == pytest.approx(0) and share(wave(5)) == pytest.approx(1)
    assert share(wave(2) + 2 * wave(6)) == pytest.approx(4 / 5)
    both = sharpness.energies(wave(2)) + sharpness.energies(2 * wave(6))
    assert sharpness.share(both) == pytest.approx(4 / 5)  # energies add up over images
    assert share(torch.ones(3, 1, 8, 8)) is None and not sharpness.served((8,)) and not sharpness.served((1, 2, 8))


def test_blur_lowers_sharpness_and_noise_raises_it() -> None:
    x = datasets.load(Digits()).x
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    low, real, high = (sharpness.share(sharpness.energies(y)) for y in (blurred, x, x + 0.3 * normal(*x.shape)))
    assert low < 0.6 * real and high > 1.05 * real


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("degrees, point", [(5, 2.5706), (9, 2.2622), (19, 2.0930), (1000, 1.9623)])
def test_the_points_of_students_distribution(degrees, point) -> None:
    assert student.point(degrees) == pytest.approx(point, rel=1e-4)


def test_groups_leave_out_as_though_they_had_never_come() -> None:
    x, groups = normal(60, 3) + 10, [Stream() for _ in range(3)]
    for group, part in zip(groups, x.split(20)):
        group.add(part)
    whole = Stream.joined(groups)
    for found, rows in ((whole, x), (whole.without(groups[1]), torch.cat((x[:20], x[40:])))):
        want = distances.moments(rows)
        assert found.n == len(rows) and torch.allclose(found.moments().mean, want.mean, rtol=1e-12)
        assert torch.allclose(found.moments().covariance, want.covariance, rtol=1e-9, atol=1e-12)


def _left_out(x: torch.Tensor, against: Moments) -> tuple[float, list[float]]:
    """A distance, and the same without each twentieth of the samples."""
    groups = []
    for part in x.tensor_split(intervals.GROUPS):
        groups.append(Stream())
        groups[-1].add(part)
    whole, distance = Stream.joined(groups), distances.Against(against)
    return distance(whole.moments()), [distance(whole.without(g).moments()) for g in groups]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Gaussians of a known distance, 300 times: 95 % of the intervals hold it, within what 300 throws of a coin allow.

    Distances: |shift|^2 + dim (scale - 1)^2; their ratio, of samples from the same noise, as well.
    """
    dim, times, n = 3, 300, 600
    against = Moments(torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64))
    ways = [(0.8, 1.2), (1.6, 0.9)]
    truth = [dim * (shift**2 + (scale - 1) ** 2) for shift, scale in ways]
    held, pairs, narrower = 0, 0, 0
    for seed in range(times):
        z = normal(n, dim, seed=seed).double()
        a, b = (_left_out(scale * z + shift, against) for shift, scale in ways)
        found, ratio = intervals.interval(*a), intervals.ratio(a[0], b[0], a[1], b[1])
        held += found.low <= truth[0] <= found.high
        pairs += ratio.low <= truth[0] / truth[1] <= ratio.high
        other = _left_out(ways[1][1] * normal(n, dim, seed=seed + times).double() + ways[1][0], against)
        apart = intervals.ratio(a[0], other[0], a[1], other[1])
        narrower += ratio.high / ratio.low < apart.high / apart.low
    spread = 3 * math.sqrt(0.95 * 0.05 / times)
    assert abs(held / times - 0.95) < spread and abs(pairs / times - 0.95) < spread
    assert narrower > 0.95 * times  # what is common to both falls out


def test_what_has_no_interval_has_none() -> None:
    assert intervals.interval(1.0, [1.0]) is None and intervals.interval(0.0, [0.1, 0.2]) is None
    assert intervals.ratio(1.0, 2.0, [1.0, 1.1], [2.0]) is None and intervals.ratio(1.0, 0.0, [1.0], [0.0]) is None


# ---------------------------------------------------------------------------------------------- the floor


def test_the_floor_falls_with_samples_and_who_knows_the_data_by_heart_is_at_it(tmp_path) -> None:
    work = Workspace(tiny("digits"), tmp_path)
    judge = work.judging.thorough
    floors = {n: work.judging.floor(judge, n) for n in (200, 800, 3200)}
    for key in ("frechet", "frechet_2"):
        values = [f[key] for f in floors.values()]
        assert values[0] > 2 * values[1] > 4 * values[2]
    labels, g = work.setting.labels(torch.arange(800)), torch.Generator().manual_seed(5)
    own = [(work.data.labels == k).nonzero()[:, 0] for k in range(10)]
    rows = torch.stack([own[k][torch.randint(len(own[k]), (), generator=g)] for k in labels.tolist()])
    found = tallies.figures(work.judging.open_judge(samples=800), work.data.x[rows], labels)
    for key in ("frechet", "frechet_2"):
        _, low, high = intervals.interval(floors[800][key], floors[800]["left_out"][key])
        assert low < found[key] < high
    assert floors[800]["precision"] == floors[800]["precision_2"] == 1
    assert floors[800]["sharpness"] == pytest.approx(judge.kept.sharpness, rel=0.05)


def test_the_estimate_for_new_rows_is_what_new_rows_get() -> None:
    """Rows and samples of one Gaussian, over and over: the mean of the estimates is the mean of the distances."""
    n, rows, dim, times, found, guessed = 400, 200, 4, 40, [], []
    for seed in range(times):
        real, made = normal(rows, dim, seed=seed), normal(n, dim, seed=seed + times)
        found.append(distances.frechet(distances.moments(real), distances.moments(made)))
        guessed.append(measures.apart(real, n, rows))
    a, b = torch.tensor(found), torch.tensor(guessed)
    assert abs(a.mean() - b.mean()) < 3 * ((a.var() + b.var()) / times).sqrt() and b.mean() > 0.7 * a.mean()
    assert measures.apart(normal(8, 4), n, rows) is None  # halves of 4 rows say nothing of 4 features


# ---------------------------------------------------------------------------------------------- what is kept


class Away:
    """The rows of a run whose data are not here."""

    here, labels = False, None

    def __init__(self, data: Dataset) -> None:
        self.n, self.shape, self.classes, self.facts = data.n, data.shape, data.classes, data.facts

    def rows(self, *_):
        raise AssertionError("the data were asked for")


@pytest.mark.parametrize("recipe", ["digits", "gmm"])
def test_a_run_without_its_data_is_judged_alike(recipe, tmp_path) -> None:
    small = ["data.n=300", "eval.n=200", "eval.n_during=100"] if recipe == "gmm" else []
    work = Workspace(tiny(recipe, *small) if not small else _gmm(small), tmp_path)
    net = work.build().eval()
    figures = lambda judging, judge: judging.evaluate(net, (1,), 200, judge=judge, quiet=True)
    whole, plain = figures(work.judging, work.judging.thorough), figures(work.judging, work.judging.judge)
    floor = work.judging.floor(work.judging.thorough, 200)
    away = Judging(work.run, Away(work.data), work.setting, work.decoding, tmp_path, tmp_path)
    assert figures(away, away.thorough) == whole and figures(away, away.judge) == plain
    for key, value in plain[
        "1"
    ].items():  # evaluations in training have the same numbers, which they fold in other blocks
        assert whole["1"][key] == pytest.approx(value, rel=1e-9)
    assert away.floor(away.thorough, 200) == floor and away.floor(away.thorough, 17) is None
    (file,) = (tmp_path / "reference").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(AssertionError, match="the data were asked for"):
        Judging(work.run, Away(work.data), work.setting, work.decoding, tmp_path, tmp_path).keep()
    assert Judging(work.run, work.data, work.setting, work.decoding, tmp_path, tmp_path).keep().about["floor"] == {}


def _gmm(small):
    from cmt_fast.config import loading

    return loading.load("gmm", small)


def test_rows_that_are_kept_follow_the_law() -> None:
    from cmt_fast.diffusion.labels import Law

    labels = torch.tensor([0] * 90 + [1] * 30)
    assert torch.bincount(labels[keeping.chosen(labels, Law([1, 1], "uniform"), 120, 1000)]).tolist() == [30, 30]
    assert torch.bincount(labels[keeping.chosen(labels, Law([1, 2], "x"), 120, 1000)]).tolist() == [15, 30]
    assert keeping.chosen(labels, None, 120, 40).tolist() == list(range(0, 120, 3))


# ---------------------------------------------------------------------------------------------- disagreement


class Coarse(Identity):
    """Means of the four quarters of an image: blind to blur."""

    name = "coarse"

    def features(self, x):
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


def test_spaces_that_disagree_are_said_to() -> None:
    """Planted: rows learnt by heart and blurred, against sharp new-looking ones of which one quarter is a little too bright."""
    data = datasets.load(Digits())
    judge = thorough(Dataset(data.x, None, 0), Coarse(), 1700)
    x = data.x[:1700]
    brighter = x + 0.15 * (torch.arange(8) >= 4) * (torch.arange(8)[:, None] >= 4)
    blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    figures = {"post": tallies.figures(judge, blurred, None), "control": tallies.figures(judge, brighter, None)}
    assert figures["post"]["frechet"] < figures["control"]["frechet"]
    said = verdict.disagreements(figures, judge.kept.sharpness, 1700, "1 step")
    assert "disagree on who wins in 1 step: post by the first, control by the second" in said[0]
    assert any("The winner in 1 step is the blurrier one" in line for line in said)
    assert any("lower precision in the second space" in line for line in said)
    learnt = verdict.disagreements(
        {"post": tallies.figures(judge, x, None), "control": figures["post"]}, judge.kept.sharpness, 1700, ""
    )
    assert not any("who wins" in line and "disagree" in line or "winner" in line for line in learnt)


def _figures(first: float, second: float, sharp: float = 0.3, spread: float = 0.001, **more: float) -> dict:
    wiggle = [1 + spread * (-1) ** i for i in range(20)]
    out = {"frechet": first, "frechet_2": second, "sharpness": sharp}
    return {**out, **more, "left_out": {k: [v * w for w in wiggle] for k, v in out.items()}}


@pytest.mark.parametrize(
    "post, control, mid, wants",
    [
        (_figures(1, 1), _figures(2, 2), None, []),
        (_figures(1, 1.7), _figures(2, 2), None, ["agree on who wins in 2 steps, not on by how much"]),
        (_figures(1, 1.4), _figures(2, 2), None, []),  # 0.5 and 0.7: less than half as much again
        (_figures(1, 3), _figures(2, 2), None, ["post by the first, control by the second"]),
        (_figures(1, 2), _figures(2, 2), None, ["only the first tells post and control apart"]),
        (_figures(1, 1, 0.2), _figures(2, 2), None, ["blurrier one: the share of high-frequency energy is 0.200"]),
        (_figures(1, 1, 0.5), _figures(2, 2), None, ["rougher one"]),
        (_figures(2, 2, 0.2), _figures(1, 1), None, []),  # the loser is the blurrier one
        (_figures(1, 1, recall=0.4), _figures(2, 2, recall=0.6), None, ["covers less of the real data"]),
        (_figures(1, 1, recall=0.59), _figures(2, 2, recall=0.6), None, []),  # chance
        (_figures(1, 2), None, _figures(2, 1), ["post by the first, mid by the second"]),
        (_figures(1, 2), None, _figures(1, 1), []),  # that one space is finer is no news of post and mid
        (None, _figures(1, 1), None, []),
    ],
)  # fmt: skip
def test_what_is_said_of_made_up_figures(post, control, mid, wants) -> None:
    said = verdict.disagreements({"post": post, "control": control, "mid": mid}, 0.3, 1000, "2 steps")
    assert len(said) == len(wants) and all(want in line for want, line in zip(wants, said)), said


def test_a_figure_without_its_groups_is_believed_as_it_stands() -> None:
    a, b = ({"frechet": v, "frechet_2": w} for v, w in ((1.0, 3.0), (2.0, 2.0)))
    found = verdict.ratio(a, b, "frechet")
    assert verdict.text(verdict.Ratio(0.349, 0.28, 1.0)) == "0.349 [0.280, 1.00]"  # as many digits in all
    assert found == (0.5, 0.5, 0.5) and verdict.text(found) == "0.5" and verdict.ratio(a, None, "frechet") is None
    assert "post by the first" in verdict.disagreements({"post": a, "control": b}, None, 10, "1 step")[0]


def test_what_is_kept_is_of_one_key_one_format_and_undamaged(tmp_path):
    about = {"format": kept.FORMAT, "key": {"extractor": "a"}, "floor": {}}
    kept.write(tmp_path, kept.Kept(dict(about), {"mean": torch.ones(2)}))
    assert kept.read(tmp_path, {"extractor": "a"}) and kept.read(tmp_path, {"extractor": None})
    assert kept.read(tmp_path, {"extractor": "b"}) is None and not kept.wrong(tmp_path)
    kept.write(tmp_path, kept.Kept({**about, "format": kept.FORMAT + 1}, {"mean": torch.ones(2)}))
    assert kept.read(tmp_path, {"extractor": "a"}) is None and "format" in kept.wrong(tmp_path)


def test_the_floor_is_of_rows_with_the_labels_of_samples_and_of_none_where_a_label_has_none():
    data = Dataset(torch.zeros(6, 1), torch.tensor([0, 2, 0, 2, 2, 0]), 3, "", (), ())
    drawn = lambda *of: Judging._drawn(
        SimpleNamespace(setting=SimpleNamespace(labels=lambda _: torch.tensor(of)), data=data), len(of)
    )
    assert data.labels[drawn(2, 0, 0, 2)].tolist() == [2, 0, 0, 2]
    assert drawn(2, 1) is None
