"""A sample of `python -m bench kills`; test_resume.py kills more of one rank, test_zero.py two ranks."""

from __future__ import annotations

import json
import os
import subprocess

from bench.safety import kills
from cmt_fast.storage import checkpoint
from tests.fixtures import forked
from tests.fixtures.tiny import tiny


def test_kills_at_random_moments_change_nothing(tmp_path):
    command = [
        "-m",
        "bench",
        "kills",
        "--n",
        "2",
        "--setting",
        "one rank",
        "--stages",
        "pre",
        "--out",
        str(tmp_path / "x"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*forked.python(), *command], cwd=forked.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "x").read_text())
    assert found["held"] and found["kills"] == 2 and sum(found["rows"][0]["met"].values()) == 2


def test_what_was_changed_is_seen(tmp_path):
    """The comparison that the bench is made of: each kind of difference, and a folder that cannot be loaded."""
    from cmt_fast.run.workspace import Workspace
    from cmt_fast.train import loop

    loop.train(Workspace(tiny("digits", "pre.images_nimg=64", "eval.n=20"), tmp_path / "run"), ["pre"])
    stage = tmp_path / "run" / "pre"
    assert kills.differences(stage, stage) == [] and kills.loadable(tmp_path / "run", "pre")
    found = checkpoint.complete(stage)
    for what, name in (("weights", "model"), ("EMA", "ema-0"), ("optimizer", "optimizer")):
        other = tmp_path / what / "pre"
        files = {
            file.removesuffix(".safetensors"): found.tensors(file.removesuffix(".safetensors"))
            for file in found.manifest["files"]
        }
        key = sorted(files[name])[0]
        files[name] = {**files[name], key: files[name][key] + 1}
        about = {k: v for k, v in found.manifest.items() if k not in ("files", "xxh3_128", "format", "step")}
        checkpoint.save(other, found.manifest["step"], files, about)
        rows = (stage / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (other / "metrics.jsonl").write_bytes(b"".join(rows[:-1]))
        assert kills.differences(other, stage) == [what, "metrics"]
    file = checkpoint.folder_of(stage, found.manifest["step"]) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert not kills.loadable(tmp_path / "run", "pre")
