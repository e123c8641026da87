"""A network that is told its guidance as an ONNX graph: scale and interval are an input, row by row."""

from __future__ import annotations

import pytest
import torch

from cmt_fast.convert import exporting, onnx_graph
from cmt_fast.run import workspace
from tests.convert import folders

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@torch.no_grad()
def test_a_graph_is_told_what_cmt_sample_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "cond", lambda yes, a, b, given: (a if yes else b)(*given))  # which would compile both
    of = folders.finished(tmp_path, folders.CASES["dit-told"])
    work, stage = workspace.open_stage(of)
    net = work.build()
    net.load_state_dict(exporting.collect(work, stage).weights)
    graph = onnx_graph._Graph(net.eval(), work.setting, told=True)
    assert graph.inputs == ["noise", "labels", "guidance", "steps"]
    in_turn, drawn = work.setting.told(1.0, 2.0, 8.0), []
    for setting in (work.setting, in_turn):
        for k in (1, 2):
            drawn.append(setting.generate(work.network(stage), k, 6, 0))
            torch.testing.assert_close(graph(*onnx_graph._given(graph, setting, 6, k)), drawn[-1])
    assert (drawn[0] - drawn[2]).abs().amax((1, 2, 3)).min() > 1e-3  # the recipe's scale is none of those
