"""Where the parts come from: locks by hash, bounds, licences, the audit's words, and what an import brings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.harness import audit
from bench.harness.pages import licences
from tests.fixtures import forked

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "locks").glob("*.txt"))
PYTHONS = ("3.10", "3.11", "3.12")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def bounded(requirement: str) -> bool:
    """Whether a version is named that is too new."""
    return any(s.operator in ("<", "<=", "==", "~=") for s in Requirement(requirement).specifier)


def test_every_requirement_has_an_upper_bound():
    ours = [r for r in licences.direct()]
    gpu = [x for x in (ROOT / "docker/requirements-gpu.txt").read_text().splitlines() if x and x[0] != "#"]
    kernels = re.findall(
        r'"((?:torch|numpy|triton)[^"]*)"', (ROOT / "kernels/pyproject.toml").read_text().split("[tool")[0]
    )
    kernels = [r for r in kernels if ">=" in r]
    assert len(ours) > 30 and len(gpu) > 10 and len(kernels) == 3
    assert [r for r in ours + gpu + kernels if not bounded(r)] == []
    assert not bounded("torch>=2.11")


def entries(lock: str) -> list[tuple[Requirement, int]]:
    """Each requirement of a lock, with how many hashes it has."""
    text = (ROOT / "locks" / lock).read_text("utf-8").replace("\\\n", " ")
    lines = [x for x in text.splitlines() if x.strip() and x[0] != "#"]
    return [
        (Requirement(re.sub(r"\s+--hash=\S+", "", x).strip()), len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", x)))
        for x in lines
    ]


@pytest.mark.parametrize("lock", ["demo.txt", "dev.txt", "audit.txt"])
def test_a_lock_names_one_version_and_hashes_of_each_package(lock):
    found = entries(lock)
    assert len(found) > 40
    for requirement, hashes in found:
        assert hashes and [s.operator for s in requirement.specifier] == ["=="], str(requirement)
    for python in PYTHONS:
        here = [r.name for r, _ in found if holds(r, python)]
        assert len(here) == len(set(here)), f"Python {python}: two versions of one package"


def holds(requirement: Requirement, python: str) -> bool:
    """Whether a line is for this Python on Linux with an x86 processor."""
    machine = {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
    versions = {"python_version": python, "python_full_version": f"{python}.9"}
    return requirement.marker is None or requirement.marker.evaluate(machine | versions)


@pytest.mark.parametrize("extra", ["demo", "dev"])
def test_a_lock_has_all_that_the_package_needs_within_its_bounds(extra):
    """A requirement that was added or changed is not in the lock: `make locks`, then `python -m bench licences`."""
    wanted = [Requirement(r) for r, extras in licences.direct().items() if {"core", extra} & set(extras)]
    torchs_own = [Requirement(x) for x in (ROOT / "locks/torch.in").read_text().splitlines() if x[0] != "#"]
    for python in PYTHONS:
        pinned = {r.name: next(iter(r.specifier)).version for r, _ in entries(f"{extra}.txt") if holds(r, python)}
        assert "torch" not in pinned
        for r in wanted + torchs_own:
            if r.name != "torch" and holds(r, python):
                assert r.name in pinned and r.specifier.contains(pinned[r.name]), f"Python {python}: {r}"


def test_the_makefile_and_the_image_install_by_hash():
    recipe = (ROOT / "Makefile").read_text().split("\n.venv/%:")[1].split("\n\t$(PIP) $(if")[0]
    assert "--require-hashes --no-deps -r locks/$*.txt" in recipe
    image = (ROOT / "docker/Dockerfile").read_text()
    assert "COPY locks/demo.txt /opt/cmt-fast/requirements.txt" in image
    assert "pip install --require-hashes --no-deps -r /opt/cmt-fast/requirements.txt" in image


def test_the_licence_of_what_is_installed_is_the_one_that_is_listed():
    listed, compared = json.loads(licences.FILE.read_text("utf-8")), 0
    for name, row in listed.items():
        try:
            d = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if d.version == row["version"]:
            assert licences.licence(d.metadata) == row["licence"], name
            compared += 1
    assert compared > 15


def test_a_package_without_a_licence_is_an_error(tmp_path, monkeypatch):
    listed = json.loads(licences.FILE.read_text("utf-8"))
    monkeypatch.setattr(licences, "FILE", tmp_path / "licences.json")
    licences.FILE.write_text(json.dumps({n: r for n, r in listed.items() if n != "numpy"}))
    with pytest.raises(ValueError, match="numpy is needed and not there"):
        licences.table()
    licences.FILE.write_text(json.dumps(listed | {"numpy": listed["numpy"] | {"licence": ""}}))
    with pytest.raises(ValueError, match="numpy has no licence"):
        licences.table()


def pip_audit(tmp_path: Path, body: str) -> Path:
    """A program that stands for pip-audit: `asked` is what it was asked for."""
    program = tmp_path / "pip-audit"
    head = (
        "import json, sys\nasked = [x.split('==') for x in open(sys.argv[sys.argv.index('-r') + 1]).read().split()]\n"
    )
    program.write_text(f"#!{sys.executable} -S\n{head}{body}\n")
    program.chmod(0o755)
    return program


KNOWN = "rows = [dict(name=n, version=v, vulns=[]) for n, v in asked]\n"
SAYS = "print(json.dumps(dict(dependencies=rows)))"


@pytest.mark.parametrize(
    "body, status, words",
    [
        (KNOWN + SAYS, 0, "packages looked up at pypi, 0 known faults"),
        (KNOWN + "rows[0]['vulns'] = [dict(id='CVE-1', fix_versions=['9'])]\n" + SAYS, 1, "CVE-1; fixed in 9"),
        ("rows = [dict(name=n, skip_reason='not found') for n, v in asked]\n" + SAYS, 2, "audit: 0 of "),
        (KNOWN + "rows.pop(0)\n" + SAYS, 2, "not looked up: absl-py."),
        (
            "sys.exit('Failed to resolve pypi.org')",
            2,
            "nothing was looked up. pypi gave no answer; this needs a network",
        ),
    ],
    ids=["clean", "fault", "mirror", "one missing", "no network"],
)
def test_an_audit_says_what_was_looked_up(tmp_path, capsys, monkeypatch, body, status, words):
    """pip-audit itself ends with 0 where it found no package in the list that it asks."""
    monkeypatch.setattr(audit, "installed", lambda: {"absl-py": "2.5.1", "torch": "2.13.0"})
    arguments = type("Arguments", (), {"program": pip_audit(tmp_path, body), "service": "pypi"})
    assert audit.run(arguments) == status
    assert words in capsys.readouterr().out


def test_a_build_of_torch_is_audited_by_its_release():
    asked = audit.installed()
    assert "+" not in asked["torch"] and not audit.OURS & set(asked)


HEAVY = (
    "torchvision",
    "deepspeed",
    "nvidia.dali",
    "tensorboard",
    "wandb",
    "mlflow",
    "diffusers",
    "torch_fidelity",
    "onnx",
    "sklearn",
)
WALK = """
import importlib, pkgutil, sys
import cmt_fast
names = [m.name for m in pkgutil.walk_packages(cmt_fast.__path__, "cmt_fast.")]
for name in names:
    if not name.endswith("__main__") and ".standalone." not in name:  # those go into an exported folder, for diffusers
        importlib.import_module(name)
print(len(names), [name for name in %r if name in sys.modules])
"""


def test_an_import_of_the_package_brings_nothing():
    code = "import sys; before = set(sys.modules); import cmt_fast; print(sorted(set(sys.modules) - before - {'__future__'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['cmt_fast']\n", done.stdout + done.stderr[-300:]


def test_all_modules_together_bring_no_library_that_has_a_door():
    """Each is imported in the function that needs it: torchvision, DeepSpeed, DALI, loggers and the others."""
    done = subprocess.run([*forked.python("torch"), "-c", WALK % (HEAVY,)], capture_output=True, text=True, timeout=120)
    count, _, said = done.stdout.strip().partition(" ")
    assert said == "[]" and int(count) > 150, done.stdout + done.stderr[-300:]
