"""One folder that a machine with torch and triton runs with no network: `make gpu-kit`, then carry build/gpu-kit there.

    project/     every file that git tracks, the native library built for it, and COMMIT, which results are stored with
    wheels/      what that machine's Python lacks (bench/kit.txt; with --bare all that pyproject.toml asks for but torch)
    packages/    DeepSpeed as it is installed here: it has no wheel, and is pure Python unless it builds its ops
    README       the two lines that run it

Wheels are fetched for that machine's Python, which may be another than this one. Fails where the folder would be over the limit.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.harness.results_file import ROOT

LIMIT_MIB = 60
LISTED = ROOT / "bench" / "kit.txt"
PURE = ("deepspeed",)  # packages without a wheel
TESTS = ("pytest", "pytest-timeout", "pytest-xdist")  # what --bare adds to pyproject's own
GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
README = """\
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target site wheels/*.whl
cd project && PYTHONPATH=$PWD/../site:$PWD/../packages:$PWD:$PWD/kernels python3 -m bench gpu
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", default="3.12", help="version of that machine's Python (3.12)")
    parser.add_argument("--archs", default="90a", help="GPUs that the native library is for (90a); '' for a CPU alone")
    parser.add_argument("--bare", action="store_true", help="that machine has nothing but torch and triton")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu-kit", help="folder, written anew (build/gpu-kit)"
    )


def requirements(bare: bool) -> list[str]:
    """What the wheels are fetched for: names of the list, or of pyproject.toml, with pyproject's versions."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    known = {name(r): r for r in re.findall(r'^    "([^"]+)",$', text, re.MULTILINE)}
    if bare:
        core = text[text.index("\ndependencies = [") : text.index("[project.optional-dependencies]")]
        own = [r for r in re.findall(r'^    "([^"]+)",$', core, re.MULTILINE) if name(r) != "torch"]
        return [*own, *(known[n] for n in TESTS), *(r for package in PURE for r in needs_of(package))]
    lines = (line.split("#")[0].strip() for line in LISTED.read_text("utf-8").splitlines())
    return [known.get(name(line), line) for line in lines if line]


def needs_of(package: str) -> list[str]:
    """What a package that is installed here needs, less torch and its extras."""
    try:
        needs = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [r for r in needs if ";" not in r and name(r) != "torch"]


def name(requirement: str) -> str:
    """`Pydantic_Core>=2` -> pydantic-core."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def sources(into: Path) -> None:
    """The tracked files as they lie here, and which commit they are."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in filter(None, tracked.split("\0")):
        if (ROOT / path).is_file():
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, into / path)
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (into / "COMMIT").write_text(commit)


def native(into: Path, archs: str) -> str:
    """Build the library where the carried project looks for it; the line that says what it holds. Raises SystemExit."""
    from cmt_kernels._native import build

    os.environ |= {"CMT_CUDA": "1", "CMT_CUDA_ARCHS": archs} if archs else {"CMT_CUDA": "0"}
    built, line = build.build(into / build.HERE.relative_to(ROOT))
    if not built:
        raise SystemExit(f"kit: {line}")
    return line


def wheels(into: Path, python: str, wanted: list[str], needs: bool) -> list[str]:
    """Fetch wheels for a Python; with `needs` all that they need, else those that are asked for alone. Their file names."""
    into.mkdir(parents=True)
    platforms = [f"--platform={glibc}_x86_64" for glibc in GLIBC]
    how = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        *how,
        "-d",
        str(into),
        *wanted,
    ]
    if subprocess.run(command).returncode:
        raise SystemExit("kit: pip could not fetch the wheels")
    asked = {name(r) for r in wanted}
    for path in into.iterdir():
        if not needs and name(path.name.split("-")[0]) not in asked:
            path.unlink()
    return sorted(path.name for path in into.iterdir())


def packages(into: Path) -> list[str]:
    """Copy what has no wheel from this Python; `name version`, or why it is left out. Raises SystemExit for compiled code."""
    said = []
    for package in PURE:
        try:
            found = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            said.append(f"without {package}: it is not installed here")
            continue
        for file in found.files or []:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            if file.suffix == ".so":
                raise SystemExit(
                    f"kit: {package} was installed with compiled code ({file}), which is this Python's alone"
                )
            target = into / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(str(file.locate()), target)
        said.append(f"{package} {found.version}")
    return said


def mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def run(arguments: argparse.Namespace) -> int:
    """Build the kit; 1 if it is over the limit."""
    out = arguments.out.resolve()
    if out.exists() and not (out / "README").exists() and any(out.iterdir()):
        raise SystemExit(f"kit: {out} is there and is no kit; it would be deleted")
    shutil.rmtree(out, ignore_errors=True)
    sources(out / "project")
    print(native(out / "project", arguments.archs), flush=True)
    for line in wheels(out / "wheels", arguments.python, requirements(arguments.bare), arguments.bare):
        print(line)
    print("\n".join(packages(out / "packages")))
    (out / "README").write_text(README)
    sizes = {part.name: mib(part) for part in sorted(out.iterdir()) if part.is_dir()}
    whole = mib(out)
    print(f"{out}: {whole:.1f} MiB ({', '.join(f'{part} {size:.1f}' for part, size in sizes.items())}) of {LIMIT_MIB}")
    print(f"There, in that folder:\n{README}", end="")
    return int(whole > LIMIT_MIB)
