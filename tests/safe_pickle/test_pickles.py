"""Pickles of other projects: every tensor comes out, nothing in them is executed, whatever they hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from cmt_fast.safe_pickle import sandbox
from cmt_fast.safe_pickle.opcodes import Refused
from tests.fixtures import hostile_pickles, pickled

# reads every case in one process whose audit hook notes what reading does
READ_ALL = """
import io, json, sys
from cmt_fast.safe_pickle import pickles
from cmt_fast.safe_pickle.opcodes import Refused
from pathlib import Path
seen, out = [], {}
harmless = {"mmap.__new__", "builtins.id", "object.__getattr__", "sys._getframe"}
cases = {p.stem: p.read_bytes() for p in sorted(Path(sys.argv[1]).glob("*.pkl"))}
sys.addaudithook(lambda event, arguments: seen.append(event) if event not in harmless else None)
for name, body in cases.items():
    seen.clear()
    try:
        pickles.read(io.BytesIO(body), len(body))
        error = None
    except Refused as refused:
        error = str(refused)
    except BaseException as other:
        error = f"ESCAPED {type(other).__name__} {other}"
    out[name] = [error, list(seen)]
print(json.dumps(out))
"""


@pytest.mark.parametrize("half, protocol", [(True, 4), (False, 5), (False, 2)])
def test_every_tensor_and_argument_comes_out(tmp_path, half, protocol):
    net = pickled.network(tmp_path / "net.pkl", half, protocol, width=8, label_dim=10, channel_mult=[1, 2])
    about = sandbox.read(tmp_path / "net.pkl", tmp_path)
    got = load_file(tmp_path / "tensors.safetensors")
    want = {f"ema.{k}": v for k, v in net.state_dict().items()}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) and got[k].dtype == want[k].dtype for k in want)
    assert about["ema"]["class"] == "Precond"
    assert about["ema"]["init_kwargs"] == {"width": 8, "label_dim": 10, "channel_mult": [1, 2]}
    assert about["ema"]["state"]["sigma_data"] == 0.5 and len(about["ema"]["source_sha256"]) == 64
    encoder = {"vae_name": "some/vae", "scale": [0.5, 0.25], "bias": [0, -1], "table": [[0, 1], [2, 3]]}
    assert about["encoder"]["state"] == encoder
    assert about["dataset_kwargs"] == {"path": "x.zip", "use_labels": True}


def test_strided_and_shared_storages_and_bfloat16(tmp_path):
    base = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    tree = {"a": base.t(), "b": base[1:, ::2], "c": torch.zeros(0, 3), "d": torch.tensor([True, False]), "e": base[2]}
    (tmp_path / "t.pkl").write_bytes(pickled.dumps(tree))
    sandbox.read(tmp_path / "t.pkl", tmp_path)
    got = load_file(tmp_path / "tensors.safetensors")
    assert (
        all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tree.items()) and got.keys() == tree.keys()
    )


def test_hostile_pickles_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    cases = hostile_pickles.cases(str(canary))
    names = {f"{i:03d}": name for i, name in enumerate(cases)}
    folder = tmp_path / "cases"
    folder.mkdir()
    for number, name in names.items():
        (folder / f"{number}.pkl").write_bytes(cases[name])
    command = [sys.executable, "-c", textwrap.dedent(READ_ALL), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    results = {names[k]: v for k, v in json.loads(done.stdout).items()}
    assert len(results) == len(cases) > 100
    for name, (error, events) in results.items():
        assert error and not error.startswith("ESCAPED") and "\n" not in error and "\x1b" not in error, (name, error)
        assert not events, (name, events)
    assert not canary.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["cases"]
    assert (
        "os.system" in results["calls os.system"][0]
        and "follow its end" in results["a snapshot and a second pickle"][0]
    )


@pytest.mark.parametrize("name", ["calls os.system", "pickle in a storage", "bytes of 2^62", "storage of 2^62 numbers"])
def test_the_process_refuses_in_one_line_and_writes_nothing(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "case.pkl").write_bytes(hostile_pickles.cases(str(tmp_path / "canary"))[name])
    with pytest.raises(Refused) as caught:
        sandbox.read(tmp_path / "case.pkl", tmp_path / "out")
    assert "\n" not in str(caught.value) and "tried" not in str(caught.value)
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "canary").exists()


def test_time_is_limited(tmp_path):
    (tmp_path / "case.pkl").write_bytes(hostile_pickles.hash_bomb())
    with pytest.raises(Refused, match="CPU time"):
        sandbox.read(tmp_path / "case.pkl", tmp_path, seconds=1)


ESCAPES = {
    "os.system('touch {0}')": "os.system",
    "open('{0}', 'w')": "open",
    "import antigravity": "import",
    "exec('1')": "compile",
    "__import__('socket').socket()": "import|socket",
    "os.remove('{1}')": "os.remove",
    "os.fork()": "os.fork",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_the_second_wall_ends_the_process(tmp_path, escape):
    """Were there a way to run something, the audit hook would end the process before the event."""
    (tmp_path / "net.pkl").write_bytes(b"\x80\x02}.")
    code = f"""
    import os, sys
    sys.path[:] = sys.argv[1:]
    from cmt_fast.safe_pickle import pickles, sandbox
    def read(*_):
        {escape.format(tmp_path / "canary", tmp_path / "net.pkl")}
    pickles.read = read
    sandbox.child({str(tmp_path / "net.pkl")!r}, {str(tmp_path)!r}, "20")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *[os.path.abspath(p) for p in sys.path if p]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == sandbox.TRIED and any(e in done.stderr for e in ESCAPES[escape].split("|")), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pkl"]


def test_memory_is_limited(tmp_path):
    (tmp_path / "net.pkl").write_bytes(b"\x80\x02}.")
    code = f"""
    import sys
    sys.path[:] = sys.argv[1:]
    from cmt_fast.safe_pickle import pickles, sandbox
    pickles.read = lambda *_: bytearray(1 << 31)
    sandbox.child({str(tmp_path / "net.pkl")!r}, {str(tmp_path)!r}, "20")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *[os.path.abspath(p) for p in sys.path if p]]
    # not measured: coverage removes files as a process ends
    plain = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=plain)
    assert done.returncode == sandbox.REFUSED and "more memory" in done.stderr
