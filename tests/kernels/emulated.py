"""The native library with csrc/cuda compiled for the CPU, and a way to run any Python on it.

    python -m tests.kernels.emulated                                     builds build/emulated/cmt_native.so
    python -m tests.kernels.emulated -m pytest tests/kernels/test_x.py   builds it and runs Python with it
    ... --reverse -m ...     blocks and threads from the last to the first
    ... --sanitize -m ...    a build with AddressSanitizer and UndefinedBehaviorSanitizer, of the CPU kernels too
    ... --cpu -m ...         the CPU kernels of that build instead of the emulated ones
    ... --native-tests       the tests of the native ops (NATIVE_TESTS), instead of -m

In it every CPU tensor goes through the CUDA kernels (`CMT_ISA=emu`). The sources are compiled as they are but for what a C++
compiler cannot read: `kernel<<<...>>>(...)` and the storage of __shared__ arrays (`translated`). csrc/emulation has the rest.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmt_kernels._native import build

ROOT = build.CSRC.parent
EMULATION = build.CSRC / "emulation"
FOLDER, SANITIZED = ROOT / "build" / "emulated", ROOT / "build" / "sanitized"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-g1"]
# no -march: a machine of any age runs it; _FORTIFY_SOURCE forbids to jump between stacks
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-D__CUDACC__",
         "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-attributes"]  # fmt: skip

# pytest's arguments for the tests of the native ops, of these what computes: not the compiler, instruction sets, threads
NATIVE_TESTS = ["-q", "-p", "no:cacheprovider", "-k",
                "native and not (opcheck or compile or instruction or threads or says_why)",
                *(f"tests/kernels/test_{name}.py" for name in ("ops", "native", "native_instances"))]  # fmt: skip

LAUNCH = re.compile(r"(\w+(?:<[^<>;{}]*>)?)<<<(.*?)>>>\(", re.DOTALL)
DYNAMIC = re.compile(r"extern __shared__ float (\w+)\[\];")
SHARED = re.compile(r"__shared__ (\w+) (\w+)((?:\[[^;]*\])+);")


def translated(text: str, name: str) -> str:
    """A .cu or .cuh as C++: launches become calls, and a __shared__ array a static one that every block finds poisoned.

    Compiler and sanitizers name the lines of the original. Raises ValueError where something of CUDA is left over.
    """
    out, at = [], 0
    for launch in LAUNCH.finditer(text):
        end, depth = launch.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        kernel, arguments = launch[1], text[launch.end() : end - 1]
        out += [
            text[at : launch.start()],
            f"emulation::launch<{kernel}>({launch[2]}, [=] {{ {kernel}({arguments}); }})",
        ]
        at = end
    text = "".join([*out, text[at:]])
    text = DYNAMIC.sub(r"float* \1 = emulation::dynamic_shared();", text)
    text = SHARED.sub(r"static \1 \2_memory\3; auto& \2 = emulation::shared_memory(\2_memory);", text)
    if "<<<" in text or "__shared__ " in text:
        raise ValueError(f"{name}: a launch or a shared array in a form that `translated` does not know")
    return f'#line 1 "{name}"\n{text}'


def translate(into: Path) -> list[Path]:
    """Every source of csrc/cuda, translated into a folder."""
    into.mkdir(parents=True, exist_ok=True)
    for source in sorted((build.CSRC / "cuda").glob("*.cu*")):
        target = into / source.with_suffix(".cpp" if source.suffix == ".cu" else source.suffix).name
        text = translated(source.read_text(), str(source))
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return sorted(into.glob("*.cpp"))


def command(source: Path, sanitize: bool) -> list[str]:
    """The command that compiles one translated source, less its `-o`."""
    include = ["-I", str(EMULATION), "-I", str(build.CSRC / "cuda")]  # the second for `../kernels.h`
    return [build.compiler(), *FLAGS, *SANITIZERS * sanitize, *include, "-c", str(source)]


def library(sanitize: bool = False) -> Path:
    """Build the library, or what of it is new; its path. Raises build.Failed with the compiler's words."""
    folder = SANITIZED if sanitize else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    build.OBJECTS.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test processes one builds, and the other finds it built
        return _library(folder, sanitize)


def _library(folder: Path, sanitize: bool) -> Path:
    torch = build.torch_folder()
    todo = {}
    for name, cxx in build.commands(torch, cuda=False).items():
        extra = ["-DCMT_EMULATED", "-DCMT_WITH_CUDA"] if name == "ops" else []
        todo[name] = [*cxx[:-2], *extra, *SANITIZERS * sanitize, *cxx[-2:]]
    todo |= {f"{source.stem}-emu": command(source, sanitize) for source in translate(folder / "cuda")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, todo, todo.values()))
    target = folder / build.LIBRARY
    partial = target.with_suffix(f".{os.getpid()}")
    linker = [build.compiler(), "-shared", *SANITIZERS * sanitize]
    build.run([*linker, *map(str, objects), *build.libraries(torch), "-o", str(partial)])
    partial.rename(target)
    return target


def compiled(name: str, command: list[str]) -> Path:
    """build.compile_one, which knows nothing of the headers of the emulation: their digest becomes part of the command."""
    if not name.endswith("-emu"):
        return build.compile_one(name, command)
    text = "".join(p.read_text() for p in [*sorted(EMULATION.glob("*.h")), *Path(command[-1]).parent.glob("*.cuh")])
    mark = build.hashlib.sha256(text.encode()).hexdigest()[:16]
    return build.compile_one(name, [command[0], f"-DCMT_HEADERS={mark}", *command[1:]])


def environment(order: str = "forward", sanitize: bool = False, isa: str = "emu") -> dict[str, str]:
    """What a Python process needs in its environment to run on the library, once it is built."""
    found = {
        "CMT_NATIVE_LIBRARY": str((SANITIZED if sanitize else FOLDER) / build.LIBRARY),
        "CMT_ISA": isa,
        "CMT_EMULATED_ORDER": order,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # its CUDA kernels are no GPU's
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")])),
    }
    if sanitize:
        # before everything else, for Python is built without them: ASan, and what throws, which ASan wants to find
        found["LD_PRELOAD"] = " ".join(map(runtime, ("libasan.so", "libstdc++.so")))
        found["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"
        found["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1"
    return found


def runtime(name: str) -> str:
    """Where the compiler has a library."""
    command = [build.compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.emulated", description=__doc__.split("\n")[0])
    parser.add_argument("--reverse", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--native-tests", action="store_true")
    parser.add_argument("-m", dest="python", nargs=argparse.REMAINDER, help="what Python runs")
    given = parser.parse_args()
    print(f"built {library(given.sanitize)}")
    env = environment("reverse" if given.reverse else "forward", given.sanitize, "" if given.cpu else "emu")
    python = ["pytest", *NATIVE_TESTS] if given.native_tests else given.python
    return subprocess.run([sys.executable, "-m", *python], env=os.environ | env, cwd=ROOT).returncode if python else 0


if __name__ == "__main__":
    sys.exit(main())
