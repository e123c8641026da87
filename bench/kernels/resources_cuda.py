"""Every kernel of csrc/cuda compiled for sm_80, sm_90a and sm_100a without a GPU: registers, spills, stack, shared memory.

`rows()` gives one row per kernel and architecture with the fields of `bench.kernels.resources`; ptxas says the numbers while it
compiles, and they are kept in build/native under a hash of the sources.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cmt_kernels._native import build

ARCHITECTURES = ("80", "90a", "100a")
Row = dict[str, Any]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill>\d+) bytes spill stores, (?P<reload>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def missing() -> str | None:
    """Why no .cu can be compiled here, or None."""
    return None if build.nvcc() else "no nvcc"


def sources() -> list[Path]:
    return sorted((build.CSRC / "cuda").glob("*.cu"))


def compile_log(source: Path, arch: str) -> str:
    """What ptxas says of one .cu on one architecture. Raises RuntimeError with nvcc's words if it does not compile."""
    kept = build.OBJECTS / f"{source.stem}-{arch}-{build.digest(build.cubin_command(source, arch, Path()), source)}.log"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = build.cubin_command(source, arch, Path(folder) / "kernel.cubin")
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(done.stdout + done.stderr)
    return kept.read_text()


def parse(op: str, log: str) -> list[Row]:
    """The rows in a log of `ptxas -v`. Raises ValueError if a kernel in it was not understood."""
    found = list(ENTRY.finditer(log))
    if not found or len(found) != log.count("Compiling entry function"):
        raise ValueError(
            f"{op}: ptxas told of {log.count('Compiling entry function')} kernels, {len(found)} understood"
        )
    return [
        {
            "op": op,
            "name": readable(m["name"]),
            "arch": f"sm_{m['arch']}",
            "registers": int(m["registers"]),
            "spill_bytes": int(m["spill"]),
            "local_bytes": int(m["stack"]),
            "shared_bytes": int((re.search(r"(\d+) bytes smem", m["rest"]) or [0, 0])[1]),
            "instruction": None,
            "found": None,
        }
        for m in found
    ]


def readable(mangled: str) -> str:
    """`norm_kernel-bf16-5-dual` from a mangled template: its name, its type and its numbers.

    Its type is "stream" where the residual stream is fp32 and all else bf16.
    """
    name = max(re.findall(r"[a-z_]+_kernel|sum_chunks|sum_chunk_pairs|bias_kernel", mangled), key=len)
    arguments = mangled.split(name, 1)[1].split("EE", 1)[0]
    kind = "stream" if re.match(r"If\d+__nv_bfloat16", arguments) else "bf16" if "bfloat16" in arguments else "fp32"
    numbers = re.findall(r"Li(\d+)", arguments + "E")
    return "-".join([name, kind, *numbers, *(["dual"] if "Lb1" in arguments + mangled else [])])


def rows(jobs: int = 2) -> list[Row]:
    """Every kernel of every .cu, on every architecture."""
    todo = [(source, arch) for source in sources() for arch in ARCHITECTURES]
    with ThreadPoolExecutor(jobs) as pool:
        logs = pool.map(lambda job: compile_log(*job), todo)
        return [row for (source, _), log in zip(todo, logs) for row in parse(source.stem, log)]
