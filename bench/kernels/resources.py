"""Every Triton kernel compiled for sm_80, sm_90 and sm_100 without a GPU: registers, spills, local and shared memory, and
on sm_90 the faults that an assembler may have put into its machine code (sass_faults.py).

The assembler is the one that a run here would take (cmt_kernels/assembler.py); `--assembler PATH` asks for another.

A row is a plain dict: op, name, arch ("sm_90"), registers, spill_bytes (stores to the stack, per thread), local_bytes
(stack and local memory, per thread), shared_bytes (per block), instruction (what must be in the code, or None), found
(whether it is; None where nothing is asked) and faults ("" for none, None where they were not searched for).
`bench.kernels.resources_cuda.rows()`, where that module exists, adds the rows of the .cu files. A row with a spill, local memory,
more shared memory than a block may have, a fault, or without its instruction is wrong, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cmt_kernels import OPS, assembler
from cmt_kernels.gate import Gate

from bench.kernels import sass, sass_faults

ARCHITECTURES = (80, 90, 100)
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}  # CUDA programming guide, per block
SEARCHED = 90  # Gate.instruction and faults are read from this one's machine code: the one with wgmma
CHUNK = 8  # gates a task of a worker: their code is disassembled together, because nvdisasm starts slowly
Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", choices=OPS, help="one op; all of them if absent")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    parser.add_argument("--assembler", type=Path, help="a ptxas to use instead of the one that is chosen here")


def missing() -> str | None:
    """Why no Triton kernel can be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: kernels are interpreted, not compiled"
    absent = [name for name in ("cuobjdump", "nvdisasm") if not tool(name).exists()]
    return f"triton came without {absent[0]}" if absent else None


def tool(name: str) -> Path:
    """Where Triton has a program of the CUDA toolkit."""
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name


def gated_ops() -> list[str]:
    """Ops with a Triton backend."""
    return [op for op in OPS if importlib.util.find_spec(f"cmt_kernels.{op}.triton")]


def gates(op: str) -> list[Gate]:
    """The gates of one op. Raises ValueError where two share a name."""
    found = importlib.import_module(f"cmt_kernels.{op}.triton").gates()
    names = [gate.name for gate in found]
    if len(set(names)) < len(names):
        raise ValueError(f"gates of {op} share a name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    return found


def compile_gate(gate: Gate, arch: int) -> Any:
    """Triton's CompiledKernel of one gate, by the assembler that runs would take, through Triton's own cache."""
    assembler.choose(arch)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = gate.kernel.arg_names
    unknown = (set(gate.signature) | set(gate.constexprs)) ^ set(names)
    if unknown:
        raise ValueError(f"{gate.name}: {sorted(unknown)} are not exactly the arguments of {gate.kernel.__name__}")
    constexprs = {name: gate.constexprs[name] for name in names if name in gate.constexprs}
    types = {name: "constexpr" if name in constexprs else gate.signature[name] for name in names}
    aligned = [i for i, t in enumerate(types.values()) if t.startswith("*") or t.endswith(":16")]
    source = ASTSource(
        gate.kernel,
        {name: t.removesuffix(":16") for name, t in types.items()},
        constexprs,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": gate.num_warps, "num_stages": gate.num_stages, "enable_fp_fusion": gate.fp_fusion}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(op: str, gate: Gate, arch: int) -> Row:
    """Compile one gate and read its row from the cubin."""
    return measure_all([(op, gate, arch)])[0]


def measure_all(todo: list[tuple[str, Gate, int]]) -> list[Row]:
    """The rows of some gates on some architectures."""
    compiled = [compile_gate(gate, arch) for _, gate, arch in todo]
    rows = [_resources(op, gate, arch, c) for (op, gate, arch), c in zip(todo, compiled)]
    searched = [i for i, (_, _, arch) in enumerate(todo) if arch == SEARCHED]
    codes = (
        sass.disassemble([compiled[i].asm["cubin"] for i in searched], SEARCHED, tool("nvdisasm")) if searched else []
    )
    for i, lines in zip(searched, codes):
        asked = todo[i][1].instruction
        found = any(re.search(rf"\b{re.escape(asked)}\b", text) for _, text in lines) if asked else None
        rows[i] |= {"instruction": asked, "found": found, "faults": faults(lines)}
    return rows


def faults(lines: list[tuple[int, str]]) -> str:
    """What an assembler did wrong in the machine code of a kernel, or what of it was not understood; "" for nothing."""
    try:
        kernel = sass.kernel("kernel", lines)
    except ValueError as error:
        return str(error)
    return sass.summary(sass_faults.unwritten(kernel) + sass_faults.running(kernel))


def _resources(op: str, gate: Gate, arch: int, compiled: Any) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        used = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _dump("-res-usage", cubin)))
        local = int(used["STACK"]) + int(used["LOCAL"])
        stores = re.findall(r"\bSTL(?:\.(\d+))?\b", _dump("-sass", cubin)) if local else []
    return {
        "op": op,
        "name": gate.name,
        "arch": f"sm_{arch}",
        "registers": int(used["REG"]),
        "spill_bytes": sum(int(bits or 32) // 8 for bits in stores),
        "local_bytes": local,
        "shared_bytes": int(used["SHARED"]) + compiled.metadata.shared,
        "instruction": None,
        "found": None,
        "faults": None,
    }


def _dump(what: str, cubin: Path) -> str:
    return subprocess.run([tool("cuobjdump"), what, cubin], capture_output=True, text=True, check=True).stdout


def _measure(todo: list[tuple[str, str, int]]) -> list[Row]:
    named = {op: {gate.name: gate for gate in gates(op)} for op in {op for op, _, _ in todo}}
    return measure_all([(op, named[op][name], arch) for op, name, arch in todo])


def todo(ops: list[str], architectures: tuple[int, ...] = ARCHITECTURES) -> list[tuple[str, str, int]]:
    """(op, gate's name, architecture) of everything that is compiled, in the order of the gates."""
    all_gates = [(op, gate) for op in ops for gate in gates(op)]
    return [(op, g.name, a) for op, g in all_gates for a in architectures if a in (g.architectures or architectures)]


def triton_rows(ops: list[str], jobs: int = 2, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Row]:
    """Rows of the Triton kernels of these ops, in the order of their gates. Processes: kernels do not pickle, so each
    worker finds its gates by name."""
    wanted = todo(ops, architectures)
    size = CHUNK * len(architectures)
    chunks = [wanted[i : i + size] for i in range(0, len(wanted), size)]
    if jobs < 2 or not chunks:
        return [row for chunk in chunks for row in _measure(chunk)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(_measure, chunks) for row in rows]


def cuda_rows() -> list[Row]:
    """Rows of the .cu files; none before there is a bench/kernels/resources_cuda.py."""
    if importlib.util.find_spec("bench.kernels.resources_cuda") is None:
        return []
    return importlib.import_module("bench.kernels.resources_cuda").rows()


def wrong(row: Row) -> str:
    """What is wrong with a row: "" if nothing is."""
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} B")
    if row["local_bytes"]:
        found.append(f"{row['local_bytes']} B of local memory")
    if row["shared_bytes"] > SHARED_BYTES[row["arch"].removesuffix("a")]:
        found.append("more shared memory than a block may have")
    if row["instruction"] and not row["found"]:
        found.append(f"no {row['instruction']}")
    if row.get("faults"):
        found.append(row["faults"])
    return ", ".join(found)


HEADER = f"{'op':15} {'kernel':40} {'arch':7} {'regs':>5} {'spill B':>8} {'local B':>8} {'shared B':>9} instruction"


def line(row: Row) -> str:
    asked = row["instruction"] or "-"
    return (
        f"{row['op']:15} {row['name']:40} {row['arch']:7} {row['registers']:5} {row['spill_bytes']:8} "
        f"{row['local_bytes']:8} {row['shared_bytes']:9} {asked:11} {wrong(row) and 'WRONG: ' + wrong(row)}"
    ).rstrip()


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 1 if a row is wrong or nothing could be compiled."""
    reason = missing()
    if reason:
        print(f"no Triton gate: {reason}")
        return 1
    if arguments.assembler:
        os.environ.update(dict.fromkeys(assembler.VARIABLES, str(arguments.assembler)))
    print(f"assembler for sm_{SEARCHED}: {assembler.choose(SEARCHED)}")
    rows = triton_rows([op for op in gated_ops() if arguments.op in (None, op)], arguments.jobs)
    rows += [row for row in cuda_rows() if arguments.op in (None, row["op"])]
    print(HEADER)
    for row in rows:
        print(line(row))
    bad = sum(bool(wrong(row)) for row in rows)
    searched = sum(row.get("faults") is not None for row in rows)
    print(f"{len(rows)} rows, {bad} wrong; {searched} searched for faults of the assembler")
    if arguments.json:
        arguments.json.write_text(json.dumps([row | {"wrong": wrong(row) or None} for row in rows], indent=1) + "\n")
    return int(bad > 0)
