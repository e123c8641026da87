"""A few cases of `python -m bench diskfull`, by the same program: the library that is preloaded is compiled here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_full_disk_and_what_file_systems_refuse_cost_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench",
        "diskfull",
        "--n",
        "3",
        "--errors",
        "1",
        "--json",
        str(tmp_path / "x.json"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {row["case"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert len(rows) == 7 and not any(row["faults"] for row in rows.values())
    assert rows["sizes"]["ended"]["full"] and all(
        rows[c]["calls"] for c in ("flock", "fsync of a folder", "rename over a file")
    )
    assert rows["hard links"]["calls"] == 0  # none is ever made
