"""Perceptual distances: the networks, their training and files, the augmentation, and stages that use them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmt_fast.cli import main
from cmt_fast.config.errors import ConfigError
from cmt_fast.config.schema import Perceptual
from cmt_fast.data import datasets
from cmt_fast.diffusion.rng import Random
from cmt_fast.engine import LocalEngine
from cmt_fast.models.vgg import LatentVgg, PixelVgg
from cmt_fast.perceptual import classifier
from cmt_fast.perceptual import distance as perceptual
from cmt_fast.perceptual.augment import augment, draw
from cmt_fast.run.workspace import Workspace
from cmt_fast.storage import checkpoint
from cmt_fast.storage import files as files_
from cmt_fast.train import loop
from tests.fixtures.tiny import metrics, source_of, tiny

CPU = torch.device("cpu")
RANDOM = Random(5, 1, 2)
SIX = torch.arange(6)
FEATURES = ["features.width=4", "features.batch=128", "features.epochs=4", "features.decay_every_epochs=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a classifier trained on the digits by the command."""
    folder = tmp_path_factory.mktemp("features") / "vgg"
    assert main(["train-features", "digits", *FEATURES, "--out", str(folder)]) == 0
    return folder


# ------------------------------------------------------------------------------------------ networks


def gflop(build: Callable[[], torch.nn.Module], *shape: int) -> float:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build().slices(torch.zeros(1, *shape))
    return counter.get_total_flops() / 1e9


def test_work_is_as_measured_of_the_published_networks() -> None:
    assert gflop(lambda: LatentVgg(4, 1000), 4, 64, 64) == pytest.approx(29.9, abs=0.05)
    assert gflop(PixelVgg, 3, 64, 64) == pytest.approx(2.5, abs=0.01)
    assert gflop(PixelVgg, 3, 32, 32) == pytest.approx(0.63, abs=0.01)


def test_latents_are_halved_before_the_last_two_stages_alone() -> None:
    net = LatentVgg(4, 10, 4)
    assert [tuple(f.shape[1:]) for f in net.slices(torch.randn(2, 4, 16, 16))] == [
        (4, 16, 16),
        (8, 16, 16),
        (16, 16, 16),
        (32, 8, 8),
        (32, 4, 4),
    ]
    assert sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()) == 13


# ------------------------------------------------------------------------------------------ LPIPS

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # among VGG16's `features`
ENDS = (2, 7, 14, 21, 28)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@pytest.fixture(scope="module")
def vgg16() -> dict[str, Tensor]:
    return vgg16_weights()


def vgg16_weights() -> dict[str, Tensor]:
    """Weights under a VGG16's own names, a classifier's beside them, and heads as LPIPS stores them."""
    g, out, before = torch.Generator().manual_seed(0), {}, 3
    for i, width in zip(CONVOLUTIONS, WIDTHS):
        out[f"features.{i}.weight"] = torch.randn(width, before, 3, 3, generator=g) * (2 / (9 * before)) ** 0.5
        out[f"features.{i}.bias"] = 0.1 * torch.randn(width, generator=g)
        before = width
    for i, end in enumerate(ENDS):
        width = WIDTHS[CONVOLUTIONS.index(end)]
        out[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=g)
    return {**out, "classifier.0.weight": torch.zeros(2, 2)}


def lpips(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The definition, written down from the paper, one convolution after the other."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((z.expand(-1, 3, -1, -1) - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for z in (x, y))
    total = torch.zeros(len(x))
    for i in CONVOLUTIONS:
        a, b = (F.relu(F.conv2d(z, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1)) for z in (a, b))
        if i in ENDS:
            n, m = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
            head = w[f"lin{ENDS.index(i)}.model.1.weight"]
            total = total + F.conv2d((n - m).square(), head).mean((1, 2, 3))
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
    return total


@pytest.mark.parametrize("form", ["one .pt", "two files", "lpips' names"])
def test_lpips_is_the_definition(vgg16: dict, tmp_path: Path, form: str) -> None:
    weights, heads = tmp_path / "vgg.pt", None
    if form == "two files":
        heads = tmp_path / "heads.safetensors"
        save_file({k: v for k, v in vgg16.items() if k.startswith("lin")}, heads)
        torch.save({k: v for k, v in vgg16.items() if not k.startswith("lin")}, weights)
    elif form == "one .pt":
        torch.save(vgg16, weights)
    else:
        weights = tmp_path / "vgg.safetensors"
        slice_of = lambda i: 1 + sum(end < i for end in ENDS)
        name = lambda k: f"net.slice{slice_of(int(k.split('.')[1]))}.{k.removeprefix('features.')}"
        save_file({name(k) if k.startswith("features") else k: v for k, v in vgg16.items()}, weights)
    given = Perceptual(str(weights), None if heads is None else str(heads))
    x, y = torch.randn(2, 3, 3, 32, 32).clamp(-1, 1)
    x.requires_grad_()
    distance = perceptual.load(given, "lpips", (3, 32, 32), CPU)
    got, want = distance(x, y, None), lpips(vgg16, x, y)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), x)[0] for d in (got, want)), rtol=1e-3, atol=1e-8)
    assert torch.equal(distance(y, y, None), torch.zeros(3)) and got.min() > 1e-3
    assert set(perceptual.checksums(given)) == ({"weights", "heads"} if heads else {"weights"})


def test_lpips_of_grey_images_and_dead_features(vgg16: dict, tmp_path: Path) -> None:
    torch.save({k: -v.abs() if k.endswith("5.bias") else v for k, v in vgg16.items()}, tmp_path / "vgg.pt")
    grey, other = torch.zeros(2, 1, 16, 16, requires_grad=True), torch.rand(2, 1, 16, 16)
    d = perceptual.load(Perceptual(str(tmp_path / "vgg.pt")), "lpips", (1, 16, 16), CPU)
    loss = d(grey, other, RANDOM, None)
    torch.testing.assert_close(loss, d(*(x.expand(-1, 3, -1, -1) for x in (grey, other)), RANDOM, None))
    assert torch.isfinite(torch.autograd.grad(loss.sum(), grey)[0]).all()
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(perceptual.normalised(f).sum(), f)[0]).all()


def test_files_that_are_not_the_network(vgg16: dict, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    files = {
        "text.pt": "cannot be read",
        "list.pt": "no named tensors",
        "evil.pt": "cannot be read",
        "short.pt": "holds none of features.28.weight",
        "shape.pt": r"features.5.weight of .* is \(2, 2\), not \(128, 64, 3, 3\)",
        "negative.pt": "negative",
        "text.safetensors": "cannot be read",
        "none.pt": "cannot be read",
    }
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "text.safetensors").write_text("no archive")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"features.0.weight": Evil()}))
    torch.save({k: v for k, v in vgg16.items() if k != "features.28.weight"}, tmp_path / "short.pt")
    torch.save({**vgg16, "features.5.weight": torch.zeros(2, 2)}, tmp_path / "shape.pt")
    torch.save({**vgg16, "lin2.model.1.weight": -torch.ones(1, 256, 1, 1)}, tmp_path / "negative.pt")
    for name, words in files.items():
        with pytest.raises(ConfigError, match=words) as error:
            perceptual.load(Perceptual(str(tmp_path / name)), "lpips", (3, 32, 32), CPU)
        assert "\n" not in str(error.value) and "perceptual.weights" in str(error.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(ConfigError, match="not written by cmt train-features"):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
        perceptual.load(Perceptual(str(tmp_path / "a.safetensors")), "latent_lpips", (4, 8, 8), CPU)
    with pytest.raises(ConfigError, match="does not exist"):
        perceptual.checksums(Perceptual(str(tmp_path / "none.pt")))


# ------------------------------------------------------------------------------------------ augmentation


def test_augmentation_is_shared_by_the_copies_and_a_function_of_the_row() -> None:
    x = torch.randn(6, 4, 8, 8)
    drawn = draw(RANDOM, SIX, (4, 8, 8))
    both = augment(torch.cat((x, x)), 2, drawn)
    assert torch.equal(*both.chunk(2)) and not torch.allclose(both[:6], x, atol=0.1)
    torch.testing.assert_close(augment(x[2:4], 1, draw(RANDOM, SIX[2:4], (4, 8, 8))), both[2:4])
    assert not torch.allclose(augment(x, 1, draw(RANDOM._replace(step=3), SIX, (4, 8, 8))), both[:6], atol=0.1)
    assert not torch.allclose(augment(x, 1, draw(RANDOM._replace(stage=0), SIX, (4, 8, 8))), both[:6], atol=0.1)
    assert len({round(float(row.square().sum()), 3) for row in augment(x[:1].repeat(6, 1, 1, 1), 1, drawn)}) == 6


def test_augmentation_passes_gradients_and_cuts_a_quarter() -> None:
    x = torch.randn(64, 4, 16, 16, dtype=torch.float32, requires_grad=True)
    drawn = draw(RANDOM, torch.arange(64), (4, 16, 16))
    y = augment(x, 1, drawn)
    cut = (y == 0).all(1).flatten(1).double().mean(1)  # a box half as wide and high, part of it outside
    assert cut.max() <= 0.27 and 0.1 < cut.mean() < 0.25
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).abs().sum(1) > 0).all()
    h, along = 1e-2, torch.randn(64, 4, 16, 16)
    ahead, behind = (augment((x + s * h * along).detach(), 1, drawn).square().sum() for s in (1, -1))
    assert float((ahead - behind) / (2 * h)) == pytest.approx(float((gradient * along).sum()), rel=1e-2, abs=2)


# ------------------------------------------------------------------------------------------ the classifier


def test_classifier_learns_and_its_file_is_the_distance(trained: Path) -> None:
    rows = [r for r in metrics(trained) if r["kind"] == "train"]
    assert rows[-1]["accuracy"] > 0.7 > 0.4 > rows[0]["accuracy"] and rows[-1]["loss"] < rows[0]["loss"] / 2
    assert rows[0]["lr"] == 0.1 and rows[-1]["lr"] == pytest.approx(0.01)
    file = trained / classifier.FILE
    net = perceptual.latent_network(file)
    data = datasets.load(tiny().data)
    accuracy = (net.eval()(data.x[:500]).argmax(1) == data.labels[:500]).double().mean()
    assert accuracy > 0.7
    distance = perceptual.load(Perceptual(str(file)), "latent_lpips", data.shape, CPU)
    x = data.x[:64]
    drawn = distance.draw(RANDOM, torch.arange(64), tuple(data.shape))
    near, far = (distance(x, x + s * torch.randn_like(x), drawn) for s in (0.05, 0.5))
    assert torch.equal(distance(x, x, drawn), torch.zeros(64)) and (far > near).double().mean() > 0.9
    bare = perceptual.load(Perceptual(str(file), augment=False), "latent_lpips", data.shape, CPU)
    want = torch.zeros(64)
    for f, g in zip(net.slices(x), net.slices(x.flip(0))):
        want += (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1).mean((1, 2))
    torch.testing.assert_close(bare(x, x.flip(0), None), want, rtol=1e-4, atol=1e-6)


def test_classifier_goes_on_to_the_same_bits(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    command = ["train-features", "digits", *FEATURES, "--out", str(tmp_path / "vgg")]
    save = checkpoint.save

    def stop_after_two(folder, step, *arguments, **more):
        save(folder, step, *arguments, **more)
        if len(checkpoint.steps(folder)) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after_two)
        assert main(command) == 130
    assert not (tmp_path / "vgg" / classifier.FILE).exists()
    assert main(command) == 0
    for name in (f"checkpoints/{p.name}/optimizer.safetensors" for p in (trained / "checkpoints").iterdir()):
        a, b = (load_file(folder / name) for folder in (trained, tmp_path / "vgg"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (trained / classifier.FILE).read_bytes() == (tmp_path / "vgg" / classifier.FILE).read_bytes()
    assert metrics(trained) == metrics(tmp_path / "vgg")
    capsys.readouterr()
    assert main([*command, "features.lr=0.2"]) == 2
    assert "features.lr: 0.1 -> 0.2" in capsys.readouterr().err
    assert main(["train-features", "gmm", "--out", str(tmp_path / "gmm")]) == 2
    assert "labelled images" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ in a stage


def test_mid_training_with_latent_features(trained: Path, tmp_path: Path) -> None:
    """The loss falls on points that it has seen, and the network's checksum is in the stage's facts."""
    file = trained / classifier.FILE
    more = ["mid.objective.distance=latent_lpips", f"mid.perceptual={{weights: {file}}}", "mid.lr=1e-2"]
    work = Workspace(tiny("digits", *more), tmp_path / "run")
    loop.train(work, ["pre", "mid"])
    found = checkpoint.complete(tmp_path / "run" / "mid").manifest
    assert found["others"] == {"perceptual": {"weights": files_.checksum(file)}}
    source, engine = source_of(work, "mid"), LocalEngine(work.build(), work.run.mid, work.device)
    seen = []
    for name in ("pre", "mid"):
        engine.start_from(work.weights(name)[0])
        with torch.no_grad():
            seen.append(float(source.loss(engine, 0)[0]))
    before, after = seen
    assert after < 0.9 * before
    (logged,) = [r["loss"] for r in metrics(tmp_path / "run" / "mid") if r["kind"] == "train" and r["step"] == 1]
    assert logged == pytest.approx(before, rel=1e-5)


def test_post_training_with_lpips(vgg16: dict, tmp_path: Path) -> None:
    torch.save(vgg16, tmp_path / "vgg.pt")
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 255, (32, 3, 16, 16), np.uint8))
    data = f"data={{kind: npz, path: {tmp_path}/images.npz}}"
    post = "post.objective={kind: ect, q: 16, distance: lpips}"
    one = [f"{s}.images_nimg=4" for s in ("pre", "post")] + [f"{s}.batch=4" for s in ("pre", "post")]
    more = [data, post, f"post.perceptual.weights={tmp_path}/vgg.pt", "post.start=pre", "post.anchor=null", *one]
    work = Workspace(tiny("digits", *more, "post.trajectories=null", "eval.steps=[1]"), tmp_path / "run")
    loop.train(work, ["pre", "post"])
    (row,) = [r for r in metrics(tmp_path / "run" / "post") if r["kind"] == "train"]
    assert 0 < row["loss"] < 1e4 and row["grad_norm"] > 0


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["post.objective.distance=lpips"], ["post.perceptual.weights", "missing", "lpips"]),
        (["post.perceptual={weights: x.pt}"], ["post.perceptual", "no distance", "latent_lpips"]),
        (["post.objective.distance=lpips", "post.perceptual={weights: x.pt}"], ["16 pixels", "(1, 8, 8)"]),
        (["post.objective.distance=latent_lpips", "post.perceptual={weights: x.pt}"], ["'x.pt' does not exist"]),
        (
            ["post.objective.distance=lpips", "post.anchor.objective.distance=latent_lpips"],
            ["post.anchor.objective.distance", "latent_lpips and lpips"],
        ),
    ],
    ids=lambda v: "",
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, capsys, overrides, words) -> None:
    assert main(["train", "digits", *overrides, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_weights_of_other_channels_are_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match="reads 1 channels, the rows of this data have 4"):
        perceptual.load(Perceptual(str(trained / classifier.FILE)), "latent_lpips", (4, 8, 8), CPU)
    with pytest.raises(ConfigError, match="perceptual.heads"):
        perceptual.load(Perceptual(str(trained / classifier.FILE), "x.pt"), "latent_lpips", (1, 8, 8), CPU)
    assert json.loads(json.dumps(perceptual.checksums(Perceptual(str(trained / classifier.FILE)))))


def test_a_classifier_of_rows_of_another_scale_is_refused(trained: Path) -> None:
    given = Perceptual(str(trained / classifier.FILE))
    perceptual.check_rows(given, None)
    with pytest.raises(ConfigError, match="perceptual.weights.*another normalisation"):
        perceptual.check_rows(given, [[0.0], [1.0], 0.5])
