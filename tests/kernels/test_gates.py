"""Gates without a GPU: every variant of every Triton kernel compiles to code without spills or local memory.

For every architecture; CMT_GATES=90 in the environment compiles for that one alone, which takes a third of the minutes.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
from cmt_kernels.gate import Gate

from bench.kernels import resources

pytestmark = pytest.mark.skipif(resources.missing() is not None, reason=f"no gates: {resources.missing()}")
if importlib.util.find_spec("triton"):
    from tests.kernels import spilling_kernel
ASKED = tuple(a for a in resources.ARCHITECTURES if os.environ.get("CMT_GATES", str(a)) == str(a))


@pytest.fixture(scope="module")
def rows() -> list[resources.Row]:
    return resources.triton_rows(resources.gated_ops(), architectures=ASKED)


@pytest.mark.parametrize("op", resources.gated_ops())
def test_kernels_fit(op: str, rows: list[resources.Row]) -> None:
    own = [row for row in rows if row["op"] == op]
    assert len(own) == len(resources.todo([op], ASKED)) > 0
    assert all((row["faults"] is None) == (row["arch"] != "sm_90") for row in own)
    wrong = [resources.line(row) for row in own if resources.wrong(row)]
    assert not wrong, "\n".join(wrong)


def planted(num_warps: int, instruction: str | None = None) -> Gate:
    signature = {"x": "*fp32", "y": "*fp32"}
    return Gate("planted", spilling_kernel.table, signature, {"N": 128}, num_warps, instruction=instruction)


def test_a_spill_is_caught() -> None:
    """A table of 128 x 128 sums: 512 registers a thread with one warp, 64 with eight."""
    row = resources.measure("planted", planted(num_warps=1), 90)
    assert row["spill_bytes"] > 0 and row["local_bytes"] > 0 and "spills" in resources.wrong(row), row
    assert "WRONG: spills" in resources.line(row)
    row = resources.measure("planted", planted(num_warps=8), 90)
    assert resources.wrong(row) == "" and 64 < row["registers"] < 255, row


def test_a_missing_instruction_is_caught() -> None:
    row = resources.measure("planted", planted(8, "HGMMA"), 90)
    assert row["found"] is False and resources.wrong(row) == "no HGMMA"
    assert resources.wrong(resources.measure("planted", planted(8, "FFMA"), 90)) == ""
    assert resources.measure("planted", planted(8, "HGMMA"), 80)["instruction"] is None


def test_a_fault_of_the_assembler_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of a register that is never written, planted in the disassembly of a right kernel (tests/bench/test_sass.py has
    what a bad assembler really did)."""
    row = resources.measure("planted", planted(8), 90)
    assert row["faults"] == "" and resources.wrong(row) == ""
    right = resources.sass.disassemble

    def bad(*arguments) -> list[list[tuple[int, str]]]:
        return [[(at, text.replace("EXIT", "MOV R1, UR50")) for at, text in lines] for lines in right(*arguments)]

    monkeypatch.setattr(resources.sass, "disassemble", bad)
    row = resources.measure("planted", planted(8), 90)
    assert resources.wrong(row).startswith("UR50 read, never written at 0x") and "WRONG: UR50" in resources.line(row)


def test_arguments_of_a_gate_are_those_of_its_kernel() -> None:
    with pytest.raises(ValueError, match="N"):
        resources.compile_gate(Gate("short", spilling_kernel.table, {"x": "*fp32", "y": "*fp32"}, {}), 90)
