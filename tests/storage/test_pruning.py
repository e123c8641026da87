"""What is taken out of a checkpoint: never of one that is damaged, and nothing is written where nothing goes."""

from __future__ import annotations

import pytest
import torch

from cmt_fast.storage import checkpoint, pruning


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of two files."""
    files = {name: {"w": torch.zeros(3)} for name in ("ema-0", "optimizer")}
    return checkpoint.save(tmp_path, 1, files, {"done": True})


def test_what_goes_is_named_and_what_stays_is_whole(saved):
    before = (saved / "manifest.json").read_bytes()
    pruning.prune(saved, lambda name: True)
    assert (saved / "manifest.json").read_bytes() == before
    pruning.prune(saved, lambda name: name.startswith("ema"))
    assert set(checkpoint.verify(saved).manifest["pruned"]) == {"optimizer.safetensors"}
    assert {p.name for p in saved.iterdir()} == {"manifest.json", "ema-0.safetensors"}


def test_nothing_is_taken_from_a_checkpoint_that_is_damaged(saved):
    file = saved / "ema-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # of the same size
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match="ema-0"):
        pruning.prune(saved, lambda name: False)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
