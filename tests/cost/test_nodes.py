"""Bytes that many ranks move, by formula, beside what is there."""

from __future__ import annotations

import torch

from cmt_fast.api import open_recipe
from cmt_fast.cost import nodes
from cmt_fast.data import latents
from cmt_fast.engine import LocalEngine
from cmt_fast.runtime import distributed
from tests.fixtures.stores import make_store


def test_small_files_are_as_large_as_is_counted(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", n=150, shard=64)
    monkeypatch.setattr(nodes, "SHARD_ROWS", 64)
    held = sum((store.folder / name).stat().st_size for name in (latents.LABELS, latents.CHECKSUMS))
    assert nodes.small_bytes(150, True, 0) == held and nodes.small_bytes(150, False, 0) == held / 2
    index = lambda n: (make_store(tmp_path / f"{n}", n=n, shard=1).folder / latents.INDEX).stat().st_size
    assert abs((index(30) - index(10)) / 20 - (nodes.small_bytes(0, False, 1) - nodes.HEADER)) <= 6


def test_a_checkpoint_and_a_step_are_as_large_as_is_counted(monkeypatch):
    work = open_recipe("digits", "model.width=16", "model.depth=1", "model.heads=2", "device=cpu")
    stage, sent = work.stage("pre").config, []
    engine = LocalEngine(work.build(), stage, torch.device("cpu"), 1)
    monkeypatch.setattr(distributed, "mean_", lambda g: sent.append(4 * g.numel()))
    engine.step(0.0)
    state = sum(t.numel() * t.element_size() for part in engine.state().values() for t in part.values())
    assert state == nodes.checkpoint_bytes(work.parameters, len(stage.ema))
    ring = 2 * 63 / 64  # of what each rank sends of it to 63 others
    assert nodes.step_time.sent_bytes(None, work.parameters, 0, 64, 1) == ring * sum(sent)


def test_who_reads_once_reads_less():
    rows = nodes.traffic("imagenet512-ecd", "mid", 64, 8)
    by = {t.what: t for t in rows}
    start = next(t for what, t in by.items() if "small files" in what)
    assert start.alone == 64 * start.ours and len(by) == len(rows)
