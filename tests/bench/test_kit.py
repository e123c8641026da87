"""The kit is the project, its library and its wheels, and its README's two lines run it where the folder was carried to."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cmt_kernels import _native

from bench.harness import kit
from bench.harness.results_file import ROOT, commit

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a kit is made of what git tracks")
PLANTED = "planted_package"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A kit with one made-up wheel, without DeepSpeed and CUDA; what is fetched over a network is not tried here."""

    def wheels(into: Path, python: str, wanted: list[str], needs: bool) -> list[str]:
        into.mkdir(parents=True)
        with zipfile.ZipFile(into / f"{PLANTED}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{PLANTED}.py", "")
            wheel.writestr(
                f"{PLANTED}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {PLANTED}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{PLANTED}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{PLANTED}-1.0.dist-info/RECORD", "")
        return [PLANTED]

    def native(into: Path, archs: str) -> str:
        """The library of this tree where there is one: building is test_native's."""
        target = into / "kernels/cmt_kernels/_native"
        for file in ("cmt_native.so", "build.json"):
            if (ROOT / "kernels/cmt_kernels/_native" / file).exists():
                shutil.copy2(ROOT / "kernels/cmt_kernels/_native" / file, target)
        return "native ops copied"

    out = tmp_path_factory.mktemp("made") / "gpu-kit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "wheels", wheels)
        patch.setattr(kit, "native", native)
        patch.setattr(kit, "PURE", ())
        assert kit.run(argparse.Namespace(python="3.12", archs="", bare=False, out=out)) == 0
    moved = tmp_path_factory.mktemp("there") / "carried"
    out.rename(moved)
    return moved


def run_there(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """The README's lines, with another command at the end of the second."""
    first, second = (folder / "README").read_text().splitlines()
    assert second.endswith("python3 -m bench gpu")
    script = f"set -e\n{first}\n{second.removesuffix('python3 -m bench gpu')} python3 {' '.join(command)}\n"
    bins = folder / "bin"
    bins.mkdir(exist_ok=True)
    if not (bins / "python3").exists():
        (bins / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (bins / "python3").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PATH": f"{bins}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_the_two_lines_run_the_carried_project_and_nothing_of_this_one(folder: Path) -> None:
    code = (
        f"import cmt_fast, cmt_kernels, bench, {PLANTED}; from cmt_kernels import _native; "
        f"print(*(m.__file__ for m in (cmt_fast, cmt_kernels, bench, {PLANTED})), _native.LIBRARY, sep='\\n'); "
        "print(_native.unavailable('cpu') is None); from bench.harness.results_file import commit; print(commit())"
    )
    done = run_there(folder, "-c", f'"{code}"')
    assert done.returncode == 0, done.stderr
    *files, loads, commit_there = done.stdout.strip().splitlines()
    assert len(files) == 5 and all(file.startswith(str(folder)) for file in files), files
    assert loads == str(_native.unavailable("cpu") is None)
    assert commit_there == commit()


def test_a_command_of_the_trainer_runs_there(folder: Path) -> None:
    done = run_there(folder, "-m", "cmt_fast", "recipes", "ls")
    assert done.returncode == 0 and "digits-mf" in done.stdout, done.stderr


def test_it_holds_what_git_tracks_and_no_more(folder: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    here = {str(p.relative_to(folder / "project")) for p in (folder / "project").rglob("*") if p.is_file()}
    here = {p for p in here if "__pycache__" not in p}
    built = {f"kernels/cmt_kernels/_native/{name}" for name in ("cmt_native.so", "build.json")}
    assert here - built - {"COMMIT"} == {p for p in tracked if (ROOT / p).is_file()}
    assert kit.mib(folder / "project") < 30  # with the library for one GPU


def test_names_and_versions_of_the_wheels() -> None:
    image, bare = kit.requirements(False), kit.requirements(True)
    assert "pydantic>=2.9,<3" in image and "pydantic-core" in image and not any("numpy" in r for r in image)
    assert {"numpy>=1.26,<3", "pydantic>=2.9,<3", "pyyaml>=6,<7", "pytest>=8,<10"} <= set(bare)
    assert not any(r.startswith(("torch", "triton")) for r in image + bare)
    assert kit.name("Pydantic_Core>=2") == kit.name("pydantic.core[x]") == "pydantic-core"


def test_wheels_are_asked_for_that_machines_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(command: list[str], **_: object) -> argparse.Namespace:
        asked.append(command)
        for file in ("pydantic-2.9-py3-none-any.whl", "typing_extensions-4-py3-none-any.whl"):
            (Path(command[command.index("-d") + 1]) / file).touch()
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(kit.subprocess, "run", download)
    assert kit.wheels(tmp_path / "a", "3.12", ["pydantic>=2.9,<3"], False) == ["pydantic-2.9-py3-none-any.whl"]
    assert len(kit.wheels(tmp_path / "b", "3.13", ["pydantic>=2.9,<3"], True)) == 2
    assert {"--python-version=3.12", "--only-binary=:all:", "--implementation=cp"} <= set(asked[0])
    assert "--python-version=3.13" in asked[1] and "--platform=manylinux_2_17_x86_64" in asked[1]


def test_it_refuses_to_delete_what_is_no_kit_and_to_be_too_large(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SystemExit, match="is no kit"):
        kit.run(argparse.Namespace(python="3.12", archs="", bare=False, out=tmp_path))
    assert (tmp_path / "mine").exists()
    for part in ("sources", "native"):
        monkeypatch.setattr(kit, part, lambda into, *_: into.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(kit, "packages", lambda into: [])
    monkeypatch.setattr(kit, "wheels", lambda into, *_: into.mkdir() or (into / "big").write_bytes(b"1" * 2**21) and [])
    arguments = argparse.Namespace(python="3.12", archs="", bare=False, out=tmp_path / "kit")
    assert kit.run(arguments) == 0 and kit.mib(tmp_path / "kit") == pytest.approx(2, abs=0.01)
    monkeypatch.setattr(kit, "LIMIT_MIB", 1)
    assert kit.run(arguments) == 1


def test_compiled_code_of_another_python_is_refused(tmp_path: Path, monkeypatch) -> None:
    class Distribution:
        version = "1"
        files = (kit.importlib.metadata.PackagePath("deepspeed/op.so"),)

    monkeypatch.setattr(kit.importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(SystemExit, match="compiled code"):
        kit.packages(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(kit, "PURE", ("no-such-package",))
    assert kit.packages(tmp_path) == ["without no-such-package: it is not installed here"]
