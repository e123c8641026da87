"""`python -m cmt_kernels._native.build` compiles csrc into one library beside this file, and says what it built and why.

It needs torch's headers and libraries, not torch itself. Where pip builds in isolation torch cannot be imported, and that of the
environment which pip installs into is taken, by its path. Without one, or without a C++ compiler, it builds nothing, says so,
and the ops run on their other backends. setup.py loads this file by its path.

    CMT_BUILD_TORCH  of an install in isolation: the torch to build beside, as torch==2.13.0 (setup.py)
    CMT_CUDA=1/0     CUDA kernels or none; unset: where nvcc is found (whether a GPU is visible has nothing to do with it)
    CMT_CUDA_ARCHS   default 80,90a,100a
    CXX, NVCC        the compilers

On x86-64 the CPU kernels are compiled for the baseline, v3 (AVX2) and v4 (AVX-512), and the processor chooses when they
run: the library may be carried to another machine. Objects are kept in build/native under a hash of all they come from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# beside kernels/ in the repository and in cmt-fast's sdist, beside the package in that of cmt-kernels
CSRC = next((p for up in (2, 1) if (p := HERE.parents[up] / "csrc").is_dir()), HERE.parents[2] / "csrc")
OBJECTS = CSRC.parent / "build" / "native"
LIBRARY, RECORD = "cmt_native.so", "build.json"

ISAS = {"base": (4, []), "v3": (8, ["-march=x86-64-v3"]), "v4": (16, ["-march=x86-64-v4", "-mprefer-vector-width=512"])}
ARCHS = "80,90a,100a"
# -ffp-contract=off and --fmad=false: the same bits from the same formula in every kernel (csrc/row_math.h)
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-attributes"]
CPU_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-unused-function"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
TORCH = (2, 11)  # loads beside any later torch
TORCH_TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"


class Failed(Exception):
    """Nothing was built, and why."""


def compiler() -> str | None:
    """The C++ compiler: CXX, or the first of g++, c++ and clang++ that is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def nvcc() -> str | None:
    """NVCC, nvcc on the path or that of /usr/local/cuda; None without one."""
    return shutil.which(os.environ.get("NVCC") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def architectures() -> list[str]:
    """The GPU architectures to build for, as nvcc writes them."""
    return [arch for arch in os.environ.get("CMT_CUDA_ARCHS", ARCHS).split(",") if arch]


def wants_cuda() -> tuple[bool, str]:
    """Whether CUDA kernels are built, and why."""
    asked = os.environ.get("CMT_CUDA", "")
    if asked not in ("", "0", "1"):
        raise Failed(f"CMT_CUDA is {asked!r}; it may be 0, 1 or unset")
    if asked == "0":
        return False, "CMT_CUDA=0"
    if nvcc():
        return True, "CMT_CUDA=1" if asked else "nvcc found"
    if asked:
        raise Failed("CMT_CUDA=1, and there is no nvcc")
    return False, "no nvcc"


def nvcc_command(source: Path) -> list[str]:
    """The command that compiles one .cu for every architecture, less its `-o`."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()]
    return [nvcc() or "nvcc", *NVCC_FLAGS, *targets, "-c", str(source)]


def cubin_command(source: Path, arch: str, output: Path) -> list[str]:
    """The command that compiles the device code of one .cu for one architecture, and prints what its kernels use."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return [nvcc() or "nvcc", *NVCC_FLAGS, target, "-Xptxas", "-v", "-cubin", str(source), "-o", str(output)]


def commands(torch: Path, cuda: bool) -> dict[str, list[str]]:
    """Object name -> the command that makes it, less its `-o`."""
    cxx = [compiler(), *CXX_FLAGS]
    with_cuda = ["-DCMT_WITH_CUDA"] if cuda else []
    include = ["-isystem", str(torch / "include"), TORCH_TARGET]
    todo = {"ops": [*cxx, "-O1", *include, *with_cuda, "-c", str(CSRC / "ops.cpp")]}
    for isa in ISAS if platform.machine() in ("x86_64", "AMD64") else ("base",):
        lanes, flags = ISAS[isa]
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            defines = [f"-DCMT_ISA=cpu_{isa}", f"-DCMT_LANES={lanes}"]
            todo[f"{source.stem}-{isa}"] = [*cxx, *CPU_FLAGS, *flags, *defines, "-c", str(source)]
    if cuda:
        todo |= {f"{source.stem}-cuda": nvcc_command(source) for source in sorted((CSRC / "cuda").glob("*.cu"))}
    return todo


def libraries(torch: Path) -> list[str]:
    """What the library is linked with: torch without CUDA, which every torch has (csrc/cuda_stream.h)."""
    return [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]


def torch_folder() -> Path:
    """The package torch, not imported: here, else in the environment around an isolated build. Raises Failed without one."""
    found = importlib.util.find_spec("torch")
    here = [Path(next(iter(found.submodule_search_locations)))] if found and found.submodule_search_locations else []
    there = [place / "torch" for place in outer()]
    whole = [t for t in (*here, *there) if (t / "include").is_dir() and (t / "lib").is_dir()]
    if not whole:
        raise Failed("no torch to build beside; install it first, or set CMT_BUILD_TORCH, as torch==2.13.0")
    fit = [t for t in whole if version(t) >= TORCH]
    if not fit:
        raise Failed(
            f"torch {'.'.join(map(str, version(whole[0])))} is there, and {'.'.join(map(str, TORCH))} is the oldest that will do"
        )
    return fit[0]


def version(torch: Path) -> tuple[int, ...]:
    """(major, minor) of a package torch, read from its files."""
    text = (torch / "version.py").read_text("utf-8") if (torch / "version.py").exists() else ""
    said = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return tuple(map(int, said.groups())) if said else (0, 0)


def outer() -> list[Path]:
    """Where packages are of the environment that is installed into: pip hides it from an isolated build; uv and build work in
    another and leave it on PATH, where it is activated. The library knows no Python, so a torch of another Python's will do.
    """
    own = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    active = [Path(os.environ[key]) for key in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(key)]
    on_path = [Path(p).parent for p in os.environ.get("PATH", "").split(os.pathsep) if p]
    active += [prefix for prefix in (*on_path, Path(".venv").absolute()) if (prefix / "pyvenv.cfg").exists()]
    theirs = [place for prefix in active for place in sorted(prefix.glob("lib/python3*/site-packages"), reverse=True)]
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}  # seen from a venv with --system-site-packages
    wide = [sysconfig.get_path("purelib", vars=base)] if _wide() else []
    return list(dict.fromkeys(map(Path, (*own, *theirs, *wide))))


def _wide() -> bool:
    """Whether this environment sees the packages of the Python that it was made of."""
    settings = Path(sys.prefix, "pyvenv.cfg")
    return settings.exists() and bool(
        re.search(r"include-system-site-packages\s*=\s*true", settings.read_text("utf-8"))
    )


def sources() -> str:
    """Of all that the library is made of here, the compilers and torch aside: another library is a stale one."""
    total = hashlib.sha256(repr((ISAS, CXX_FLAGS, CPU_FLAGS, NVCC_FLAGS, TORCH_TARGET)).encode())
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh") and path.parent.name != "emulation":
            total.update(str(path.relative_to(CSRC)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


def checksum(library: Path) -> str:
    """Of the library's bytes."""
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]


def digest(command: list[str], source: Path) -> str:
    """Changes when the command, the source or any header of csrc does."""
    headers = [p for p in sorted(CSRC.rglob("*")) if p.suffix in (".h", ".cuh") and p.parent.name != "emulation"]
    total = hashlib.sha256(repr(command).encode())
    for path in [*headers, source]:
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def compile_one(name: str, command: list[str]) -> Path:
    """The object of one source: compiled, or kept from a build of the same command, source and headers."""
    target = OBJECTS / f"{name}-{digest(command, Path(command[-1]))}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        run([*command, "-o", str(partial)])
        partial.rename(target)
    return target


def run(command: list[str]) -> None:
    """Run a compiler. Raises Failed where it fails: its first error in a line, then the command and all that it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stdout + done.stderr
        first = next((line for line in said.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise Failed(f"{Path(command[0]).name} failed: {first}\n{' '.join(command)}\n{said}")


def compile_all(into: Path) -> str:
    """Compile and link everything into a folder; what was built. Raises Failed where it cannot be."""
    if sys.platform != "linux":
        raise Failed(f"it is written for Linux, not {sys.platform}")
    torch = torch_folder()
    if not compiler():
        raise Failed("no C++ compiler")
    if not CSRC.is_dir():
        raise Failed(f"no sources in {CSRC}")
    cuda, why = wants_cuda()
    OBJECTS.mkdir(parents=True, exist_ok=True)
    todo = commands(torch, cuda)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, todo, todo.values()))
    into.mkdir(parents=True, exist_ok=True)
    partial = into / f"{LIBRARY}.{os.getpid()}"
    linker = [nvcc(), "-shared", "-cudart", "static"] if cuda else [compiler(), "-shared"]
    run([*linker, *map(str, objects), *libraries(torch), "-o", str(partial)])
    partial.rename(into / LIBRARY)  # a process that has the old one mapped keeps it
    isas = [name.removeprefix("gelu-") for name in todo if name.startswith("gelu-") and name != "gelu-cuda"]
    archs = "CUDA sm_" + " sm_".join(architectures()) if cuda else "no CUDA"
    return f"CPU {' '.join(isas)}; {archs} ({why})"


def build(into: Path = HERE) -> tuple[bool, str]:
    """Build `cmt_native.so` into a folder, and `build.json` beside it. (whether it was built, the line that says it)."""
    start = time.monotonic()
    try:
        built, line = True, f"built: {compile_all(into)}"
    except Failed as failure:
        built, line = False, f"not built: {failure}"
        (into / LIBRARY).unlink(missing_ok=True)  # an older library would not be what its sources say
    into.mkdir(parents=True, exist_ok=True)
    record = {"line": line.split("\n")[0]}
    if built:
        record |= {"sources": sources(), "library": checksum(into / LIBRARY)}
    (into / RECORD).write_text(json.dumps(record) + "\n")
    return built, f"native ops {line} in {time.monotonic() - start:.0f} s"


if __name__ == "__main__":
    built, line = build()
    print(line)
    sys.exit(0 if built or os.environ.get("CMT_CUDA") != "1" else 1)
