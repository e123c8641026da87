"""Archives of others: hostile ones are refused in one line, nothing is written, memory stays bounded."""

from __future__ import annotations

import io
import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmt_fast.cli import main
from cmt_fast.data.archives import DatasetError
from cmt_fast.data.importing import Settings, convert
from cmt_fast.data.latents import Store
from tests.fixtures import forked, hostile_stores

NAMES = list(hostile_stores.CASES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A folder for each case, with the archive `case` in it."""
    base = tmp_path_factory.mktemp("hostile")
    for k, name in enumerate(NAMES):
        (base / str(k)).mkdir()
        hostile_stores.CASES[name][1](base / str(k) / "case")
    return base


def inventory(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every path with the size and age of what is no folder."""
    stat = lambda p: None if p.is_dir() else (p.lstat().st_size, p.lstat().st_mtime_ns)
    return {str(p): stat(p) for p in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_is_refused_in_one_line_and_nothing_is_written(cases, name, monkeypatch):
    folder = cases / str(NAMES.index(name))
    monkeypatch.chdir(folder)
    before = inventory(cases)
    text = hostile_stores.attempt(folder, name)
    assert text and "\n" not in text and text.isprintable() and len(text) < 600
    assert "case" in text or "out" in text  # which file
    assert inventory(cases) == before
    assert not Path("/tmp/evil.npy").exists() and not Path("/tmp/1.npy").exists()


def test_refused_with_little_memory(cases):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*forked.python(), "-m", "tests.fixtures.hostile_stores", str(cases)]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["refused"] == len(NAMES) >= 30
    assert found["grown_bytes"] < 100 << 20


def test_the_command_says_it_in_one_line(cases, capsys):
    folder = cases / str(NAMES.index("pickle"))
    assert main(["data", "import", str(folder / "case"), str(folder / "out"), "--format", "edm2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small sound EDM2 archive, stored and deflated members."""
    out = io.BytesIO()
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(out, "w") as file:
        for k in range(4):
            how = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[k % 2]
            file.writestr(
                f"00000/{k}.npy", hostile_stores.npy(np.abs(rng.normal(size=(8, 2, 2))).astype(np.float32)), how
            )
        file.writestr("dataset.json", json.dumps({"labels": [[f"00000/{k}.npy", k] for k in range(4)]}))
    return tmp_path_factory.mktemp("fuzz"), out.getvalue()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.floats(0, 1),
)
def test_mutated_archives_are_imported_whole_or_refused(sound, edits, cut):
    folder, data = sound
    data = bytearray(data)
    for place, value in edits:
        data[int(place * len(data))] = value
    data = data[: int(cut * len(data))] if cut < 0.1 else data
    (folder / "case").write_bytes(bytes(data))
    out = folder / "out"
    try:
        convert(folder / "case", out, Settings("edm2", "float16"), shard_rows=3)
    except DatasetError as error:
        assert "\n" not in str(error)
        assert sorted(p.name for p in folder.iterdir()) == ["case"]
        return
    assert Store(out).verify() == []
    for path in out.iterdir():
        path.unlink()
    out.rmdir()
