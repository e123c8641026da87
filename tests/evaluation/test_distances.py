"""Fréchet distance and moments against other ways to compute them, over ranks too; precision and recall by brute force."""

from __future__ import annotations

import math
import multiprocessing
import os

import pytest
import torch

from bench.judging import slow
from cmt_fast.config import loading
from cmt_fast.evaluation import distances as distances_
from cmt_fast.evaluation import judges, neighbours, roots
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import distributed
from cmt_fast.storage import sound


def gaussian(n: int, dim: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    return torch.randn(n, dim, generator=g, dtype=torch.float64) @ mix + torch.randn(
        dim, generator=g, dtype=torch.float64
    )


@pytest.mark.parametrize(
    "n, dim", [(400, 24), (30, 24), (15, 24)], ids=["full rank", "barely", "fewer rows than features"]
)
def test_frechet_is_scipys(n, dim):
    """By the matrix square root of the product, the other published way.

    A zero eigenvalue that is rounded to 1e-16 of the largest has the square root 1e-8: singular ones keep half the digits.
    """
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (distances_.moments(gaussian(n, dim, seed)) for seed in (1, 2))
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    want = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * root.trace().real
    rel = 1e-9 if n > dim else dim * 2**-26
    assert distances_.frechet(a, b) == pytest.approx(want, rel=rel)
    assert distances_.frechet(a, b) == pytest.approx(distances_.frechet(b, a), rel=rel)


def test_frechet_of_commuting_covariances():
    """sum (sqrt l_a - sqrt l_b)^2 where both have the same eigenvectors, and a tenth of the eigenvalues are zero."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 40, generator=g, dtype=torch.float64)).Q
    la, lb = (torch.rand(40, generator=g, dtype=torch.float64) for _ in range(2))
    la[:4], lb[2:6] = 0, 0
    a, b = (distances_.Moments(torch.zeros(40).double(), q * v @ q.T) for v in (la, lb))
    assert distances_.frechet(a, b) == pytest.approx(float((la.sqrt() - lb.sqrt()).square().sum()), abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_a_stream_has_the_moments_of_the_whole(shift):
    x = gaussian(1000, 16, 0) + shift
    stream = distances_.Stream()
    for part in x.split([1, 0, 300, 7, 692]):
        stream.add(part)
    n, found = stream.over_ranks()
    want = distances_.moments(x)
    scale = want.covariance.abs().max()
    assert n == 1000
    assert (found.mean - want.mean).abs().max() <= 1e-12 * want.mean.abs().max()
    assert (found.covariance - want.covariance).abs().max() <= 1e-9 * scale
    sums = (x.T @ x - 1000 * torch.outer(x.mean(0), x.mean(0))) / 999
    assert ((sums - want.covariance).abs().max() > 1e-9 * scale) == bool(shift), "plain sums would have done"


def test_a_stream_of_one_is_refused():
    stream = distances_.Stream()
    stream.add(torch.randn(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        stream.over_ranks()


def _goes_on(work: Workspace, net, judge: judges.Judge, want: dict) -> None:
    """Stopped before its last figure on every rank, an evaluation ends with the same ones and draws no sample again."""
    manifest, kept = {"files": {"ema-0.safetensors": {"xxh3_128": "of these weights"}}}, work.folder / "judging"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "precision_recall", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError), work.judging.going_on("post", manifest):
            work.judging.evaluate(net, (1,), 200, judge=judge, quiet=True)
        patch.undo()
        distributed.barrier()
        (folder,) = kept.iterdir()
        assert len(list(folder.glob("*.block"))) == 5  # batches of 48
        (figures,) = sound.read(folder / "figures.json").values()
        assert figures.keys() == {"frechet", "frechet_2"}
        distributed.barrier()
        patch.setattr(distances_.Against, "__call__", None)  # those figures have ended
        with work.judging.going_on("post", manifest):
            found = work.judging.evaluate(None, (1,), 200, judge=judge, quiet=True)["1"]
    assert found == want
    distributed.barrier()
    assert not kept.exists()


def _rank(work: Workspace, rank: int, world: int, meet: str, results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=world)
    net = work.build().eval()
    figures = work.judging.evaluate(net, (1,), 200, judge=work.judging.open_judge(rows=True), quiet=True)["1"]
    judge = work.judging.open_judge(samples=200)
    every = work.judging.evaluate(net, (1,), 200, judge=judge, quiet=True)["1"]
    _goes_on(work, net, judge, every)
    for of, row in (("", every), ("floor ", work.judging.floor(judge, 200))):
        left_out = row.pop("left_out")
        figures |= {f"{of}{key} without {i}": v for key, out in left_out.items() for i, v in enumerate(out)}
        figures |= {f"{of}every {k}": v for k, v in row.items() if k != "unseen"}
    short = work.judging.evaluate(net, (1,), 40, quiet=True)["1"]  # one batch: the other ranks have no sample
    uneven = distributed.gather_uneven(torch.full((rank, 2), rank) if rank else None) if world > 1 else None
    made = judges.make_reference(work.judging.judge, 100, 30, 10, lambda n: None)
    bad = 0
    try:
        work.judging.evaluate(lambda x, *_: x * float("nan" if rank == 0 else 1), (1,), 200, quiet=True)
    except FloatingPointError:
        bad = 1
    uneven = None if uneven is None else uneven.tolist()
    results.put((rank, figures, short, uneven, made.moments.covariance.tolist(), made.features.tolist(), bad))
    distributed.stop()


def test_figures_do_not_depend_on_how_many_ranks_there_are(tmp_path):
    context, found = multiprocessing.get_context("fork"), {}
    for world in (1, 3):
        (tmp_path / f"{world}").mkdir()  # what is kept by one process is not there for three
        work = Workspace(loading.load("gmm", ["data.n=500", "eval.batch=48"]), tmp_path / f"{world}")
        results = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(work, r, world, str(tmp_path / f"meet-{world}"), results))
            for r in range(world)
        ]
        for p in ranks:
            p.start()
        found[world] = sorted((results.get(timeout=60) for _ in ranks), key=lambda row: row[0])
        for p in ranks:
            p.join(60)
            assert p.exitcode == 0
    one = found[1][0]
    assert {"frechet", "sliced_wasserstein", "precision", "recall", "every frechet_2", "frechet_2 without 19"} <= one[
        1
    ].keys()
    assert one[1]["every frechet"] == one[1]["frechet"] and "floor every precision_2" in one[1]
    for _, figures, short, uneven, covariance, features, bad in found[3]:
        for mine, want in ((figures, one[1]), (short, one[2])):
            # without full rank, which 192 features of 200 rows are not, an eigenvalue of zero is 1e-16 and its root 1e-8
            off = lambda key: 1e-8 if "frechet_2" in key else 1e-12
            assert {k: pytest.approx(v, rel=1e-9, abs=off(k)) for k, v in want.items()} == mine
        assert uneven == [[1, 1], [2, 2], [2, 2]]
        assert torch.allclose(torch.tensor(covariance), torch.tensor(one[4]), rtol=1e-12, atol=1e-15)
        assert sorted(features) == sorted(one[5]) and len(features) == 10
        assert bad == 1, "samples that one rank finds not finite stop every rank"


def test_precision_and_recall_by_brute_force():
    real, made = gaussian(60, 5, 0), gaussian(50, 5, 1) * 0.7

    def covered(points, centres):
        distances = [sorted(math.dist(c, d) for j, d in enumerate(centres) if j != i) for i, c in enumerate(centres)]
        return sum(any(math.dist(p, c) <= d[2] for c, d in zip(centres, distances)) for p in points) / len(points)

    want = covered(made.tolist(), real.tolist()), covered(real.tolist(), made.tolist())
    assert 0 < want[0] < 1 and 0 < want[1] < 1
    for block in (3, 7, 4096):
        done = []
        assert neighbours.precision_recall(real, made, block=block, advance=done.append) == want
        assert sum(done) == neighbours.tiles(60, 50, block)
    assert neighbours.precision_recall(real, real.clone()) == (1, 1)
    assert neighbours.precision_recall(real, made + 1e3) == (0, 0)
    with pytest.raises(ValueError, match="3-th neighbour, and a set has 3 rows; 4 are needed"):
        neighbours.precision_recall(real[:3], made)


@pytest.mark.parametrize("block", [100, 256, 2048])
def test_neighbours_in_tiles_are_those_of_whole_rows(block):
    """Of float32 features with a large mean, duplicates and far-off points: the figures of the slow twin, exactly."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1300, 6, generator=g)
    rows = z @ torch.randn(6, 96, generator=g) + 0.3 * torch.randn(1300, 96, generator=g) + 20
    real, made = rows[:600].clone(), rows[600:] * 1.02
    real[100:140], made[:30], made[40:44] = real[:40], real[30:60], 1e3
    found = neighbours.precision_recall(real, made, block=block)
    assert found == slow.precision_recall(real, made, block=64) and 0.1 < min(found) < max(found) < 0.99


def test_blocks_of_rows_have_the_moments_of_batches():
    """Folded in blocks, copied and read half-way: to float64 rounding those of a product a batch, and the same bits as alone."""
    x = (gaussian(1500, 12, 0) + 50).float()
    twin, stream = slow.Stream(), distances_.Stream()
    for i, part in enumerate(x.split(64)):
        twin.add(part)
        stream.add(part)
        if i == 11:
            half, read = stream.copy(), stream.shared().moments()  # 256 rows wait
    for part in x[12 * 64 :].split(64):
        half.add(part)
    found, again, want = stream.moments(), half.moments(), twin.moments()
    assert torch.equal(found.covariance, again.covariance) and torch.equal(found.mean, again.mean)
    for a, b in ((found, want), (read, distances_.moments(x[: 12 * 64]))):
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-13, atol=0)
        assert (a.covariance - b.covariance).abs().max() < 1e-12 * b.covariance.abs().max()


def test_a_root_is_taken_once_and_kept(tmp_path, monkeypatch):
    """In memory, then by the file of another process; other moments, and a file that was damaged, have a root of their own."""
    monkeypatch.setattr(roots, "WORTH", 8)
    known, other, sample = (distances_.moments(gaussian(100, 8, seed)) for seed in (0, 1, 2))
    taken, take = [], distances_.square_root
    monkeypatch.setattr(distances_, "square_root", lambda c: taken.append(1) or take(c))
    want = distances_.frechet(known, sample)
    keeper = roots.Roots(tmp_path / "reference")
    assert keeper(known)(sample) == keeper(known)(sample) == want and len(taken) == 2
    assert roots.Roots(tmp_path / "reference")(known)(sample) == want and len(taken) == 2
    assert roots.Roots(tmp_path / "reference")(other)(sample) == distances_.frechet(other, sample) and len(taken) == 4
    assert len(list((tmp_path / "reference").iterdir())) == 2
    for file in (tmp_path / "reference").iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert roots.Roots(tmp_path / "reference")(known)(sample) == want and len(taken) == 5
    assert roots.Roots(tmp_path / "nowhere/reference")(known)(sample) == want and len(taken) == 6
    assert roots.Roots(tmp_path / "reference")(known)(sample) == want and len(taken) == 6


def test_large_unlabelled_images_are_compared_by_the_means_of_fields():
    """64 x 64 x 3 numbers become 8 x 8 x 3, each the mean of an 8 x 8 field; smaller rows are features as they are."""
    from pathlib import Path

    from cmt_fast.data.rows import Dataset
    from cmt_fast.evaluation import features

    x = torch.arange(2 * 3 * 64 * 64, dtype=torch.float32).view(2, 3, 64, 64)
    space = features.extractor(Dataset(x, None, 0), Path("nowhere"))
    by_hand = x.view(2, 3, 8, 8, 8, 8).double().mean((3, 5)).flatten(1)
    assert space.name == "pooled-8" and torch.allclose(space.features(x).double(), by_hand, rtol=1e-6)
    small = x[..., :16, :16]
    assert torch.equal(features.extractor(Dataset(small, None, 0), Path("nowhere")).features(small), small.flatten(1))
