"""A stage as an ONNX graph gives the trainer's samples in onnxruntime, for any batch, in one step and in two."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cmt_fast.convert import exporting, onnx_graph
from cmt_fast.run import workspace
from tests.convert.test_import import cmt
from tests.convert.test_plain import DDPM, stage
from tests.fixtures import small

onnx, runtime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
pytest.importorskip("onnxscript")


KINDS = {
    "ddpm": (DDPM, "ve"), "edm": (small.SIT, "ve"), "linear": (small.SIT, "linear"), "edm2": (small.EDM2, "ve"),
    "no labels": ({**small.EDM2, "conditional": False}, "ve"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_traced_draws_what_cmt_sample_draws(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "cond", lambda yes, a, b, given: (a if yes else b)(*given))  # which would compile both
    model, path = KINDS[kind]
    work, _ = workspace.open_stage(str(stage(tmp_path, model, path)))
    net = work.build()
    net.load_state_dict(exporting.collect(work, "post").weights)
    graph = onnx_graph._Graph(net.eval(), work.setting)
    names = ["noise", *["labels"] * (kind != "no labels"), *["renoise"] * (path == "ve"), "steps"]
    assert graph.inputs == names
    drawn = [work.setting.generate(work.network("post"), k, 5, 0) for k in (1, 2)]
    assert (drawn[0] - drawn[1]).abs().max() > 0.01
    for k, want in enumerate(drawn, 1):
        torch.testing.assert_close(graph(*onnx_graph._given(graph, work.setting, 5, k)), want)


def test_the_graph_gives_the_trainers_samples_in_onnxruntime(tmp_path, capsys, monkeypatch):
    of, out = stage(tmp_path / "here", DDPM, "ve"), tmp_path / "net.onnx"
    code, said, err = cmt(capsys, "ckpt", "export", of, out, "--format", "onnx")
    assert code == 0 and "1 step: onnxruntime errs by" in said and "2 steps: onnxruntime errs by" in said, err
    assert "inputs noise, labels, renoise, steps; steps 1 or 2; opset" in said
    about = json.loads({p.key: p.value for p in onnx.load(out).metadata_props}["cmt-fast"])
    assert about["stage"] == "post" and about["digest"] and about["lineage"]["ema"]
    assert b".py" not in out.read_bytes()  # no call stacks, which have the paths of this machine
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    work, _ = workspace.open_stage(str(of))
    index = torch.arange(7)  # not the batch that it was traced with
    given = {"noise": work.setting.noise(0, index), "labels": work.setting.labels(index)}
    given["renoise"] = work.setting.between(0, 1, index)
    for k in (1, 2):
        feed = {name: v.numpy() for name, v in {**given, "steps": torch.tensor([k])}.items()}
        want = work.setting.generate(work.network("post"), k, 7, 0)
        torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), want, rtol=1e-3, atol=1e-4)
    for k in (0, 3, 4):  # the trainer knows times for 4 steps, the graph does not
        with pytest.raises(runtime.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
            session.run(None, {**feed, "steps": torch.tensor([k]).numpy()})
    # a graph of other weights than the stage's is not kept
    monkeypatch.setattr(onnx_graph, "_write", lambda graph, export, setting, file: shutil.copy(out, file) and 0)
    found = exporting.collect(work, "post")
    other = found._replace(weights={k: v * 1.001 for k, v in found.weights.items()})
    with pytest.raises(FloatingPointError, match="is not kept: 1 step: onnxruntime errs by"):
        onnx_graph.to_onnx(other, tmp_path / "other.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "net.onnx"]


def test_what_is_no_graph_of_few_steps_is_said(tmp_path, capsys):
    of = stage(tmp_path / "here", DDPM, "ve", "pre")
    for arguments, said in (
        (
            [tmp_path / "x.onnx"],
            "onnx is of one or two steps, and pre is a diffusion model (denoise); take a later stage",
        ),
        ([tmp_path / "x.onnx", "--license", "mit"], "--license: is for --format diffusers"),
    ):
        code, _, err = cmt(capsys, "ckpt", "export", of, *arguments, "--format", "onnx")
        assert code == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "x.onnx").exists()
    post = stage(tmp_path / "here", DDPM, "ve", "post")
    code, _, err = cmt(capsys, "ckpt", "export", post, tmp_path / "x.pt", "--format", "onnx")
    assert code == 2 and "does not end in .onnx" in err
