"""Extractors and `cmt eval`: identities are kept apart, weights are tensors only, a run says that it is alive."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from cmt_fast import cli
from cmt_fast.config import schema
from cmt_fast.config.errors import ConfigError
from cmt_fast.data import datasets, rows
from cmt_fast.evaluation import dinov2, distances, inception, judges, references, tallies, weights
from cmt_fast.evaluation import features as features_
from cmt_fast.run.workspace import Workspace
from cmt_fast.runtime import progress
from cmt_fast.storage import checkpoint, heartbeat, metrics_log
from tests.fixtures.tiny import tiny

CPU = torch.device("cpu")


class Marked:
    """Leaves a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


# ------------------------------------------------------------------------------------------------ extractors


def test_bytes_are_those_of_the_published_protocols():
    """floor(127.5 x + 128): every byte comes back from its midpoint, the ends are clipped, gray becomes three channels."""
    every = torch.arange(256)
    x = ((every - 127.5) / 127.5).view(1, 1, 16, 16)
    assert torch.equal(weights.to_uint8(x), every.to(torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16))
    assert weights.to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5))[0, 0, 0].tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_a_distance_is_called_fid_only_by_its_protocol():
    class Space:
        name, images, short, published = "x", True, "FID", True

    judge = judges.Judge(None, Space())
    assert judge.title(50_000) == "FID"
    assert judge.title(10_000) == "frechet (10,000 samples)"
    Space.published = False
    assert judge.title(50_000) == "frechet (50,000 samples)"
    assert judges.Judge(None, features_.Identity()).title(50_000) == "frechet (50,000 samples)"


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the right shapes for torch-fidelity's Inception."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    bare = type("Bare", (inception._constructor(),), {"load_state_dict": lambda self, tensors: None})
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    g = torch.Generator().manual_seed(0)
    tensors = bare("bare", ["2048"], feature_extractor_weights_path=empty).state_dict()
    for t in tensors.values():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, generator=g) * 0.05 if t.ndim > 1 else torch.rand(t.shape, generator=g) + 0.5)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(tensors, file)
    return file


def test_inception_rounds_images_to_bytes_once(inception_file):
    space = inception.Inception(inception_file, CPU)
    x = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1)) * 2.2 - 1.1
    found = space.features(x)
    again = space.features((weights.to_uint8(x[:1]).float() - 127.5) / 127.5)  # rounded once is rounded
    assert found.shape == (2, 2048) and again.shape == (1, 2048)
    assert torch.allclose(found[:1], again, rtol=1e-4)
    assert torch.isfinite(found).all() and (found[0] - found[1]).abs().max() > 0
    assert not space.published and space.name.startswith("inception-2015-12-05@") and "299" in space.name


def test_weights_are_read_as_tensors_only(tmp_path):
    torch.save({"a": Marked(tmp_path / "ran")}, tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 99)
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("bad.pth", "list.pt", "noise.safetensors", "empty.pth"):
        with pytest.raises(ConfigError, match=f"{name}.*cannot be read as tensors"):
            inception.Inception(tmp_path / name, CPU)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(
        ConfigError, match="does not exist; the weights of DINOv2 ViT-L/14 are at https://dl.fbaipublicfiles.com/"
    ):
        dinov2.DinoV2(tmp_path / "none.pth", CPU)


SMALL = {"width": 48, "depth": 2, "heads": 3, "grid": 16}


def test_dinov2_is_torchs_encoder_with_layer_scale(tmp_path):
    """torch.nn.TransformerEncoderLayer is another's implementation of the block; layer scale goes into its projections."""
    net = dinov2.VisionTransformer(**SMALL).eval()
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    layers = []
    for b in net.blocks:
        layer = torch.nn.TransformerEncoderLayer(48, 3, 192, 0.0, "gelu", 1e-6, True, norm_first=True).eval()
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(b.attn.qkv.weight)
            layer.self_attn.in_proj_bias.copy_(b.attn.qkv.bias)
            for theirs, ours, scale in (
                (layer.self_attn.out_proj, b.attn.proj, b.ls1),
                (layer.linear2, b.mlp.fc2, b.ls2),
            ):
                theirs.weight.copy_(scale.gamma[:, None] * ours.weight)
                theirs.bias.copy_(scale.gamma * ours.bias)
            layer.linear1.load_state_dict(b.mlp.fc1.state_dict())
            layer.norm1.load_state_dict(b.norm1.state_dict())
            layer.norm2.load_state_dict(b.norm2.state_dict())
        layers.append(layer)
    torch.save({**net.state_dict(), "mask_token": torch.zeros(1, 48)}, tmp_path / "small.pth")
    space = dinov2.DinoV2(tmp_path / "small.pth", CPU, **SMALL)
    x = torch.rand(2, 3, 20, 20, generator=g) * 2 - 1
    pixels = (
        torch.nn.functional.interpolate(weights.to_uint8(x).float(), (224, 224), mode="bicubic", antialias=True) / 255
    )
    pixels = (pixels - torch.tensor(dinov2.MEAN)[:, None, None]) / torch.tensor(dinov2.DEVIATION)[:, None, None]
    with torch.no_grad():
        patches = net.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        want = torch.cat((net.cls_token.expand(2, -1, -1), patches), 1) + net.pos_embed
        for layer in layers:
            want = layer(want)
        want = net.norm(want)[:, 0]
    assert torch.allclose(space.features(x), want, atol=1e-4 * float(want.abs().max()))
    with pytest.raises(ConfigError, match="does not fit DINOv2"):
        dinov2.DinoV2(tmp_path / "small.pth", CPU)


def test_dinov2_positions_of_another_grid():
    """Keys's cubic kernel with a = -0.75 along both sides, places at 37 / 16.1 of each other, borders repeated."""
    net = dinov2.VisionTransformer(width=2, depth=1, heads=1)
    g = torch.Generator().manual_seed(0)
    net.pos_embed.data = torch.randn(1, 1 + 37 * 37, 2, generator=g)
    found = net.positions(16)

    def kernel(d: float, a: float = -0.75) -> float:
        d = abs(d)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        return near if d <= 1 else far if d < 2 else 0.0

    matrix = torch.zeros(16, 37)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            matrix[i, min(max(k, 0), 36)] += kernel(place - k)
    want = torch.einsum("ia,jb,abc->ijc", matrix, matrix, net.pos_embed[0, 1:].view(37, 37, 2))
    assert torch.equal(found[0, 0], net.pos_embed[0, 0])
    assert torch.allclose(found[0, 1:].view(16, 16, 2), want, atol=1e-4)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished stage of digits with untrained weights."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    work = Workspace(tiny("digits", "eval.batch=3"), folder)
    work.claim()
    tensors = dict(work.build().named_parameters())
    about = {"stage": "pre", "nimg": 0, "done": True, "parent": None, "config": ""}
    checkpoint.save(folder / "pre", 1, {"model": tensors, "ema-0": tensors}, about)
    save_file(features_.Classifier(64, 10).state_dict(), folder / "extractor.safetensors")  # untrained, in no time
    return folder


def test_cmt_eval_against_a_reference_of_its_own(run, inception_file, tmp_path, capsys, monkeypatch):
    whole = inception.Inception.features
    monkeypatch.setattr(
        inception.Inception, "features", lambda self, x: whole(self, x)[:, :64]
    )  # eigenvalues of 2048: seconds
    ours, theirs = str(tmp_path / "r.npz"), ["--metric", "fid", "--weights", str(inception_file)]
    made = ["--make-reference", ours, "--n", "3", "--features", "3"]
    assert cli.main(["eval", f"{run}/pre", *theirs, *made]) == 0
    assert capsys.readouterr().out.startswith(f"{ours}: 3 images, features inception-2015-12-05@")
    stage = [f"{run}/pre", "--steps", "1", "--n", "3", *theirs]
    assert cli.main(["eval", *stage, "--reference", ours, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["metric"] == "frechet (3 samples)" and out["reference"] == {
        "source": "own statistics",
        "n": 3,
        "file": ours,
    }
    assert {"frechet"} == out["steps"]["1"].keys()
    space, digits = inception.Inception(inception_file, CPU), datasets.load(schema.Digits())
    real = distances.moments(space.features(digits.x[torch.arange(3) * digits.n // 3]))
    work = Workspace(tiny("digits"), run)
    samples = work.setting.draw(work.network("pre"), 1, work.run.eval.seed, torch.arange(3))
    want = distances.frechet(distances.moments(space.features(samples)), real)
    assert out["steps"]["1"]["frechet"] == pytest.approx(want, rel=1e-4) and want > 1e-6


def test_extractors_are_not_mixed(run, tmp_path, capsys):
    """A reference of other features, or of the same network with other weights, is one line and exit code 2."""
    work = Workspace(tiny("digits"), run)
    judge = work.judging.open_judge()
    made = judges.make_reference(judge, 200, 64, 0, lambda n: None)
    stage = [f"{run}/pre", "--steps", "1", "--n", "20"]
    for name, code in ((judge.name, 0), ("inception-2015-12-05@0123", 2), (judge.name[:-1] + "x", 2)):
        references.write(tmp_path / "r.npz", made._replace(extractor=name))
        assert cli.main(["eval", *stage, "--reference", str(tmp_path / "r.npz")]) == code
    found = capsys.readouterr()
    assert found.err.count("are not compared") == found.err.count("\n") == 2
    assert "frechet (20 samples)" in found.out


def test_what_the_metrics_need_is_named(run, tmp_path, capsys):
    weights_file = tmp_path / "w.pth"
    cases = {
        'eval.metric: "kid"': ["--metric", "kid"],
        "eval.weights: is missing": ["--metric", "fid"],
        f"eval.weights: '{weights_file}' does not exist": ["--metric", "fd_dinov2", "--weights", str(weights_file)],
        "eval.reference: 'no.txt' is none of": ["--reference", "no.txt"],
        "--make-reference": ["--make-reference", str(tmp_path / "r.csv")],
        "--steps": ["--steps", "1,a"],
        "eval.batch: 0": ["--batch", "0"],
    }
    for text, arguments in cases.items():
        assert cli.main(["eval", f"{run}/pre", *arguments]) == 2
        err = capsys.readouterr().err
        assert text in err.replace("'kid'", '"kid"') and err.count("\n") == 1, err
    with pytest.raises(ConfigError, match="eval.metric: fid looks at images, and rows of this data are .4, 8, 8."):
        latents = rows.Dataset(torch.zeros(3, 4, 8, 8), None, 0)
        evaluation = schema.Eval(metric="fid", weights="w.pth")
        judges.open_judge(latents, evaluation, features_.Identity, CPU, None)


def test_latents_are_decoded_before_they_are_judged():
    """Twice as large and as many as the latents: what the space sees is what the decoder made."""

    class Space(features_.Identity):
        images, seen = True, []

        def features(self, x):
            self.seen.append(tuple(x.shape))
            return x.mean((2, 3))

    decode = lambda z: z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
    latents = rows.Dataset(torch.randn(30, 4, 2, 2), None, 0)
    judge = judges.Judge(latents, Space(), None, "fid", decode)
    made = judges.make_reference(judge, None, 16, 0, lambda n: None)
    assert Space.seen == [(16, 3, 16, 16), (14, 3, 16, 16)]
    want = distances.moments(latents.x[:, :3].mean((2, 3)))
    assert torch.allclose(made.moments.covariance, want.covariance, atol=1e-6)
    with pytest.raises(ConfigError, match="eval.reference: is missing"):
        tallies.Tally(judge)


# ------------------------------------------------------------------------------------------------ heartbeat


def test_a_heartbeat_is_fresh_while_a_run_does_something(tmp_path, capsys):
    stage = tmp_path / "runs" / "mine" / "pre"
    stage.mkdir(parents=True)
    assert cli.main(["doctor", "--heartbeat", str(tmp_path / "runs")]) == 1
    assert "has never been alive" in capsys.readouterr().err
    record = metrics_log.Log(stage, 0, write=True)
    beat = stage.parent / heartbeat.HEARTBEAT
    for act in (lambda: record.row("train", 1, 1, {}), None):
        os.utime(beat, (time.time() - 1000,) * 2)
        for folder in (stage.parent, stage.parent.parent):
            assert cli.main(["doctor", "--heartbeat", str(folder), "--older-than", "600"]) == 1
        if act:
            act()
        else:
            with progress.counting("1 step", 5, stage.parent, quiet=True) as advance:
                advance(1)
        for folder in (stage.parent, stage.parent.parent):
            assert cli.main(["doctor", "--heartbeat", str(folder), "--older-than", "600"]) == 0
    record.close()
    assert "last gave a sign of life 1000 s ago, at most 600 s are allowed" in capsys.readouterr().err
